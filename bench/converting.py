"""What a conversion costs, in time and memory, against the script that people write for it.

    python bench/converting.py [--preset gpt2-medium] [--rounds 3] [--folder DIR]

The book's model.pth (1.7 GB with its masks) into a folder of transformers, and into clean names. The script loads everything,
changes the dict, and saves it with the safetensors library or torch.save: no check of what it reads, no flush, nothing read
back. Onym's conversion does all of this: source checked, written durably, read back, every tensor and the logits compared. Each
is a process of its own; the files are in the page cache. Memory is what is not backed by a file (RssAnon), sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import onym
from _measure import rounds, save_results, table
from onym.convert.write import convert

CHILD = """
import re, pathlib, sys, threading, time, torch
import onym.convert.write, safetensors.torch
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
before, most, done = anonymous(), 0.0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
done = True
thread.join()
print(seconds, most - before)
"""
SCRIPT = """
state = torch.load("book.pth", weights_only=True)
state = {name.removeprefix("_orig_mod."): value for name, value in state.items() if not name.endswith("mask")}
"""
VARIANTS = {
    "a script: torch.load, rename, torch.save": SCRIPT + 'torch.save(state, "out.pth")',
    "onym convert book.pth out.pth": 'onym.convert.write.convert("book.pth", "out.pth")',
    "a script: torch.load, transpose, save_file": SCRIPT
    + """
out = {}
for name, value in state.items():
    if "W_key" in name or "W_value" in name:
        continue
    if "W_query" in name:
        value = torch.cat([state[name.replace("W_query", part)] for part in ("W_query", "W_key", "W_value")])
    out[name] = value.t().contiguous() if value.dim() == 2 and "trf_blocks" in name else value
safetensors.torch.save_file(out, "out.safetensors")
""",
    "onym convert book.pth out --to huggingface": 'onym.convert.write.convert("book.pth", "out", to="huggingface")',
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="gpt2-medium")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        place = Path(folder)
        model = onym.GPT(onym.GPTConfig.preset(given.preset, tie_embeddings=False))
        largest = max(value.nbytes for value in model.state_dict().values()) / 2**20
        onym.save(model, place / "ours.safetensors")
        del model
        convert(place / "ours.safetensors", place / "book.pth", to="book")
        (place / "ours.safetensors").unlink()
        size = (place / "book.pth").stat().st_size / 1e9
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        memory: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in rounds(given.rounds):
            for name in list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS)):
                program = CHILD.format(statement=VARIANTS[name])
                done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=True)
                took, needed = map(float, done.stdout.split()[-2:])
                seconds[name].append(took)
                memory[name].append(needed)
                subprocess.run(["rm", "-rf", "out", "out.pth", "out.safetensors"], cwd=place, check=True)
        ratios = table(f"{size:.2f} GB, {given.preset}", seconds, next(iter(VARIANTS)))
        for name, peaks in memory.items():
            print(f"  {name:<52} {max(peaks):9.0f} MiB at most (largest tensor {largest:.0f} MiB)")
        save_results(
            "converting", {"gigabytes": size, "seconds": seconds, "ratios": ratios, "peak_mib": memory, "largest_mib": largest}
        )


if __name__ == "__main__":
    main()
