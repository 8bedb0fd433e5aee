"""Sharded checkpoints: ``dcp.save`` and ``dcp.load`` with ``onym.DCPWriter`` and ``DCPReader``, against torch's own, in turns;
and ``onym.Checkpointer`` in the background against ``dcp.async_save``.

    python bench/distributed.py --processes 2 --megabytes 400 --rounds 5

The same calls on the same FSDP2 model, in the same processes; medians over the rounds, of the time until all have returned.
Torch's writer flushes its files (``sync_files=True`` is its default); it has no hashes, and a save that is interrupted leaves
a part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(folder: Path, megabytes: int, rounds: int, verify: bool) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.fsdp import fully_shard

    import onym

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    layers = max(1, megabytes * 1_000_000 // (4 * 1024 * 1024))
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
    fully_shard(model)
    state = model.state_dict()
    ways: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
        "onym": (onym.DCPWriter, lambda path: onym.DCPReader(path, verify=verify)),
        "dcp": (dcp.FileSystemWriter, dcp.FileSystemReader),
        "dcp-hf": (
            lambda path: HuggingFaceStorageWriter(str(path), save_distributed=True),
            lambda path: HuggingFaceStorageReader(str(path)),
        ),
    }
    times: dict[tuple[str, str], list[float]] = {(way, what): [] for way in ways for what in ("save", "load")}
    for number in range(rounds + 1):
        for way, (writer, reader) in ways.items():
            path = folder / f"{way}-{number}"
            for what in ("save", "load"):
                dist.barrier()
                start = time.perf_counter()
                if what == "save":
                    dcp.save(state, storage_writer=writer(path))
                else:
                    dcp.load(state, storage_reader=reader(path))
                dist.barrier()
                if number:  # the first round warms up
                    times[way, what].append(time.perf_counter() - start)
            if dist.get_rank() == 0:
                shutil.rmtree(path)
    if dist.get_rank() == 0:
        nbytes = layers * 4 * 1024 * 1024
        print(f"{dist.get_world_size()} processes, {nbytes / 1e6:.0f} MB, {rounds} rounds, medians")
        for what in ("save", "load"):
            ours = statistics.median(times["onym", what])
            for way in ways:
                median = statistics.median(times[way, what])
                speed = f"{nbytes / median / 1e9:5.2f} GB/s"
                print(f"{what}  {way:<7} {median:6.3f} s  {speed}  onym is {median / ours:.2f} times as fast")
    stalls(folder, model, rounds)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive Python now and then


def stalls(folder: Path, model: Any, rounds: int) -> None:
    """How long ``Checkpointer.save`` and ``dcp.async_save`` hold up the training, and until when what they began is done."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    import onym

    group = dist.new_group(backend="gloo")  # async_save's thread uses collectives, so it needs a group of its own
    checkpointer = onym.Checkpointer(folder / "run", keep_last=1000)
    # Its best: into memory that stays, as ours.
    stager = DefaultStager(StagingOptions(False, True, False, False))  # what needs no GPU of it
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 2):
        for way in ("onym", "dcp"):
            dist.barrier()
            start = time.perf_counter()
            if way == "onym":
                checkpointer.save(number + 1, {"model": model})
                stalled = time.perf_counter() - start
                checkpointer.wait()
            else:
                state = model.state_dict()
                future: Any = dcp.async_save(
                    state, checkpoint_id=folder / f"async-{number}", process_group=group, async_stager=stager
                )
                stalled = time.perf_counter() - start
                getattr(future, "upload_completion", future).result()
            dist.barrier()
            if number > 1:
                times.setdefault((way, "stall"), []).append(stalled)
                times.setdefault((way, "until done"), []).append(time.perf_counter() - start)
    checkpointer.close()
    if dist.get_rank() == 0:
        for what in ("stall", "until done"):
            ours, theirs = (statistics.median(times[way, what]) for way in ("onym", "dcp"))
            print(f"in the background, {what}: onym {ours:.3f} s, dcp.async_save {theirs:.3f} s, {theirs / ours:.2f} times")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="check the hashes on loading")
    given = parser.parse_args()
    if "RANK" in os.environ:
        measure(given.folder, given.megabytes, given.rounds, given.verify)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={given.processes}",
            __file__,
        ]
        options = ["--folder", folder, "--megabytes", str(given.megabytes), "--rounds", str(given.rounds)]
        options += ["--verify" if given.verify else "--no-verify"]
        return subprocess.run([*torchrun, *options], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
