"""The Runs page of ``onym serve``: seconds until the first and the next list, and until the first and the next curves.

    python bench/serving_runs.py [--runs 1000] [--rows 1000] [--long 1000000]

The answers are made as the server makes them, JSON included, without HTTP.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _measure import save_results
from onym.serve.json_body import to_json
from onym.serve.run_folders import ServedRuns
from onym.serve.run_store import RunStore
from onym.train.options import TrainOptions
from onym.train.run_folder import FINISHED, RUNNING, RunFolder


def make_run(folder: Path, rows: int, status: str = FINISHED) -> None:
    """A run with so many rows in metrics.jsonl, as ``onym train`` writes them; every tenth one is an evaluation."""
    drawn = random.Random(folder.name)
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    with run.metrics.open("w", encoding="utf-8") as file:
        for number in range(rows):
            loss = round(3 + 7 / (1 + number / 50) + drawn.random() / 10, 6)
            row = {"step": number * 10, "tokens": number * 20_480, "train_loss": loss, "grad_norm": round(drawn.random(), 6)}
            row |= {"lr": 0.001 / (1 + number), "tokens_per_second": round(9e4 + drawn.random() * 1e3, 1), "data_wait": 0.00012}
            row |= {"seconds": round(number * 1.234, 3), **({"val_loss": round(loss + 0.1, 6)} if number % 10 == 0 else {})}
            file.write(json.dumps(row) + "\n")
    about = {"held_out": 3.1, "best": 3.1, "best_step": rows, "step": rows * 10, "steps": rows * 10, "parameters": 124_000_000}
    run.describe(TrainOptions(), status, **about)


def seconds_of(ask: Callable[[], object]) -> tuple[float, int]:
    """How long an answer takes, and its bytes."""
    start = time.perf_counter()
    length = len(to_json(ask()))
    return time.perf_counter() - start, length


def measure(folder: Path, runs: int, rows: int, long: int) -> dict[str, float]:
    """Make the runs, and print what each answer takes."""
    for number in range(runs):  # every tenth was killed: its run.json does not know its best loss
        make_run(folder / f"run-{number:04d}", rows, RUNNING if number % 10 == 0 else FINISHED)
    make_run(folder / "long", long, RUNNING)
    store = RunStore(ServedRuns(folder, alone=False))
    answers: dict[str, Callable[[], object]] = {
        "first list": lambda: store.list_runs(),
        "second list": lambda: store.list_runs(),
        f"first curves, {rows:,} rows": lambda: store.metrics("run-0001"),
        f"second curves, {rows:,} rows": lambda: store.metrics("run-0001"),
        f"first curves, {long:,} rows": lambda: store.metrics("long"),
        f"second curves, {long:,} rows": lambda: store.metrics("long"),
        f"zoomed curves, {long:,} rows": lambda: store.metrics("long", "seconds", 1500, long * 0.3, long * 0.4),
    }
    print(f"{runs:,} runs of {rows:,} rows, and one of {long:,}")
    results = {}
    for name, ask in answers.items():
        results[name], length = seconds_of(ask)
        print(f"  {name:<36} {results[name]:8.3f} s  {length / 1e3:10.1f} kB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--long", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), given.runs, given.rows, given.long)
    save_results(Path(__file__).stem, results)


if __name__ == "__main__":
    sys.exit(main())
