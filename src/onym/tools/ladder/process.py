"""A rung of the ladder in a process of its own, which takes steps when it is asked to.

Two of them live at a time, the rung before and the one that is measured, and take turns, so that whatever else the machine does
meets both; only one of them computes at a time. A process of its own gives each rung its own peak of memory, its own settings
of torch, and an end that is no one else's.

The parent writes a number of steps in a line, the process answers each with a line of JSON:

    {"ready": seconds of a step}    once it is built, compiled and warm
    {"seconds": of a step, "memory": bytes at the peak so far}
    {"failed": why}    and ends

It ends when its standard input does, so no process remains however the parent ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from onym.compile.in_place import compile_in_place
from onym.data.batches import Batch
from onym.errors import is_out_of_memory
from onym.gpt.config import GPTConfig
from onym.gpt.gpt2 import GPT
from onym.gpt.hardware import synchronize
from onym.tools.ladder.model import LadderModel, Technique
from onym.train import fresh_process
from onym.train.dry_run import prepare
from onym.train.fresh_process import answering
from onym.train.metering import memory_in_use
from onym.train.options import OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper

OUT_OF_MEMORY = "out of memory: lower --batch-size or --context-length"
_BATCHES = 4  # of random tokens, used in turn
_WARM_UP = 2  # steps after the first one, which compiles and allocates
_RATE = 5e-4


@dataclass(frozen=True)
class Setting:
    """What a process trains, and how."""

    config: GPTConfig
    batch_size: int
    device: str
    techniques: tuple[Technique, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the command line of the process."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Setting:
        """Read what :meth:`to_dict` gave."""
        return cls(**{**values, "config": GPTConfig(**values["config"]), "techniques": tuple(values["techniques"])})


class RungFailed(Exception):
    """A rung that has no figure; the text says why."""


def command_of(setting: Setting) -> list[str]:
    """What starts the process of a rung."""
    return fresh_process.command_of("onym.tools.ladder.process", setting.to_dict())


def build(setting: Setting) -> Callable[[], object]:
    """A function that takes one step, compiled where it is to be.

    Raises:
        RungFailed: compiling does not work here.
    """
    torch.manual_seed(0)
    if "tf32" in setting.techniques:
        torch.set_float32_matmul_precision("high")
    take = _onym_step if "onym" in setting.techniques else _plain_step
    step, batches, numbers = take(setting), _batches(setting), itertools.count(1)
    return lambda: step(batches[(number := next(numbers)) % _BATCHES], number)


def _batches(setting: Setting) -> list[Batch]:
    shape, vocabulary = (setting.batch_size, setting.config.context_length), setting.config.vocab_size
    batches = [(torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)) for _ in range(_BATCHES)]
    return [(x.pin_memory(), y.pin_memory()) for x, y in batches] if "pinned" in setting.techniques else batches


def _plain_step(setting: Setting) -> Callable[[Batch, int], object]:
    """The book's loop: forward, backward, AdamW over all parameters."""
    compute = choose_compute(setting.device, "bf16" if "bf16" in setting.techniques else "fp32")
    model = LadderModel(setting.config, setting.techniques).to(compute.device)
    # None leaves the choice to torch, which takes foreach on a GPU and a loop over the parameters on a CPU.
    fused = True if "fused" in setting.techniques else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1, fused=fused)
    pinned = "pinned" in setting.techniques

    def backward(batch: Batch) -> None:
        tokens, targets = (each.to(compute.device, non_blocking=pinned) for each in batch)
        with compute.autocast():
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()

    def step(batch: Batch, _: int) -> None:
        optimizer.zero_grad()
        backward(batch)
        optimizer.step()

    if "compile" in setting.techniques:
        first = _batches(setting)[0]
        compilation = compile_in_place(model, "whole", lambda: backward(first), reraise=is_out_of_memory)
        if not compilation.compiled:
            raise RungFailed(f"torch.compile does not work here: {compilation.reason}")
    return step


def _onym_step(setting: Setting) -> Callable[[Batch, int], object]:
    """As ``onym train`` takes it: precision and compilation as it chooses, clipping, the guard."""
    compute = choose_compute(setting.device, "auto")
    compute.set_deterministic(False)
    model = GPT(setting.config).to(compute.device)
    options = OptimizationOptions(batch_size=setting.batch_size, optimizer="adamw")  # as the rungs below
    stepper = Stepper(model, options, compute)

    def moved(batch: Batch) -> Batch:
        return batch[0].to(compute.device, non_blocking=True), batch[1].to(compute.device, non_blocking=True)

    prepare(stepper, moved(_batches(setting)[0]), [setting.batch_size], "whole")
    return lambda batch, number: stepper(moved(batch), 1e-3, number)


def _peak_memory(device: torch.device) -> int:
    """Bytes, the most so far: of this process on a CPU, torch, Python and the compiler included; allocated on a GPU."""
    if device.type == "cuda" or sys.platform == "win32":
        return memory_in_use(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(setting: Setting, answer: Callable[..., None], asked: Callable[[], int]) -> None:
    device = torch.device(setting.device)
    step = build(setting)

    def turn(steps: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)  # once a turn: waiting for each step would take the overlap from the GPU
        return (time.perf_counter() - start) / steps

    turn(1)
    answer(ready=turn(_WARM_UP))
    while True:
        answer(seconds=turn(asked()), memory=_peak_memory(device))


def main() -> None:
    """What the process does."""
    answer = answering()
    requests: queue.Queue[int] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(int(line))
        os._exit(0)  # the parent has gone; a step or a compilation may be under way

    threading.Thread(target=listen, daemon=True).start()
    setting = Setting.from_dict(json.loads(sys.argv[1]))
    if setting.device == "cpu":
        # Inductor's pool of compiling processes, still starting up, would compute beside the first turns: on two cores that
        # made them a hundred times slower. Compiling takes no longer without (34 s against 38 s).
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    try:
        _serve(setting, answer, requests.get)
    except RungFailed as failed:
        answer(failed=str(failed))
    except Exception as error:  # whatever a rung can raise must not cost the user the ladder
        first = (str(error).strip().splitlines() or [""])[0][:160]
        answer(failed=OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {first}")


if __name__ == "__main__":
    main()
