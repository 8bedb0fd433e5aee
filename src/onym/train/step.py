"""One optimizer step, on a batch that may go through the model in micro-batches; nothing in it waits for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onym.adapters.lora import LoRA
from onym.data.batches import IGNORED_TARGET, Batch
from onym.data.order import epoch_key
from onym.gpt.causal_lm import CausalLM
from onym.gpt.documents import counted, loss_of
from onym.gpt.models import arch_named
from onym.state.dtensor import local
from onym.train.distributed import DistContext, GradientAllReduce
from onym.train.optimizer import Average, build_optimizers, resolved, set_rates, step_unless
from onym.train.options import OptimizationOptions
from onym.train.parallel import Sharding, clip_gradients
from onym.train.precision import Compute
from onym.train.spikes import SpikeDetector


@dataclass(frozen=True)
class Result:
    """What a step gave; 0-d tensors that nobody has waited for yet."""

    loss: Tensor
    """Mean cross-entropy in nats a token."""
    norm: Tensor
    """Of the gradient, before it was clipped."""
    bad: Tensor
    """bool: whether the step was skipped, so that nothing changed."""


class Stepper:
    """The model and all that changes with a step: optimizers, moving average, gradient scaler, spike detector.

    Args:
        model: on the device that computes; a model to be sharded, on any.
        ranks: this process among those that share each batch.
        sharding: how the model is sharded; None where each process has all of it.
        separator: what keeps the documents of a row apart, see :func:`onym.gpt.documents.loss_of`.
        lora: the adapters in the model, which train alone and are saved alone; None where the model trains.
    """

    def __init__(
        self,
        model: CausalLM,
        options: OptimizationOptions,
        compute: Compute,
        ranks: DistContext = DistContext(),  # noqa: B008
        sharding: Sharding | None = None,
        separator: int | None = None,
        lora: LoRA | None = None,
    ) -> None:
        self.model, self.compute, self.ranks, self.sharding = model, compute, ranks, sharding
        self.separator, self.lora = separator, lora
        self._options = resolved(options, arch_named(model.config), model.config.emb_dim, muon=sharding is None)
        self._gradients = GradientAllReduce(model, ranks if sharding is None else DistContext())
        copy_model = sharding.copy if sharding is not None else copy.deepcopy
        self.average = Average(copy_model(model), options.ema) if options.ema else None
        self.optimizers = build_optimizers(model, options)
        self._scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == torch.float16)
        self.guard = SpikeDetector(options.spike_sigma, compute.device)
        self.micro_batch = 0
        """Sequences that go through the model at once; set by :func:`onym.train.dry_run.prepare`."""
        model.recompute_activations = options.gradient_checkpointing

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by name."""
        model = self.model if self.lora is None else self.lora
        state: dict[str, Any] = {"model": model, "optimizer": self.optimizers, "guard": self.guard}
        if self.average is not None:
            state["ema"] = self.average.model
        if self._scaler.is_enabled():
            state["scaler"] = self._scaler
        return state

    @property
    def finite(self) -> bool:
        """Whether all weights are; waits for the device. A collective."""
        weights = [local(parameter) for parameter in self.model.parameters()]
        largest = torch._foreach_norm([each for each in weights if each.numel()], torch.inf)
        return not self.ranks.max(bool(largest) and not torch.stack(largest).isfinite().all())

    def __call__(self, batch: Batch, rate: float, number: int) -> Result:
        """Take a step.

        Args:
            batch: all of this process's sequences.
            rate: learning rate.
            number: of the step, from 0.
        """
        if self.ranks.world_size > 1:  # dropout differs between ranks, and is the same when the step is taken again
            torch.manual_seed(epoch_key(self._options.seed, number * self.ranks.world_size + self.ranks.rank))
        loss = self._backward(batch)
        if self._scaler.is_enabled():
            for optimizer in self.optimizers:
                self._scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self._options.grad_clip or torch.inf).to(loss.device)
        bad = self.guard.judge(loss, norm)
        set_rates(self.optimizers, self._options, rate, number)
        if self.compute.device.type == "cuda" and not (self.sharding and self.sharding.offloads):
            step_unless(bad, self.optimizers)
        elif not bad:
            for optimizer in self.optimizers:
                optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update()
        self.model.zero_grad()
        if self.average is not None:
            self.average.update(self.model, number, bad)
        return Result(loss, norm, bad)

    def _backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradients of all micro-batches; returns the mean loss of all ranks."""
        parts = list(zip(batch[0].split(self.micro_batch), batch[1].split(self.micro_batch), strict=True))
        shares = self._shares(parts)
        losses = []
        for part, share in zip(parts, shares, strict=True):
            loss = self._loss(part)
            if part is parts[-1]:
                self._gradients.begin()
            if self.sharding is not None:
                self.sharding.last_of_step(self.model, part is parts[-1])
            if share is not None:
                loss = loss * share
            self._scaler.scale(loss / len(parts) if len(parts) > 1 else loss).backward()
            losses.append(loss.detach())
        self._gradients.finish()
        return self.ranks.mean(losses[0] if len(losses) == 1 else torch.stack(losses).mean())

    def _shares(self, parts: list[Batch]) -> Sequence[Tensor | None]:
        """Factors of the micro-batches' mean losses, with which each target of the step counts the same on all ranks.

        None where all targets count, so that micro-batches have equal numbers of them. A collective.
        """
        if self.separator is None:
            return [None] * len(parts)
        if (weights := self.model.class_weights) is not None:
            # Without picking out those that count: how many there are would have to be waited for.
            counts = torch.stack(
                [torch.where(targets != IGNORED_TARGET, weights[targets.clamp(min=0)], 0).sum() for _, targets in parts]
            )
        else:
            counts = torch.stack([counted(*part, self.separator) for part in parts]).float()
        return (counts / self.ranks.mean(counts.mean())).unbind()

    def _loss(self, batch: Batch) -> Tensor:
        with self.compute.autocast():
            return loss_of(self.model, *batch, self.separator)
