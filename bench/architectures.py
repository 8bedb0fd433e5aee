"""Which kind of model and which recipe learn most: held-out loss at equal tokens, at equal time, and steps to one loss.

    python bench/architectures.py [--steps 800] [--only gpt2 qwen3] [--train ...options of onym train]

Each is a run of the command on the same text in the same order, as large in weights and in products, one after the other on an
idle machine. The loss to reach is that of GPT-2 with its recipe, which was the default before this table, after all steps; the
others' steps to it are read off their own curves, whose rates have not decayed yet when they get there, which counts against
them. At equal time, llama and qwen3 take as many steps as fit into the time of GPT-2's steps, by the speeds of the first runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import rounds, save_results

NANO = ("--learning-rate", "1e-2")
ONE_RATE = (*NANO, "--muon-learning-rate", "1e-2", "--muon-momentum-warmup", "0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "gpt2": ("--arch", "gpt2"),
    "gpt2, with qwen3's recipe": ("--arch", "gpt2", *NANO, "--muon-learning-rate", "5e-3", "--muon-momentum-warmup", "200"),
    "llama": ("--arch", "llama"),
    "qwen3": ("--arch", "qwen3"),
    "qwen3, one rate": ("--arch", "qwen3", *ONE_RATE),
    "qwen3, no momentum warm-up": ("--arch", "qwen3", "--muon-momentum-warmup", "0"),
    "qwen3, zeros": ("--arch", "qwen3", "--zero-init"),
    "qwen3, tied": ("--arch", "qwen3", "--tie-embeddings", "True"),
}
BASE = "gpt2"
TIMED = ("llama", "qwen3")


def curve(
    options: tuple[str, ...], steps: int, given: argparse.Namespace, folder: str, name: str
) -> tuple[dict[int, float], float]:
    """Held-out losses by step, and tokens a second of the steps alone."""
    command = [sys.executable, "-m", "onym", "train", *options, "--steps", str(steps), "--eval-every", "25"]
    command += ["--runs-dir", folder, "--name", name, "--save-every", "1000000", *given.train]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    rows = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}
    speed = statistics.median(row["tokens_per_second"] for row in rows if row.get("tokens_per_second"))
    print(f"{name:<28} {steps:5} steps  held-out {losses[max(losses)]:.4f}  {speed:8,.0f} tokens/s", flush=True)
    return losses, speed


def steps_to(target: float, losses: dict[int, float]) -> float | None:
    """The first crossing, between two measurements by a straight line."""
    steps = sorted(losses)
    for before, after in itertools.pairwise(steps):
        if losses[after] <= target:
            return before + (after - before) * (losses[before] - target) / (losses[before] - losses[after])
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--save-as", default="architectures")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[])
    given = parser.parse_args()
    names = list(dict.fromkeys([BASE, *given.only]))
    timed = [name for name in TIMED if name in names]
    turns = rounds(len(names) + len(timed))
    with tempfile.TemporaryDirectory() as folder:
        found = {name: curve(VARIANTS[name], given.steps, given, folder, name) for _, name in zip(turns, names, strict=False)}
        same_time = {}
        for name in timed:
            next(turns, None)
            steps = round(given.steps * found[name][1] / found[BASE][1])
            same_time[name] = steps, curve(VARIANTS[name], steps, given, folder, f"{name}, equal time")[0][steps]
    target = found[BASE][0][given.steps]
    print(f"\n{BASE} reaches {target:.4f} after {given.steps} steps")
    results = {}
    for name, (losses, speed) in found.items():
        needed = steps_to(target, losses)
        said = f"{given.steps / needed:.2f} times fewer steps" if needed else "not reached"
        print(f"{name:<28} {losses[given.steps]:.4f} at equal tokens; {needed or float('nan'):5.0f} steps to that: {said}")
        results[name] = {"losses": losses, "tokens_per_second": speed, "steps_to_base": needed}
    for name, (steps, loss) in same_time.items():
        print(f"{name:<28} {loss:.4f} at equal time ({steps} steps)")
    save_results(given.save_as, {"steps": given.steps, "options": given.train, "runs": results, "equal_time": same_time})


if __name__ == "__main__":
    main()
