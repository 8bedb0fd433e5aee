"""What a sharded save costs besides writing, on paper: planning, agreeing and committing for up to 16,384 processes.

    python bench/scale.py [--most 16384]

Nothing is written: tensors have no memory (the meta device), and the process group is torch's fake one. What is measured is
Onym's own code for the first process, which has the most to do: its plan, the reports of all (through a real TCPStore), the
texts that it writes, and what each process reads when it restores.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.testing._internal.distributed.fake_pg import FakeStore

from onym.checkpoint.coordinator import StoreCoordinator
from onym.checkpoint.shard_plan import ShardPlan
from onym.format.chunk_index import CHUNKS, ChunkIndex
from onym.format.hashing import unknown
from onym.format.layout import Shard, shard_file
from onym.format.manifest import MODEL, OPTIMIZER, TRAINER_TENSORS, FileEntry, Header, Manifest, TensorEntry, identity_of
from onym.format.rank_files import RankReport, WrittenChunk, assemble
from onym.state.chunks import Chunk

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


def chunk_of(shape: tuple[int, ...], rank: int, count: int) -> Chunk | None:
    """As Shard(0) divides."""
    rows = -(-shape[0] // count)
    start = min(rank * rows, shape[0])
    size = min(rows, shape[0] - start)
    return Chunk((start, *[0] * (len(shape) - 1)), (size, *shape[1:])) if size else None


def sharded(shape: tuple[int, ...], mine: Chunk, mesh: Any) -> DTensor:
    local = torch.empty(mine.sizes, device="meta")
    whole = {"shape": torch.Size(shape), "stride": (1,) * len(shape)}
    return DTensor.from_local(local, mesh, [ShardPlacement(0)], run_check=False, **whole)


class Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        lap = time.perf_counter() - self.last
        gc.collect()  # or what one phase leaves is collected in whichever comes next
        self.last = time.perf_counter()
        return lap


def simulate(size: str, count: int) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    state: dict[str, dict[str, Any]] = {MODEL: {}, OPTIMIZER: {}}
    for name, shape in shapes(size).items():
        mine = chunk_of(shape, 0, count)
        assert mine is not None
        for file, key in ((MODEL, name), (OPTIMIZER, f"state.exp_avg.{name}"), (OPTIMIZER, f"state.exp_avg_sq.{name}")):
            state[file][key] = sharded(shape, mine, mesh)
        state[OPTIMIZER][f"state.step.{name}"] = torch.zeros(())
    result: dict[str, Any] = {}
    clock = Clock()
    plan = ShardPlan()
    own = {file: plan.add(file, tensors) for file, tensors in state.items()}
    result["plan"] = clock.lap()

    digest = plan.table.digest
    numbers = {number: shape for rows in plan.table.tensors.values() for _, shape, number in rows.values()}
    header = {}
    for file, tensors in own.items():
        entries = {
            name: TensorEntry("float32", list(value.shape), HASH, blocks=unknown(value.nbytes).blocks)
            for name, value in tensors.items()
        }
        header[file] = len(Header(entries, identity=identity_of(entries)).to_json())
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reports = []
    for rank in range(count):
        files = {shard_file(file, rank): FileEntry(10**9, HASH, header[file]) for file in own}
        chunks = {number: chunk_of(shape, rank, count) for number, shape in numbers.items() if shape}
        files[shard_file(TRAINER_TENSORS, rank)] = FileEntry(16_000, HASH, 500)
        generators = [  # each rank's own
            WrittenChunk(TRAINER_TENSORS, f"rng.process-{rank}.{name}", dtype, (length,), Shard(rank, Chunk((0,), (length,))))
            for name, dtype, length in (("torch", "uint8", 5056), ("numpy", "uint32", 624), ("values", "uint8", 7419))
        ]
        report = RankReport(files, generators, {n: chunk for n, chunk in chunks.items() if chunk is not None}, digest)
        if rank == 0:
            report.chunks.update({number: Chunk((), ()) for number, shape in numbers.items() if not shape})
        reports.append(report)
    result["report"] = max(len(pickle.dumps(report)) for report in reports)
    for rank, report in enumerate(reports):
        StoreCoordinator(store, "x", rank, count, "it").report("written", report)
    clock.lap()
    heard: list[RankReport] = StoreCoordinator(store, "x", 0, count, "it").reports("written")
    result["hear"] = clock.lap()

    tensors = plan.table.assemble(report.chunks for report in heard)
    tensors |= assemble(chunk for report in heard for chunk in report.written)
    files = {name: entry for report in heard for name, entry in report.files.items()}
    index = ChunkIndex(tensors)
    text = index.to_json()
    files[CHUNKS] = FileEntry(len(text), HASH, len(text))
    manifest = Manifest(files, {}, identity=index.identity(files)).to_json()
    result["commit"] = clock.lap()
    result["tensors"] = sum(map(len, tensors.values()))
    result["chunks"] = sum(len(entry.layout.shards) for entries in tensors.values() for entry in entries.values())
    result["bytes"] = len(text) + len(manifest)
    result["header"] = sum(header.values())

    clock.lap()
    read = ChunkIndex.read(text, Manifest.from_json(manifest, "manifest.json"), CHUNKS)
    for entry in read.tensors[MODEL].values():
        mine = chunk_of(entry.shape, count // 2, count)
        if mine is not None:
            assert [shard.chunk for shard in entry.layout.overlapping(mine)] == [mine]
    result["open"] = clock.lap()
    dist.destroy_process_group()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=16_384, help="processes")
    most = parser.parse_args().most
    columns = ("plan", "hear", "commit", "open")
    print("| model | ranks | chunks | " + " | ".join(columns) + " | a report | manifest, chunks.json | headers of each |")
    print("|---" * 10 + "|")
    for size in SIZES:
        for count in (8, 64, 512, 4096, 16_384):
            if count <= most:
                r = simulate(size, count)
                seconds = " | ".join(f"{r[column]:.2f} s" for column in columns)
                sizes = f"{r['report'] / 1e3:.1f} kB | {r['bytes'] / 1e6:.1f} MB | {r['header'] / 1e3:.0f} kB"
                print(f"| {size} | {count:,} | {r['chunks']:,} | {seconds} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
