"""What ``torch.compile`` does on this machine: tried in a fresh process, with a real step of the nano preset.

1. A tiny module is compiled: does it work at all?
2. Steps of the nano preset are timed, not compiled.
3. The same model is compiled, and steps of both are timed in turn.

The process tells each result as soon as it has it, so that one that takes too long, or dies, has told the earlier ones. Its
compiler cache is a new, empty folder: the time is what the first run pays, and what an earlier run compiled cannot hide a
compiler that does not work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onym.compile.in_place import compile_in_place
from onym.data.batches import Batch
from onym.gpt.config import GPTConfig
from onym.gpt.gpt2 import GPT
from onym.train.dry_run import prepare
from onym.train.options import DataOptions, OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper

PRESET = "nano"
_STEPS = 30
_STEPS_FOR = 4.0  # seconds
_DYING = 3.0  # seconds that are waited at most for processes that were killed
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class _Tiny(nn.Module):
    """A class of its own: ``torch.compile`` passes over those of ``torch.nn``, such as Sequential, without a word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x * x + 1).sum()


@dataclass(frozen=True)
class Trial:
    """What came of it; None for what was not found out."""

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
    request = json.dumps({"device": device, "precision": precision})
    with tempfile.TemporaryDirectory(
        dir=_existing(os.environ.get(_CACHE)), prefix="onym-doctor-", ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        environment = {**os.environ, _CACHE: str(folder / "cache")}
        command = [sys.executable, "-P", "-m", "onym.tools.doctor.trial", request]
        # Files rather than pipes: torch's own processes hold on to a pipe after the one that is waited for has gone.
        with (folder / "told").open("wb") as told, (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=told, stderr=errors, start_new_session=os.name == "posix"
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        said = (folder / "errors").read_text(errors="replace").strip().splitlines()
        return _read((folder / "told").read_text(errors="replace"), code, said, precision, seconds)


def _existing(folder: str | None) -> str | None:
    return folder if folder and Path(folder).is_dir() else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever became of it, neither the process nor a compiler that it started goes on."""
    with contextlib.suppress(OSError):
        if sys.platform != "win32":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    # What it has started is dying, and may still write where the folder is about to be removed.
    until = time.monotonic() + _DYING
    with contextlib.suppress(OSError):
        while sys.platform != "win32" and time.monotonic() < until:
            os.killpg(process.pid, 0)  # an error once nobody is left
            time.sleep(0.01)


def _read(told: str, code: int | None, errors: list[str], precision: str, seconds: float) -> Trial:
    values: dict[str, Any] = {}
    for line in told.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a line that was cut off, or is not ours
            values |= {key: value for key, value in dict(json.loads(line)).items() if key in Trial.__dataclass_fields__}
    if "works" not in values:
        values["works"] = False
        values["reason"] = f"not done after {seconds:.0f} s" if code is None else (errors or [f"exit code {code}"])[-1][:160]
    elif code is None:
        values["reason"] = f"the nano preset was not compiled after {seconds:.0f} s"
    return Trial(**{**asdict(Trial(precision)), **values})


def _try(request: dict[str, str]) -> None:
    """What the fresh process does."""
    compute = choose_compute(request["device"], request["precision"])
    compute.set_deterministic(False)
    tiny, inputs = _Tiny(), torch.ones(4, 32, device=compute.device, requires_grad=True)
    found = compile_in_place(tiny, "whole", lambda: tiny(inputs).backward())
    _tell(works=found.compiled, reason=found.reason, tiny_seconds=found.seconds if found.compiled else None)

    options, config = OptimizationOptions(), GPTConfig.preset(PRESET, vocab_size=DataOptions().vocab_size)
    tokens = torch.randint(config.vocab_size, (options.batch_size, config.context_length + 1), device=compute.device)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    plain = Stepper(GPT(config).to(compute.device), options, compute)
    prepare(plain, batch, [options.batch_size], "off")
    (eager,) = _step_seconds([plain], batch)
    _tell(eager_seconds=eager)
    if not found.compiled:
        return
    fast = Stepper(GPT(config).to(compute.device), options, compute)
    compilation, _ = prepare(fast, batch, [options.batch_size], "whole")
    if not compilation.compiled:
        _tell(works=False, reason=compilation.reason)
        return
    eager, compiled = _step_seconds([plain, fast], batch)
    _tell(eager_seconds=eager, compiled_seconds=compiled, compile_seconds=compilation.seconds)


def _step_seconds(steppers: list[Stepper], batch: Batch) -> list[float]:
    """Medians; of several, steps are taken in turn, so that what else the machine does weighs on each alike."""
    times: list[list[float]] = [[] for _ in steppers]
    ends = time.perf_counter() + _STEPS_FOR
    while len(times[0]) < 4 or (len(times[0]) < _STEPS and time.perf_counter() < ends):
        for stepper, taken in zip(steppers, times, strict=True):
            start = time.perf_counter()
            stepper(batch, 1e-4, len(taken)).loss.item()  # which waits for a GPU
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[2:]) for taken in times]  # at the first, the optimizer makes its state


def _tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    _try(json.loads(sys.argv[1]))
