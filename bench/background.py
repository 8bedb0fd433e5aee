"""What checkpoints cost: throughput of training with one at every 50th step, written in the background, against none.

    python bench/background.py [--rounds 3] [--preset mini] [--steps 100]

Each is `onym train` in a process of its own on the text that Python carries, in turn, from the same warm caches. The time is
that of the loop between step 10 and the last, by the clock of metrics.jsonl, with the copy, the writing thread and its
fsyncs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import rounds, save_results, table

VARIANTS = {"no checkpoint": 10**9, "every 50 steps, in the background": 50}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        for number in rounds(1 + given.rounds):  # the first one fills the caches
            for variant in list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS)):
                run = Path(name, f"{number}-{VARIANTS[variant]}")
                command = [
                    sys.executable,
                    "-m",
                    "onym",
                    "train",
                    "--arch",
                    "gpt2",
                    "--preset",
                    given.preset,
                    "--compile",
                    "whole",
                    "--optimizer",
                    "adamw",
                ]
                command += ["--steps", str(given.steps + 10), "--save-every", str(VARIANTS[variant]), "--log-every", "10"]
                command += ["--eval-every", "100000", "--eval-batches", "1", "--runs-dir", str(run.parent), "--name", run.name]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                clock = {row["step"]: row["seconds"] for row in rows}
                if number > 0:
                    seconds[variant].append(clock[given.steps] - clock[10])
    ratios = table(f"{given.steps - 10} steps of {given.preset}", seconds, "no checkpoint")
    save_results("background", {"preset": given.preset, "seconds": seconds, "ratios": ratios, "target": 0.95})


if __name__ == "__main__":
    main()
