"""What a durable, hashed save costs, against raw writing of the same bytes and against the peers.

    python bench/saving.py [--rounds 9] [--folder DIR]

GPT-2 124M with its AdamW state: 1.5 GB in three files. Every variant writes new files, and their deletion is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

import onym
from _measure import added_peak, alternate, save_results, table
from onym.checkpoint.retention import Retention, write_step
from onym.format.manifest import MODEL
from onym.format.safetensors import as_bytes
from onym.format.writer import write_folder

warnings.filterwarnings("ignore")


def flush(path: Path) -> None:
    for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def raw(path: Path, files: dict[str, dict[str, Tensor]], piece: int, *, durable: bool = True) -> None:
    """The bytes and nothing else."""
    path.mkdir()
    for name, tensors in files.items():
        descriptor = os.open(path / name, os.O_WRONLY | os.O_CREAT)
        for tensor in tensors.values():
            view = as_bytes(tensor).numpy().data
            for start in range(0, len(view), piece or len(view)):
                rest = view[start : start + (piece or len(view))]
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    given = parser.parse_args()
    results: dict[str, object] = {}

    config = onym.GPTConfig.preset("gpt2-small", tie_embeddings=True)
    model = onym.GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model_state = onym.state_dict(model)
    optimizer_tensors, _ = onym.optimizer_state(model, optimizer)
    unique = {name: tensor for name, tensor in model_state.items() if name != "out_head.weight"}
    first = {name: tensor for name, tensor in optimizer_tensors.items() if "exp_avg." in name}
    second = {name: tensor for name, tensor in optimizer_tensors.items() if "exp_avg_sq." in name}
    files = {"model": unique, "first": first, "second": second}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    print(f"{total / 1e9:.2f} GB in {sum(map(len, files.values()))} tensors, {os.cpu_count()} cores, torch {torch.__version__}")
    everything = {"model": model, "optimizer": optimizer}

    def compare(folder: Path, durable: bool, rounds: int) -> dict[str, list[float]]:
        target = folder / "saved"
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare_optimizer(optimizer)
        accelerator._models, accelerator._optimizers = [model], [prepared]

        def ours() -> None:
            with onym.Checkpointer(target, background=False) as checkpointer:
                checkpointer.save(1, everything)

        def torch_save() -> None:
            target.mkdir()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, target / "checkpoint.pth")
            flush(target) if durable else None

        def safetensors() -> None:
            target.mkdir()
            for name, tensors in files.items():
                save_file(tensors, target / f"{name}.safetensors")
            flush(target) if durable else None

        def distributed() -> None:
            state = {f"{file}.{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}
            dcp.save(state, storage_writer=dcp.FileSystemWriter(target, sync_files=durable), no_dist=True)

        def accelerated() -> None:
            accelerator.save_state(str(target))
            flush(target) if durable else None

        variants: dict[str, Callable[[], object]] = {
            "raw write, a tensor at a time": lambda: raw(target, files, 0, durable=durable),
            "raw write, 1 MiB at a time": lambda: raw(target, files, 1 << 20, durable=durable),
            "onym, hashed": ours,
            "torch.save": torch_save,
            "safetensors": safetensors,
            "torch.distributed.checkpoint": distributed,
            "accelerate save_state": accelerated,
        }

        def clear() -> None:
            shutil.rmtree(target)
            os.sync()

        shutil.rmtree(target, ignore_errors=True)
        return alternate(variants, rounds, clear)

    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as name:
        seconds = compare(Path(name), True, given.rounds)
        for base in ("raw write, a tensor at a time", "raw write, 1 MiB at a time", "torch.save"):
            results[f"disk, against {base}"] = table(f"On a disk, each with fsync; against {base}:", seconds, base)
        target = Path(name) / "peak"

        def save() -> None:
            with onym.Checkpointer(target, background=False) as checkpointer:
                checkpointer.save(1, everything)

        results["peak of a foreground save, MiB"] = peak = added_peak(save)
        print(f"\nmemory that a save in the foreground adds at its peak: {peak:.0f} MiB")

    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).free > 2.5 * total:
        with tempfile.TemporaryDirectory(dir=shm) as name:
            seconds = compare(Path(name), False, given.rounds)
            title = "In memory (tmpfs), no fsync; against torch.save:"
            results["tmpfs, against torch.save"] = table(title, seconds, "torch.save")

    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as name:
        checkpointer = onym.Checkpointer(Path(name), keep_last=100)
        source, target = torch.ones(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
        number = 0

        def background() -> None:
            nonlocal number
            number += 1
            checkpointer.save(number, everything)

        def done() -> None:
            checkpointer.wait()
            for entry in Path(name).glob("step-*"):
                shutil.rmtree(entry)

        background()
        done()
        added = added_peak(lambda: (background(), done()))
        variants = {
            "one memcpy into warm memory": lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), total),
            "Checkpointer.save in the background, until it returns": background,
        }
        seconds = alternate(variants, given.rounds, done)
        results["stall, against memcpy"] = table("What the training loop waits:", seconds, "one memcpy into warm memory")
        results["staging buffers, MiB"] = checkpointer._staging.nbytes / 2**20
        results["peak of a background save besides its buffers, MiB"] = added
        print(f"  buffers: {checkpointer._staging.nbytes / 2**20:.0f} MiB; added at the peak besides: {added:.0f} MiB")
        checkpointer.close()

        many = {f"blocks.{n}.weight": torch.full((16,), float(n)) for n in range(100_000)}
        numbers = iter(range(1000))
        small = {
            "100,000 tensors, a folder": lambda: write_folder(Path(name) / f"many{next(numbers)}", {MODEL: many}, {}),
            "100,000 tensors, torch.save and fsync": lambda: (
                torch.save(many, Path(name) / "many.pth"),
                flush(Path(name) / "many.pth"),
            ),
        }
        seconds = alternate(small, 5)
        results["100,000 tensors"] = table("Many small tensors:", seconds, "100,000 tensors, torch.save and fsync")

        # Layers that do not change: is it worth finding out?
        frozen = nn.Linear(4000, 4000)
        state = {"weight": frozen.weight.detach()}
        rewritten = alternate(
            {"64 MB that did not change, written again": lambda: write_step(
                Path(name) / "frozen", next(numbers), partial(write_folder, tensors={MODEL: state}, texts={}),
                retention=Retention(10_000))}, 5
        )  # fmt: skip
        table("Unchanged tensors:", rewritten, next(iter(rewritten)))
    save_results("saving", results)


if __name__ == "__main__":
    main()
