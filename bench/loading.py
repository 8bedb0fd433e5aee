"""What a verified load costs, against ``torch.load`` + ``load_state_dict`` of the same weights.

    python bench/loading.py [--rounds 9] [--folder DIR]

GPT-2 124M, 0.5 GB, from the page cache. Each load is measured in a process of its own, as it happens when a run is resumed: a
process that has loaded before has memory that it can use again, and torch.load is then twice as fast.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import onym
from _measure import rounds, save_results, table
from onym.format.manifest import MODEL
from onym.format.reader import read_checkpoint
from onym.format.writer import write_folder

CHILD = """
import gc, sys, time, torch, onym
sys.path.insert(0, {bench!r})
from _measure import added_peak
onym.load  # the package imports its parts at first use; the imports of all variants are made before the clock starts
import safetensors.torch
gc.collect()
model = onym.GPT(onym.GPTConfig.preset("gpt2-small", tie_embeddings=True))
def run():
    {statement}
start = time.perf_counter()
peak = added_peak(run)
print(time.perf_counter() - start, peak)
"""
VARIANTS = {
    "torch.load + load_state_dict": 'model.load_state_dict(torch.load("model.pth", weights_only=True))',
    "torch.load(mmap=True) + load_state_dict, unchecked": (
        'model.load_state_dict(torch.load("model.pth", weights_only=True, mmap=True))'
    ),
    "safetensors load_file + load_state_dict, unchecked": (
        'from safetensors.torch import load_file; model.load_state_dict(load_file("model.safetensors"), strict=False)'
    ),
    "onym.load, every byte checked": 'onym.load("model.safetensors", into=model)',
    "onym.load(verify=False)": 'onym.load("model.safetensors", into=model, verify=False)',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as name:
        folder = Path(name)
        model = onym.GPT(onym.GPTConfig.preset("gpt2-small", tie_embeddings=True))
        onym.save(model, folder / "model.safetensors")
        onym.save(model, folder / "model.pth")
        largest = max(parameter.nbytes for parameter in model.parameters()) / 2**20
        del model
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        peaks: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for number in rounds(given.rounds):
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                program = CHILD.format(statement=VARIANTS[variant], bench=str(Path(__file__).parent))
                done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
                took, peak = map(float, done.stdout.split())
                seconds[variant].append(took)
                peaks[variant].append(peak)
        base = "torch.load + load_state_dict"
        results["against torch.load"] = table("0.5 GB into a model:", seconds, base)
        results["peaks, MiB"] = {variant: statistics.median(measured) for variant, measured in peaks.items()}
        print(f"\nmemory added at the peak, mapped file pages included (the largest tensor has {largest:.0f} MiB):")
        for variant, measured in peaks.items():
            print(f"  {variant:<52} {statistics.median(measured):9.0f} MiB")

        write_folder(folder / "many", {MODEL: {f"blocks.{n}.weight": torch.full((16,), float(n)) for n in range(100_000)}}, {})
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert len(read_checkpoint(folder / "many").names) == 100_000
            times.append(time.perf_counter() - start)
        results["open and list 100,000 tensors, s"] = statistics.median(times)
        print(f"\nopening and listing a checkpoint of 100,000 tensors: {statistics.median(times):.2f} s")
    save_results("loading", results)


if __name__ == "__main__":
    main()
