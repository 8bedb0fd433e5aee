"""One optimizer step, on a batch that may go through the model in parts; nothing in it waits for a GPU."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from onym.compile.in_place import Compilation, How, compile_in_place, uncompile
from onym.compile.policy import choose, recall, remember
from onym.data.order import epoch_key
from onym.errors import LESS_MEMORY, RunError, is_out_of_memory
from onym.gpt.gpt2 import GPT
from onym.state.collectives import broadcast_from_rank0
from onym.state.dtensor import local
from onym.train.distributed import DistContext, GradientAllReduce
from onym.train.memory import give_back_freed_memory, keep_freed_memory
from onym.train.optimizer import Average, build_optimizers
from onym.train.options import OptimizationOptions
from onym.train.parallel import Sharding, clip_gradients
from onym.train.precision import Compute
from onym.train.spikes import SpikeDetector

_SLOWER = 1.1  # as often as a step takes where compiling is undone; less is noise, on a machine that does other things too

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]  # inputs and targets, both [sequences, context_length] int64


@dataclass(frozen=True)
class Result:
    """What became of a step; 0-d tensors that nobody has waited for yet."""

    loss: Tensor
    """Mean cross-entropy in nats a token."""
    norm: Tensor
    """Of the gradient, before it was clipped."""
    bad: Tensor
    """bool: whether it was left out, as if there had been no step."""


class Stepper:
    """The model and all that changes with a step: optimizers, moving average, scaler, guard.

    Args:
        model: on the device that computes; to be shared out, on any.
        ranks: this process among those that share each batch.
        sharding: how the model is shared out, too.
    """

    def __init__(
        self,
        model: GPT,
        options: OptimizationOptions,
        compute: Compute,
        ranks: DistContext = DistContext(),  # noqa: B008
        sharding: Sharding | None = None,
    ) -> None:
        self.model, self.compute, self.ranks, self.sharding = model, compute, ranks, sharding
        self._options = options
        self._gradients = GradientAllReduce(model, ranks if sharding is None else DistContext())
        copied = sharding.copy if sharding is not None else copy.deepcopy
        self.average = Average(copied(model), options.ema) if options.ema else None
        self.optimizers = build_optimizers(model, options)
        fp16 = compute.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(compute.device.type, enabled=fp16)
        self.guard = SpikeDetector(options.spike_sigma, compute.device)
        self.micro_batch = 0
        """Sequences that go through the model at once; set by :meth:`prepare`."""
        model.recompute_activations = options.gradient_checkpointing

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by name."""
        kept: dict[str, Any] = {"model": self.model, "optimizer": self.optimizers, "guard": self.guard}
        if self.average is not None:
            kept["ema"] = self.average.model
        if self._scaler.is_enabled():
            kept["scaler"] = self._scaler
        return kept

    @property
    def finite(self) -> bool:
        """Whether all weights are; waits for the device."""
        weights = [local(parameter) for parameter in self.model.parameters()]
        largest = torch._foreach_norm([each for each in weights if each.numel()], torch.inf)
        return not self.ranks.largest(bool(largest) and not torch.stack(largest).isfinite().all())

    def prepare(
        self, batch: Batch, sizes: Iterable[int], how: How | Literal["auto"], steps: int = 0
    ) -> tuple[Compilation, float]:
        """Compile, and go through one step without effect, so that whatever is wrong shows before training starts.

        Args:
            sizes: of micro-batch, to be tried in this order until one fits into memory.
            how: to compile; ``"auto"`` for what pays over ``steps`` more steps.

        Returns:
            What came of compiling, and the loss of the batch's first part.

        Raises:
            RuntimeError: none of them fits.
        """
        candidates = list(sizes)
        for size in candidates:
            self.micro_batch = size
            try:
                return self._dry_run((batch[0][:size], batch[1][:size]), len(batch[0]) // size, how, steps)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size == candidates[-1]:
                    raise
                if self.sharding is not None and not self.sharding.reshard(self.model):
                    raise
                self.model.zero_grad()
            if self.compute.device.type == "cuda":
                torch.cuda.empty_cache()
        raise AssertionError("there is always a size to try")

    def _dry_run(self, batch: Batch, parts: int, how: How | Literal["auto"], steps: int) -> tuple[Compilation, float]:
        # What the optimizer will take, so that its first step does not fail where the dry run did not.
        held = [torch.empty_like(parameter) for parameter in self.model.parameters() for _ in range(2)]
        losses: list[float] = []
        passes = min(parts, 2)  # at the second, the gradients of the first are there: the most memory that a step takes

        def once() -> None:
            devices = [self.compute.device] if self.compute.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                for number in range(passes):
                    loss = self._loss(batch)
                    loss.backward()
                    if number == 0:
                        losses.append(loss.item())
            self.model.zero_grad()

        def timed() -> float:
            start = time.perf_counter()
            once()
            if self.compute.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) * parts / passes

        on_cpu, eager_seconds = self.compute.device.type == "cpu", math.nan
        if on_cpu:
            keep_freed_memory()
        automatic = how == "auto"
        if how == "auto":
            self._everywhere(once)  # at the first, memory is new
            eager_seconds = min(timed(), timed())
            ways: Sequence[How] = ("whole", "blocks") if self.sharding is None else ("blocks",)
            how = broadcast_from_rank0(lambda: choose(steps, eager_seconds, on_cpu, recall(self._shape), ways))
        chosen: How = how  # type: ignore[assignment]  # it is not auto any more
        compilation = self._everywhere(lambda: compile_in_place(self.model, chosen, once, reraise=is_out_of_memory))
        if automatic and compilation.compiled:
            compilation = replace(compilation, eager_seconds=eager_seconds, compiled_seconds=min(timed(), timed()))
            if self.ranks.first:
                remember(self._shape, compilation)
            slower = compilation.compiled_seconds > _SLOWER * eager_seconds
            if broadcast_from_rank0(lambda: slower):
                uncompile(self.model)
                once()  # the loss that is told is that of the way that is taken
                compilation = replace(compilation, how="off", reason="a compiled step takes longer here")
        elif automatic and not compilation.reason:
            compilation = replace(compilation, eager_seconds=eager_seconds)
        del held
        give_back_freed_memory()
        return compilation, float(self.ranks.mean(torch.tensor(losses[-1], device=self.compute.device)))

    def _everywhere(self, work: Callable[[], T]) -> T:
        """Do what may take more memory than there is; where it does in one process, it is said to in all."""
        failure: Exception | None = None
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if self.ranks.count == 1 or not is_out_of_memory(error):
                raise
            failure = error
            if self.sharding is not None and not self.ranks.all_come("out-of-memory"):
                raise RunError(
                    f"Process {self.ranks.number} of {self.ranks.count} has less memory left than the others, and each has to "
                    f"hold a share of the model: {LESS_MEMORY}."
                ) from error
        if self.ranks.largest(failure is not None):
            raise failure or MemoryError("out of memory in another process")
        return result

    @property
    def _shape(self) -> dict[str, Any]:
        """What the cost and the gain of compiling depend on."""
        options: dict[str, Any] = {"gradient_checkpointing": self.model.recompute_activations, "micro_batch": self.micro_batch}
        if self.sharding is not None:
            options["parallel"] = str(self.sharding)
        where = {"compute": str(self.compute), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        return {**self.model.config.to_dict(), **options, **where}

    def __call__(self, batch: Batch, rate: float, number: int) -> Result:
        """Take a step.

        Args:
            batch: all of its sequences.
            rate: learning rate.
            number: of the step, from 0.
        """
        parts = list(zip(batch[0].split(self.micro_batch), batch[1].split(self.micro_batch), strict=True))
        losses = []
        if self.ranks.count > 1:  # what is dropped out differs between them, and is the same when the step is taken again
            torch.manual_seed(epoch_key(self._options.seed, number * self.ranks.count + self.ranks.number))
        for part in parts:
            loss = self._loss(part)
            if part is parts[-1]:
                self._gradients.begin()
            if self.sharding is not None:
                self.sharding.last_of_step(self.model, part is parts[-1])
            self._scaler.scale(loss / len(parts) if len(parts) > 1 else loss).backward()
            losses.append(loss.detach())
        self._gradients.finish()
        loss = self.ranks.mean(losses[0] if len(losses) == 1 else torch.stack(losses).mean())
        if self._scaler.is_enabled():
            for optimizer in self.optimizers:
                self._scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self._options.grad_clip or torch.inf).to(loss.device)
        bad = self.guard.judge(loss, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        if self.compute.device.type == "cuda" and not (self.sharding and self.sharding.offloads):
            self._step_unless(bad)
        elif not bad:
            for optimizer in self.optimizers:
                optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update()
        self.model.zero_grad()
        if self.average is not None:
            self.average.update(self.model, number, bad)
        return Result(loss, norm, bad)

    def _loss(self, batch: Batch) -> Tensor:
        with self.compute.autocast():
            loss: Tensor = self.model(*batch)
        return loss

    def _step_unless(self, bad: Tensor) -> None:
        """Step where ``bad`` is false, decided on the device."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
                optimizer.step()
            else:
                self._undo(optimizer, optimizer.step, bad)

    @staticmethod
    @torch.no_grad()
    def _undo(optimizer: torch.optim.Optimizer, step: Callable[[], Any], bad: Tensor) -> None:
        """Step, and put back what was there where ``bad`` is true: for an optimizer that cannot be told on the device."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not optimizer.state:  # Muon makes its momentum at the first step, as zeros
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        live = [*parameters, *(optimizer.state[parameter]["momentum_buffer"] for parameter in parameters)]
        before = [tensor.clone() for tensor in live]
        step()
        for tensor, old in zip(live, before, strict=True):
            tensor.copy_(torch.where(bad, old, tensor))
