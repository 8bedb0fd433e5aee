"""What ``torch.compile`` does on this machine: tried in a fresh process, with a real step of the nano preset.

1. A tiny module is compiled: does it work at all?
2. Steps of the nano preset are timed, not compiled.
3. The same model is compiled, and steps of both are timed in turn.

The process answers with each result as soon as it has it, so one that takes too long, or dies, has sent the earlier ones. Its
compiler cache is a new, empty folder: the time is what the first run pays, and what an earlier run compiled cannot hide a
compiler that does not work.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onym.compile.in_place import compile_in_place
from onym.data.batches import Batch
from onym.gpt.kinds import arch_of, config_of
from onym.gpt.models import make_model
from onym.train.dry_run import prepare
from onym.train.fresh_process import FreshProcess, ProcessFailed, TimedOut, answering, command_of
from onym.train.options import DataOptions, OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper

PRESET = "nano"
_STEPS = 30
_STEPS_FOR = 4.0  # seconds
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class _Tiny(nn.Module):
    """A class of its own: ``torch.compile`` passes over those of ``torch.nn``, such as Sequential, without a word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x * x + 1).sum()


@dataclass(frozen=True)
class Trial:
    """The result; None for what is not known."""

    precision: str
    works: bool | None = None
    reason: str = ""
    """Why it does not work, or why that is not known."""
    tiny_seconds: float | None = None
    """To compile a tiny module."""
    eager_seconds: float | None = None
    """Of a step of the nano preset, not compiled."""
    compiled_seconds: float | None = None
    compile_seconds: float | None = None
    """To compile the nano preset, once."""

    @property
    def factor(self) -> float | None:
        """How many times as fast a compiled step is."""
        return self.eager_seconds / self.compiled_seconds if self.eager_seconds and self.compiled_seconds else None


def try_compiling(device: str, precision: str, *, seconds: float = 55.0) -> Trial:
    """Try it in a fresh process, for so long at most."""
    values: dict[str, Any] = {}
    failure = ""
    parent = os.environ.get(_CACHE)
    parent = parent if parent and Path(parent).is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent, prefix="onym-doctor-", ignore_cleanup_errors=True) as folder:
        command = command_of("onym.tools.doctor.trial", {"device": device, "precision": precision})
        deadline = time.monotonic() + seconds
        with FreshProcess(command, {**os.environ, _CACHE: str(Path(folder) / "cache")}) as process:
            try:
                while (answer := process.receive(deadline)) is not None:
                    values |= answer
            except TimedOut:
                failure = f"not done after {seconds:.0f} s"
                if "works" in values:
                    values["reason"] = f"the nano preset was not compiled after {seconds:.0f} s"
            except ProcessFailed as failed:
                failure = failed.last_line[:160] or f"exit code {failed.code}"
    if "works" not in values:
        values |= {"works": False, "reason": failure}
    return Trial(precision, **values)


def _try(request: dict[str, str], answer: Callable[..., None]) -> None:
    """What the fresh process does."""
    compute = choose_compute(request["device"], request["precision"])
    compute.set_deterministic(False)
    tiny, inputs = _Tiny(), torch.ones(4, 32, device=compute.device, requires_grad=True)
    found = compile_in_place(tiny, "whole", lambda: tiny(inputs).backward())
    answer(works=found.compiled, reason=found.reason, tiny_seconds=found.seconds if found.compiled else None)

    options, config = OptimizationOptions(), config_of(arch_of(PRESET), PRESET, vocab_size=DataOptions().vocab_size)
    tokens = torch.randint(config.vocab_size, (options.batch_size, config.context_length + 1), device=compute.device)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    plain = Stepper(make_model(config).to(compute.device), options, compute)
    prepare(plain, batch, [options.batch_size], "off")
    (eager,) = _step_seconds([plain], batch)
    answer(eager_seconds=eager)
    if not found.compiled:
        return
    fast = Stepper(make_model(config).to(compute.device), options, compute)
    compilation, _ = prepare(fast, batch, [options.batch_size], "whole")
    if not compilation.compiled:
        answer(works=False, reason=compilation.reason)
        return
    eager, compiled = _step_seconds([plain, fast], batch)
    answer(eager_seconds=eager, compiled_seconds=compiled, compile_seconds=compilation.seconds)


def _step_seconds(steppers: list[Stepper], batch: Batch) -> list[float]:
    """Medians; of several, steps are taken in turn, so that other load on the machine affects each alike."""
    times: list[list[float]] = [[] for _ in steppers]
    ends = time.perf_counter() + _STEPS_FOR
    while len(times[0]) < 4 or (len(times[0]) < _STEPS and time.perf_counter() < ends):
        for stepper, taken in zip(steppers, times, strict=True):
            start = time.perf_counter()
            stepper(batch, 1e-4, len(taken)).loss.item()  # which waits for a GPU
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[2:]) for taken in times]  # at the first, the optimizer makes its state


if __name__ == "__main__":
    _try(json.loads(sys.argv[1]), answering())
