"""What the benchmarks share: variants in turn, progress, medians, ratios, peaks of memory, and results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def compute_dtype() -> torch.dtype:
    """What this machine's CPU computes fastest: bf16 where it has instructions for it, else fp32 (bf16 takes hours there)."""
    from onym.train.precision import choose_compute

    return choose_compute("cpu", "auto").dtype


def rounds(count: int) -> Iterator[int]:
    """The numbers of rounds; on standard error, how far it is and how long it will take."""
    began = time.monotonic()
    for number in range(count):
        yield number
        left = (time.monotonic() - began) / (number + 1) * (count - number - 1)
        print(f"  round {number + 1} of {count}, about {left / 60:.1f} min left", file=sys.stderr, flush=True)


def alternate(
    variants: dict[str, Callable[[], object]], turns: int, after: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each variant, round by round, in an order that turns; ``after`` each one is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in rounds(turns):
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
    begin_peak()
    before = _status("VmRSS")
    run()
    return peak_mib() - before / 1024


def begin_peak() -> None:
    """From now on, the peak of this process's memory counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory that this process had in use, since its begin or since :func:`begin_peak`."""
    return _status("VmHWM") / 1024


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def ask(process: subprocess.Popen[str], what: int | str) -> dict[str, Any]:
    """Let a child that waits take so many steps, or do what else it knows; its answer."""
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def save_results(name: str, results: dict[str, object]) -> None:
    """Write what was measured, with the machine, to ``bench/results``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What it was measured on, and when."""
    return {
        "processor": next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
        ),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }
