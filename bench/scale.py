"""What a sharded save costs besides writing, on paper: planning, agreeing and committing for up to 16,384 processes.

    python bench/scale.py [--most 16384]

Nothing is written: tensors have no memory (the meta device), and the process group is torch's fake one. What is measured is
Onym's own code for the first process, which has the most to do: its plan, the reports of all (through a real TCPStore), the
texts that it writes, and what each process reads when it restores.
"""

from __future__ import annotations

import argparse
import pickle
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from onym.checkpoint.coordinator import StoreCoordinator
from onym.checkpoint.snapshot import _Shares
from onym.format.hashing import unknown
from onym.format.manifest import MODEL, OPTIMIZER, TRAINER_TENSORS, FileEntry, Header, Manifest, TensorEntry, identity_of
from onym.format.sharded_tensor import PIECES, Part, Pieces, Written, assemble, piece_file, tabled
from onym.format.writer import Share

# layers, width, hidden width, heads for keys and values (of width 128), vocabulary
SIZES = {"1B": (16, 2048, 8192, 8, 128_256), "70B": (80, 8192, 28_672, 8, 128_256), "405B": (126, 16_384, 53_248, 8, 128_256)}
HASH = "0" * 64


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    layers, width, hidden, kv_heads, vocabulary = SIZES[size]
    kv = kv_heads * 128
    block = {
        "attention.wq.weight": (width, width),
        "attention.wk.weight": (kv, width),
        "attention.wv.weight": (kv, width),
        "attention.wo.weight": (width, width),
        "feed_forward.w1.weight": (hidden, width),
        "feed_forward.w2.weight": (width, hidden),
        "feed_forward.w3.weight": (hidden, width),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }
    named = {f"layers.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    return {
        "tok_embeddings.weight": (vocabulary, width),
        **named,
        "norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }


def part_of(shape: tuple[int, ...], process: int, count: int) -> Part | None:
    """As Shard(0) cuts."""
    rows = -(-shape[0] // count)
    start = min(process * rows, shape[0])
    size = min(rows, shape[0] - start)
    return Part(process, (start, *[0] * (len(shape) - 1)), (size, *shape[1:])) if size else None


def sharded(shape: tuple[int, ...], mine: Part, mesh: Any) -> DTensor:
    local = torch.empty(mine.size, device="meta")
    whole = {"shape": torch.Size(shape), "stride": (1,) * len(shape)}
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **whole)


class Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return lap


def simulate(size: str, count: int) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    state: dict[str, dict[str, Any]] = {MODEL: {}, OPTIMIZER: {}}
    for name, shape in shapes(size).items():
        mine = part_of(shape, 0, count)
        assert mine is not None
        for file, key in ((MODEL, name), (OPTIMIZER, f"state.exp_avg.{name}"), (OPTIMIZER, f"state.exp_avg_sq.{name}")):
            state[file][key] = sharded(shape, mine, mesh)
        state[OPTIMIZER][f"state.step.{name}"] = torch.zeros(())
    result: dict[str, Any] = {}
    clock = Clock()
    shares = _Shares()
    kept = {file: shares.own(file, tensors) for file, tensors in state.items()}
    result["plan"] = clock.lap()

    digest = shares.table.digest
    numbers = {number: shape for rows in shares.table.tensors.values() for _, shape, number in rows.values()}
    header = {}
    for file, tensors in kept.items():
        entries = {
            name: TensorEntry("float32", list(value.shape), HASH, blocks=unknown(value.nbytes).blocks)
            for name, value in tensors.items()
        }
        header[file] = len(Header(entries, identity=identity_of(entries)).to_json())
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = []
    for process in range(count):
        files = {piece_file(file, process): FileEntry(10**9, HASH, header[file]) for file in kept}
        parts = {number: part_of(shape, process, count) for number, shape in numbers.items() if shape}
        files[piece_file(TRAINER_TENSORS, process)] = FileEntry(16_000, HASH, 500)
        generators = [  # each process's own
            Written(TRAINER_TENSORS, f"rng.process-{process}.{name}", dtype, (length,), Part(process, (0,), (length,)))
            for name, dtype, length in (("torch", "uint8", 5056), ("numpy", "uint32", 624), ("values", "uint8", 7419))
        ]
        share = Share(files, generators, {number: part for number, part in parts.items() if part is not None}, digest)
        if process == 0:
            share.parts.update({number: Part(0, (), ()) for number, shape in numbers.items() if not shape})
        told.append(share)
    result["report"] = max(len(pickle.dumps(share)) for share in told)
    for process, share in enumerate(told):
        StoreCoordinator(store, "x", process, count, "it").report("written", share)
    clock.lap()
    heard: list[Share] = StoreCoordinator(store, "x", 0, count, "it").reports("written")
    result["hear"] = clock.lap()

    tensors = tabled(shares.table, [share.parts for share in heard])
    tensors |= assemble(written for share in heard for written in share.written)
    files = {name: entry for share in heard for name, entry in share.files.items()}
    pieces = Pieces(tensors)
    text = pieces.to_json()
    files[PIECES] = FileEntry(len(text), HASH, len(text))
    manifest = Manifest(files, {}, identity=pieces.identity(files)).to_json()
    result["commit"] = clock.lap()
    result["tensors"] = sum(map(len, tensors.values()))
    result["pieces"] = sum(len(entry.layout.parts) for entries in tensors.values() for entry in entries.values())
    result["bytes"] = len(text) + len(manifest)
    result["header"] = sum(header.values())

    clock.lap()
    read = Pieces.read(text, Manifest.from_json(manifest, "manifest.json"), PIECES)
    for entry in read.tensors[MODEL].values():
        mine = part_of(entry.shape, count // 2, count)
        if mine is not None:
            assert list(entry.layout.overlapping([(at, at + n) for at, n in zip(mine.start, mine.size, strict=True)])) == [mine]
    result["open"] = clock.lap()
    dist.destroy_process_group()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=16_384, help="processes")
    most = parser.parse_args().most
    columns = ("plan", "hear", "commit", "open")
    print("| model | processes | pieces | " + " | ".join(columns) + " | a report | manifest, pieces.json | headers of each |")
    print("|---" * 10 + "|")
    for size in SIZES:
        for count in (8, 64, 512, 4096, 16_384):
            if count <= most:
                r = simulate(size, count)
                seconds = " | ".join(f"{r[column]:.2f} s" for column in columns)
                sizes = f"{r['report'] / 1e3:.1f} kB | {r['bytes'] / 1e6:.1f} MB | {r['header'] / 1e3:.0f} kB"
                print(f"| {size} | {count:,} | {r['pieces']:,} | {seconds} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
