"""Steps to a held-out loss: Muon against AdamW, the same tokens in the same order.

    python bench/optimizers.py [--preset micro] [--steps 600] [--rates 1e-3 1.5e-3 3e-3]

Each optimizer trains with each learning rate, and its best one counts: another one suits each. The loss to reach is AdamW's at
its end; Muon's steps to it are read off its own curve, between two measurements by a straight line. A run has one schedule, so
Muon's rate has not decayed yet when it gets there, which counts against it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import rounds, save_results


def curve(optimizer: str, rate: float, given: argparse.Namespace, folder: str) -> dict[int, float]:
    name = f"{optimizer}-{rate}"
    command = [
        sys.executable,
        "-m",
        "onym",
        "train",
        "--arch",
        "gpt2",
        "--preset",
        given.preset,
        "--optimizer",
        optimizer,
        "--compile",
        "whole",
    ]
    command += ["--learning-rate", str(rate), "--steps", str(given.steps), "--eval-every", "25", "--runs-dir", folder]
    subprocess.run([*command, "--name", name, "--save-every", "1000000"], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}
    print(f"{optimizer:<6} {rate:8.4f}  held-out {losses[max(losses)]:.4f}", flush=True)
    return losses


def steps_to(target: float, losses: dict[int, float]) -> float:
    """The first crossing; infinite where there is none."""
    steps = sorted(losses)
    for before, after in itertools.pairwise(steps):
        if losses[after] <= target:
            return before + (after - before) * (losses[before] - target) / (losses[before] - losses[after])
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1.5e-3, 3e-3])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = itertools.product(("adamw", "muon"), given.rates)
        curves: dict[str, dict[float, dict[int, float]]] = {"adamw": {}, "muon": {}}
        for _, (name, rate) in zip(rounds(2 * len(given.rates)), runs, strict=True):
            curves[name][rate] = curve(name, rate, given, folder)
    ends = {name: min(each.values(), key=lambda losses: losses[given.steps]) for name, each in curves.items()}
    target = ends["adamw"][given.steps]
    needed = min(steps_to(target, losses) for losses in curves["muon"].values())
    print(
        f"\nAdamW's best end: {target:.4f} after {given.steps} steps; Muon after {needed:.0f}: "
        f"{given.steps / needed:.2f} times fewer"
    )
    save_results(
        "optimizers",
        {"preset": given.preset, "curves": curves, "target_loss": target, "ratio": given.steps / needed, "target": 1.3},
    )


if __name__ == "__main__":
    main()
