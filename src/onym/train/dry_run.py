"""Before the first step: find the micro-batch that fits into memory, compile if that pays, and run one step without effect.

    for each size of micro-batch, the largest first:
        time a step as the model is written              (--compile auto)
        choose how to compile, compile, and time that
        out of memory: the next size

Whatever is wrong shows here, before training starts. Weights, gradients and random numbers are as before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from onym.compile.in_place import Compilation, How, compile_in_place, forget_compiled, uncompile
from onym.compile.policy import choose, recall, remember
from onym.data.batches import Batch
from onym.errors import LESS_MEMORY, RunError, is_out_of_memory
from onym.gpt.hardware import synchronize
from onym.state.collectives import broadcast_from_rank0
from onym.train.memory import keep_freed_memory, release_gpu_memory, return_freed_memory
from onym.train.step import Stepper

_SLOWER = 1.1  # times the eager time above which compiling is undone; less is noise on a machine with other work

T = TypeVar("T")


def prepare(
    stepper: Stepper, batch: Batch, sizes: Iterable[int], how: How | Literal["auto"], steps: int = 0
) -> tuple[Compilation, float]:
    """Set the stepper's micro-batch, and compile its model.

    Args:
        stepper: about to take its first step.
        batch: one of training, so that shapes are right.
        sizes: of micro-batch, tried in this order until one fits into memory.
        how: to compile; ``"auto"`` for what pays over ``steps`` more steps.

    Returns:
        How it was compiled, and the loss of the batch's first micro-batch.

    Raises:
        RuntimeError: no size fits.
    """
    candidates = list(sizes)
    for size in candidates:
        stepper.micro_batch = size
        try:
            return _DryRun(stepper, batch).compile(how, steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == candidates[-1]:
                raise
            if stepper.sharding is not None and not stepper.sharding.reshard(stepper.model):
                raise
            stepper.model.zero_grad()
        forget_compiled()  # torch compiles the same lines for a few shapes only, and then runs the rest as they are, unsaid
        release_gpu_memory(stepper.compute.device)
        if stepper.compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(stepper.compute.device)  # what is reported is of the size that fits
    raise AssertionError("there is always a size to try")


class _DryRun:
    """Forward and backward passes of one size of micro-batch, without effect."""

    def __init__(self, stepper: Stepper, batch: Batch) -> None:
        self.stepper = stepper
        self.micro_batches = len(batch[0]) // stepper.micro_batch
        self.batch = batch[0][: stepper.micro_batch], batch[1][: stepper.micro_batch]
        # At the second pass the gradients of the first are there: the most memory that a step takes.
        self.passes = min(self.micro_batches, 2)
        self.device = stepper.compute.device
        self.loss = math.nan
        # The size of AdamW's moments: the optimizer's first step must not fail where the dry run did not. A run that is resumed
        # has them already.
        stepped = {parameter for optimizer in stepper.optimizers for parameter in optimizer.state}
        without = [each for each in stepper.model.parameters() if each.requires_grad and each not in stepped]
        self.moments = [torch.empty_like(parameter) for parameter in without for _ in range(2)]

    def compile(self, how: How | Literal["auto"], steps: int) -> tuple[Compilation, float]:
        if self.device.type == "cpu":
            keep_freed_memory()
        compilation = self._compile_if_it_pays(steps) if how == "auto" else self._compile(how)
        self.moments.clear()
        return_freed_memory()
        return compilation, float(self.stepper.ranks.mean(torch.tensor(self.loss, device=self.device)))

    def _compile(self, how: How) -> Compilation:
        model = self.stepper.model
        return self._on_all_ranks(lambda: compile_in_place(model, how, self.run, reraise=is_out_of_memory))

    def _compile_if_it_pays(self, steps: int) -> Compilation:
        self._on_all_ranks(self.run)  # the first allocates
        eager = min(self.seconds(), self.seconds())
        ways: tuple[How, ...] = ("whole", "blocks") if self.stepper.sharding is None else ("blocks",)
        shape = _shape(self.stepper, self.batch[0].shape[1])
        how = broadcast_from_rank0(lambda: choose(steps, eager, self.device.type == "cpu", recall(shape), ways))
        compilation = self._compile(how)
        if not compilation.compiled:
            return compilation if compilation.reason else replace(compilation, eager_seconds=eager)
        compiled = min(self.seconds(), self.seconds())
        compilation = replace(compilation, eager_seconds=eager, compiled_seconds=compiled)
        if self.stepper.ranks.is_rank0:
            remember(shape, compilation)
        if broadcast_from_rank0(lambda: compiled > _SLOWER * eager):
            uncompile(self.stepper.model)
            self.run()  # the loss that is reported is the one of eager steps
            return replace(compilation, how="off", reason="a compiled step takes longer here")
        return compilation

    def run(self) -> None:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for number in range(self.passes):
                loss = self.stepper._loss(self.batch)
                loss.backward()
                self.loss = loss.item() if number == 0 else self.loss
        self.stepper.model.zero_grad()

    def seconds(self) -> float:
        """Of the forward and backward passes of a step."""
        start = time.perf_counter()
        self.run()
        synchronize(self.device)
        return (time.perf_counter() - start) * self.micro_batches / self.passes

    def _on_all_ranks(self, work: Callable[[], T]) -> T:
        """Do what may run out of memory; where it does on one rank, all of them raise."""
        ranks, failure = self.stepper.ranks, None
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if ranks.world_size == 1 or not is_out_of_memory(error):
                raise
            failure = error
            if self.stepper.sharding is not None and not ranks.all_arrive("out-of-memory"):
                raise RunError(
                    f"Process {ranks.rank} of {ranks.world_size} has less memory left than the others, and each has to hold a "
                    f"shard of the model: {LESS_MEMORY}."
                ) from error
        if ranks.max(failure is not None):
            try:
                raise failure or MemoryError("out of memory in another process")
            finally:
                del failure  # see run_on_all_ranks: what failed would stay in memory
        return result


def _shape(stepper: Stepper, window: int) -> dict[str, Any]:
    """What the cost and the gain of compiling depend on; ``window`` is the tokens of a sequence."""
    model, sharding = stepper.model, stepper.sharding
    return {
        **model.config.to_dict(),
        "gradient_checkpointing": model.recompute_activations,
        "micro_batch": stepper.micro_batch,
        **({"parallel": str(sharding)} if sharding is not None else {}),
        **({"document_mask": True} if stepper.separator is not None else {}),
        **({"trained": trained} if (trained := trained_share(model)) < 1 else {}),
        **({"window": window} if window != model.config.context_length else {}),
        "compute": str(stepper.compute),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def trained_share(model: nn.Module) -> float:
    """The share of the weights that train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
