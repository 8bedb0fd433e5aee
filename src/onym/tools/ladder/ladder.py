"""The book's ladder on this machine: one technique added at a time, and what each is worth here.

1. A rung adds its technique to those of the rungs below it. One that cannot apply, or fails, says why, and the rungs above do
   without it.
2. Each runs in a process of its own (:mod:`onym.tools.ladder.process`), and is measured in turns with the rung before,
   which is still alive: this one, that one, that one, this one. Its factor is the median over pairs of turns, so what else the
   machine does meets both; its tokens a second are the median of its own turns; the total is the product of the factors.
3. The time left is divided anew at each rung, so all of them together stay within it.

Bounds: at most two processes besides this one, one of which computes. Nothing is left of them, whatever ends the ladder.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from onym.errors import ConfigError
from onym.gpt.config import GPTConfig
from onym.tools.ladder.model import Technique
from onym.tools.ladder.process import RungFailed, Setting, command_of
from onym.train.display import Activity, Display
from onym.train.fresh_process import FreshProcess, ProcessFailed, TimedOut
from onym.train.metering import Peak, peak_of, training_flops_per_token
from onym.train.precision import Compute
from onym.units import format_size

BOOK_VOCABULARY = 50257
CPU_VOCABULARY = 12_241
"""For the preset mini: its head has 31 % of the weights, as GPT-2 small's has, and the ladder stays within minutes
on two cores. Like 50,257 it is 17 more than a multiple of 64."""

_TURN = 0.5  # seconds at least; a turn of short steps has several
_MOST_STEPS = 50  # in a turn
_MOST_PAIRS, _FEWEST_PAIRS = 9, 2
_RESERVE = 0.9  # fraction of a rung's time after which no further pair of turns begins


@dataclass(frozen=True)
class Rung:
    """One step up."""

    title: str
    """At most 20 characters, so that the table fits; ``{batch}`` and ``{larger}`` are filled in."""
    changes: str
    technique: Technique | None
    """What it adds; the first adds nothing."""
    a100: int | None
    """Tokens a second on the book's A100: GPT-2 124M, context 1024, torch 2.6 (ch05/10_llm-training-speed)."""
    weight: int = 1
    """Its part of the time; what compiles needs more."""
    needs_nvidia: str = ""
    """Why it needs an NVIDIA GPU, where it does."""

    def why_not(self, compute: Compute) -> str | None:
        """The reason why it cannot apply to a machine, or None."""
        if self.needs_nvidia and compute.device.type != "cuda":
            return f"{self.needs_nvidia}, and the {compute.device.type.upper()} computes here"
        if self.technique == "tf32" and torch.cuda.get_device_capability(compute.device) < (8, 0):
            return "this GPU has no TF32, which came with the Ampere generation"
        if self.technique == "bf16" and compute.dtype != torch.bfloat16:
            return "this machine has no bf16 arithmetic; emulated, it would be slower than fp32"
        return None


RUNGS = (
    Rung(
        "book's first script",
        "fp32; q, k and v apart; a stored mask; norms and GELU by their formulas; AdamW, not fused",
        None,
        12_525,
    ),
    Rung("mask made on the fly", "no mask is stored", "mask", 12_526),
    Rung("TF32 tensor cores", "fp32 products in TF32", "tf32", 27_648, needs_nvidia="TF32 is a mode of NVIDIA's GPUs"),
    Rung("fused AdamW", "the optimizer's update in one operation", "fused", 28_399),
    Rung(
        "pinned memory",
        "batches in pinned memory, copied while the GPU computes",
        "pinned",
        28_402,
        needs_nvidia="pinned memory speeds up copies to an NVIDIA GPU",
    ),
    Rung("bf16 compute", "bf16 compute over fp32 weights, by autocast; the book's weights are bf16", "bf16", 45_486),
    Rung("torch's norm, GELU", "torch's LayerNorm and GELU", "norm", 55_256),
    Rung("fused attention", "scaled_dot_product_attention; q, k and v from one product", "attention", 91_901),
    Rung("torch.compile", "the model compiled, in place", "compile", 112_046, weight=3),
    Rung("padded vocabulary", "the vocabulary padded to a multiple of 64", "padding", 127_345, weight=3),
    Rung("batch {batch} to {larger}", "more sequences in a step", "batch", 142_156, weight=4),
    Rung("onym train's step", "Onym's model and step: gradient clipping and the guard included", "onym", None, weight=5),
)


@dataclass(frozen=True)
class Figure:
    """What became of a rung."""

    number: int
    title: str
    changes: str
    reason: str = ""
    """Why there is no figure; empty where there is one."""
    tokens_per_second: float | None = None
    factor: float | None = None
    """To the last rung with a figure; None at the first."""
    total: float | None = None
    """To the first rung."""
    memory_bytes: int | None = None
    """At the peak: of the whole process on a CPU, of what torch allocated on a GPU."""
    utilisation: float | None = None
    """Share of the machine's operations a second that the model's products take."""
    pairs: int = 0
    """Pairs of turns it was measured in."""
    a100_tokens_per_second: int | None = None
    a100_factor: float | None = None
    a100_total: float | None = None


@dataclass(frozen=True)
class Ladder:
    """All figures, and what they were measured with."""

    machine: str
    config: GPTConfig
    batch_size: int
    peak: Peak
    seconds: float
    figures: tuple[Figure, ...]

    @property
    def largest_gain(self) -> Figure | None:
        """The rung that is worth most here, where one is worth anything."""
        gains = [figure for figure in self.figures if (figure.factor or 0) > 1]
        return max(gains, key=lambda figure: figure.factor or 0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "config": self.config.to_dict()}

    def factor_of(self, technique: Technique) -> float | None:
        """What a technique is worth here, where it has a figure."""
        number = next(number for number, rung in enumerate(RUNGS, 1) if rung.technique == technique)
        return next((figure.factor for figure in self.figures if figure.number == number), None)


class OutOfTime(RungFailed):
    """The process may be well, but has not answered in time."""


class RungProcess:
    """A rung's process, which takes steps in turns. Always close it.

    Its methods raise a :class:`RungFailed` where there is no answer before ``deadline``, of :func:`time.monotonic`.
    """

    def __init__(self, setting: Setting) -> None:
        self._process = FreshProcess(command_of(setting))
        self._tokens = setting.batch_size * setting.config.context_length
        self._steps = 1  # in a turn
        self.memory = 0
        """Bytes, the most that it had so far."""
        self.alive = True
        self.turns: list[float] = []
        """Tokens a second of each turn so far."""
        self.close = self._process.close

    def warm_up(self, deadline: float) -> None:
        """Wait until it has compiled and taken its first steps."""
        seconds = self._answer(deadline)["ready"]
        self._steps = max(1, min(_MOST_STEPS, math.ceil(_TURN / max(seconds, 1e-6))))

    def turn(self, deadline: float) -> float:
        """Take the steps of a turn; returns its tokens a second."""
        self._process.send(str(self._steps))
        answer = self._answer(deadline)
        self.memory = int(answer["memory"])
        self.turns.append(self._tokens / answer["seconds"])
        return self.turns[-1]

    def _answer(self, deadline: float) -> dict[str, Any]:
        try:
            answer = self._process.receive(deadline) or {"failed": "its process ended without an answer"}
        except TimedOut:
            raise OutOfTime("not done in its part of the time: give more --minutes") from None
        except ProcessFailed as failed:
            raise RungFailed(str(failed)) from failed
        if "failed" in answer:
            raise RungFailed(str(answer["failed"]))
        return answer


def climb(
    config: GPTConfig, batch_size: int, compute: Compute, minutes: float, display: Display, *, rungs: Sequence[Rung] = RUNGS
) -> Ladder:
    """Measure every rung.

    Args:
        config: shape of the model; its head is a matrix of its own, as the book's is.
        batch_size: sequences in a step, below the rung that takes more.
        compute: the device, and the dtype that ``onym train`` would take here.
        minutes: within which it ends.
        display: gets a line a rung.

    Raises:
        ConfigError: the first rung has no figure, so there is nothing to compare with.
    """
    config = replace(config, tie_embeddings=False, qkv_bias=False, drop_rate=0.0)
    began, peak = time.monotonic(), peak_of(compute)
    end = began + 60 * minutes
    figures: list[Figure] = []
    setting = Setting(config, batch_size, str(compute.device), ())
    before: RungProcess | None = None
    last_a100 = None
    try:
        for number, rung in enumerate(rungs, 1):
            candidate, reason = setting, rung.why_not(compute)
            if rung.technique is not None:
                candidate = replace(setting, techniques=(*setting.techniques, rung.technique))
            if rung.technique == "batch" and reason is None:
                larger, reason = _larger_batch(batch_size, before, compute.device)
                candidate = replace(candidate, batch_size=larger)
            larger = candidate.batch_size if candidate.batch_size > batch_size else 4 * batch_size
            title = rung.title.format(batch=batch_size, larger=larger)
            figure = Figure(number, title, rung.changes)
            if rung.a100 is not None:
                factor_there, total_there = (rung.a100 / of if of else None for of in (last_a100, rungs[0].a100))
                figure = replace(figure, a100_tokens_per_second=rung.a100, a100_factor=factor_there, a100_total=total_there)
                last_a100 = rung.a100
            label = f"{number:>2} {title}"
            if reason is not None:
                figures.append(replace(figure, reason=reason))
                display.note(f"{label}: skipped: {reason}")
                continue
            weights = [each.weight for each in rungs[number - 1 :] if each.why_not(compute) is None]
            share = (end - time.monotonic()) * rung.weight / sum(weights)
            with display.activity(label) as activity:
                try:
                    live, factor = _attempt(candidate, before, share, end, activity)
                except RungFailed as failed:
                    figures.append(replace(figure, reason=str(failed)))
                    activity.result = f"skipped: {failed}"
                    if before is None:
                        break
                    continue
                if before is not None:
                    before.close()
                setting, before = candidate, live
                last_total = next((each.total for each in reversed(figures) if each.total is not None), 1.0)
                figure = replace(
                    figure,
                    tokens_per_second=median(live.turns),
                    factor=factor,
                    total=last_total * (factor or 1.0),
                    memory_bytes=live.memory or None,
                    pairs=len(live.turns),
                )
                figures.append(figure)
                activity.result = f"{figure.tokens_per_second:,.0f} tokens/s"
                # Where it is measured, the best of several moments: at a single one the machine may have been busy elsewhere.
                peak = max(peak, peak_of(compute), key=lambda each: each.flops)
                if factor is not None:
                    activity.result += f", {factor:.2f} times the rung before"
    finally:
        if before is not None:
            before.close()
    if before is None:
        raise ConfigError(f"The first rung has no figure, so there is nothing to compare with: {figures[-1].reason}.")
    per_token = training_flops_per_token(config) / peak.flops  # seconds of the peak that a token takes
    used = tuple(replace(each, utilisation=(each.tokens_per_second or 0) * per_token or None) for each in figures)
    return Ladder(_machine(compute), config, batch_size, peak, time.monotonic() - began, used)


def _attempt(
    setting: Setting, before: RungProcess | None, share: float, end: float, report: Activity
) -> tuple[RungProcess, float | None]:
    """Start a process and measure it in turns with the one before, until its part of the time is used.

    Args:
        share: seconds from now; building and compiling may borrow half of what the others have.
        end: of the ladder, of :func:`time.monotonic`.

    Returns:
        The process, alive, and its factor to the one before.

    Raises:
        RungFailed: it has not a single turn; nothing is left of it.
    """
    now = time.monotonic()
    if end - now < 1:
        raise RungFailed("no time was left: give more --minutes")
    share_ends = now + _RESERVE * share
    latest = (now + share + end) / 2
    try:
        live = RungProcess(setting)
    except OSError as error:
        raise RungFailed(f"its process did not start: {error.strerror}") from error
    try:
        report("building and warming up", 0, 0)
        live.warm_up(latest)
        factors: list[float] = []
        started = time.monotonic()
        while len(live.turns) < _MOST_PAIRS:
            now, number = time.monotonic(), len(live.turns)
            took = (now - started) / max(1, number)  # by a pair of turns
            if number and now + took > (latest if number < _FEWEST_PAIRS else share_ends):
                break
            report(f"turn {number + 1} of at most {_MOST_PAIRS}", number, _MOST_PAIRS)
            that = _turn_of(before, end) if number % 2 else None
            this = live.turn(end)
            that = that or _turn_of(before, end)
            if that is not None:
                factors.append(this / that)
    except BaseException as error:
        if not (isinstance(error, OutOfTime) and live.turns):
            live.close()
            raise
    if before is not None and not factors:
        factors = [median(live.turns) / median(before.turns)]
    return live, median(factors) if factors else None


def _turn_of(before: RungProcess | None, end: float) -> float | None:
    """A turn of the rung before; None where it does not live any more: the rungs above are then measured without."""
    if before is not None and before.alive:
        try:
            return before.turn(end)
        except RungFailed:
            before.alive = False
    return None


def _larger_batch(batch_size: int, before: RungProcess | None, device: torch.device) -> tuple[int, str | None]:
    """Four times as many sequences, or twice; or the reason why not.

    The rung above needs as much again while this one is still alive. That all of a process grows with the batch is more than
    true, and wrong on the safe side: a system short of memory ends programs of its own choice.
    """
    free, used = _free_memory(device), before.memory if before is not None else 0
    for times in (4, 2):
        if free is None or 2 * times * used <= free:
            return times * batch_size, None
    why = f"two processes that take {format_size(2 * used)} each may not fit into the {format_size(free or 0)} that are free"
    return batch_size, why


def _free_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # what a container may have; "max" where it has no limit
        limit, current = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(limit - current)
    return min(found, default=None)


def _machine(compute: Compute) -> str:
    if compute.device.type == "cuda":
        return torch.cuda.get_device_name(compute.device)
    return f"{compute.device.type.upper()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
