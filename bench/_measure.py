"""What the benchmarks share: variants in turn, medians, ratios, peaks of memory, and results kept as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(
    variants: dict[str, Callable[[], object]], rounds: int, after: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each variant, round by round, in an order that turns; ``after`` each one is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
            after()
    return seconds


def table(title: str, seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Print medians, their spread, and how many times as fast as ``base`` each is; returns those ratios."""
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    print(f"\n{title}")
    for name, median in medians.items():
        spread = f"{min(seconds[name]) * 1e3:8.1f} .. {max(seconds[name]) * 1e3:.1f}"
        print(f"  {name:<52} {median * 1e3:9.1f} ms  ({spread})  {medians[base] / median:6.2f}x as fast", flush=True)
    return {name: medians[base] / median for name, median in medians.items()}


def added_peak(run: Callable[[], object]) -> float:
    """MiB by which memory in use (RSS, file pages included) rose above where it stood, at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def ask(process: subprocess.Popen[str], steps: int) -> dict[str, object]:
    """Let a child that waits take so many steps; its answer."""
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def keep(name: str, results: dict[str, object]) -> None:
    """Write what was measured, with the machine, to ``bench/results``."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
        ),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")
