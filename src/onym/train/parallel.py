"""One model sharded over several processes: each holds a shard of the weights, the gradients and the optimizer's state.

FSDP2 (``fully_shard``) all-gathers a block before it runs, forward and backward, and reshards it afterwards; what is outside of
the blocks stays gathered from the forward to the backward pass. Gradients are reduce-scattered after each micro-batch, so no
rank holds a full gradient.

Weights are all-gathered in fp32, and autocast computes in ``--precision`` as it does without sharding. ``--gather-dtype bf16``
all-gathers a block in bf16. Autocast rounds its matrices anyway; what changes is that norms are rounded too, so the loss is
that of another model than the one in the checkpoint (2e-4 apart with eight layers), and the proof rounds as the training does.
Activations between blocks and weights outside of them stay fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onym.errors import ConfigError
from onym.gpt.causal_lm import CausalLM
from onym.gpt.config import ModelConfig
from onym.gpt.models import without_values
from onym.state.collectives import all_gather_object
from onym.state.dtensor import full_tensor, local
from onym.train.distributed import DistContext
from onym.train.options import RunOptions
from onym.train.precision import Compute


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded."""

    mesh: Any
    """DeviceMesh of all processes (shard), or of machines by their processes (replicate, shard)."""
    machines: int = 1
    """How many replicas of the model there are."""
    gather_bf16: bool = False
    """All-gather dtype of block parameters: bf16 instead of fp32."""
    offloads: bool = False
    """Whether shards are in main memory instead of on the GPU."""

    def __str__(self) -> str:
        within = f" within each of {self.machines} machines" if self.machines > 1 else ""
        return f"weights sharded{within}{', all-gathered in bf16' * self.gather_bf16}{', in main memory' * self.offloads}"

    def make(self, config: ModelConfig) -> CausalLM:
        """A new sharded model. At most one block, or what is outside of the blocks, is there in full at a time.

        With the same random numbers on all ranks its weights are those of ``make_model(config)``.
        """
        return self._materialise(config, draw=True)

    def copy(self, model: CausalLM) -> CausalLM:
        """A second model with the same weights."""
        made = self._materialise(model.config, draw=False)
        with torch.no_grad():
            for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
                local(mine).copy_(local(theirs))
        return made

    def shard(self, model: CausalLM) -> None:
        """Shard a model that is there in full, in place; equal on all ranks."""
        for block in model.trf_blocks:
            self._shard_block(block)
        self._shard(model)

    def _materialise(self, config: ModelConfig, *, draw: bool) -> CausalLM:
        model = without_values(config)
        materialise(model, self._shard_block, draw=draw)
        self._shard(model)
        return model

    def _shard_block(self, block: nn.Module) -> None:
        self._shard(block, is_block=True)

    def _shard(self, part: nn.Module, *, is_block: bool = False) -> None:
        """Leave this process its shard of a block, or of what is outside of the blocks."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # takes a second

        offload = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda") if self.offloads else OffloadPolicy()
        policy = MixedPrecisionPolicy()
        if self.gather_bf16 and is_block:
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
            upcast_norms(part)
        fully_shard(part, mesh=self.mesh, mp_policy=policy, offload_policy=offload)

    def last_of_step(self, model: nn.Module, last: bool) -> None:
        """Say whether the next backward pass is the last of its step: replicas all-reduce their gradients once a step."""
        if self.machines > 1:
            fsdp: Any = model
            fsdp.set_requires_all_reduce(last)

    def reshard(self, model: nn.Module) -> bool:
        """Reset FSDP after a pass that failed half-way, on all ranks; returns whether this torch can do it."""
        fsdp: Any = model
        if not hasattr(fsdp, "reset_iter_state"):  # since torch 2.13
            return False
        fsdp.reset_iter_state()
        return True


def make_sharding(run: RunOptions, ranks: DistContext, compute: Compute) -> Sharding | None:
    """What ``--parallel`` asks for; None where each process has all of the model.

    Raises:
        ConfigError: FSDP2 does not run on the device, the machines have unequal numbers of processes, or an option has no
            effect here.
    """
    parallel, device = run.parallel, compute.device
    if run.cpu_offload and device.type == "cpu":
        raise ConfigError("--cpu-offload is for weights that a GPU computes with; this run's are in main memory: leave it out.")
    if run.cpu_offload and ranks.world_size == 1:
        raise ConfigError("--cpu-offload needs several processes, one for each GPU (--processes): with one, leave it out.")
    if run.gather_dtype == "bf16" and compute.dtype != torch.bfloat16:
        raise ConfigError(
            f"--gather-dtype bf16 is for --precision bf16, and this run computes in {compute.precision}: leave it out."
        )
    if parallel == "ddp" or ranks.world_size == 1:
        return None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--parallel {parallel} runs on CPUs and on CUDA devices, not on {device.type}: take --parallel ddp.")
    from torch.distributed.device_mesh import init_device_mesh

    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    each = (
        sorted({int(count) if count.isdecimal() else 0 for count in all_gather_object(here)})
        if parallel == "hybrid"
        else [ranks.world_size]
    )
    if 0 in each:
        raise ConfigError(
            "--parallel hybrid has to know how many processes a machine has, and LOCAL_WORLD_SIZE does not say it: start it "
            "with torchrun or --processes, or take --parallel fsdp."
        )
    if len(each) > 1 or ranks.world_size % each[0]:
        raise ConfigError(
            f"--parallel hybrid needs the same number of processes on each machine, not {' and '.join(map(str, each))}: take "
            "--parallel fsdp."
        )
    machines = ranks.world_size // each[0]
    shape, names = ((ranks.world_size,), ("shard",)) if machines == 1 else ((machines, each[0]), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Sharding(mesh, machines, run.gather_dtype == "bf16", run.cpu_offload)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients down where their norm is above ``limit``; returns the norm of the full gradient, on each rank."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def materialise(model: CausalLM, after_block: Callable[[nn.Module], object], *, draw: bool = True) -> None:
    """Allocate a model's parameters, block after block.

    Args:
        model: of :meth:`CausalLM.without_values`.
        after_block: is called with each block before the next one is allocated; to shard it, say.
        draw: initialise as its constructor does, with the same random numbers in the same order; False where the values are
            overwritten.
    """
    for layer in model.modules() if draw else ():
        if isinstance(layer, nn.Linear | nn.Embedding):  # its constructor draws values, which the GPT then draws again
            layer.to_empty(device="cpu").reset_parameters()
            layer.to_empty(device="meta")
    for child in model.children():
        for part in child if isinstance(child, nn.ModuleList) else (child,):
            part.to_empty(device="cpu")
            if draw:
                model.reset_parameters(part)
            if child is model.trf_blocks:
                after_block(part)
    if model.config.tie_embeddings:
        model.out_head.weight = model.tok_emb.weight


class UpcastLayerNorm(nn.LayerNorm):
    """LayerNorm that upcasts weights that are narrower than its input: those that FSDP all-gathers in bf16."""

    def forward(self, x: Tensor) -> Tensor:  # [..., emb] -> the same
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def upcast_norms(block: nn.Module) -> None:
    """Make a block's norms :class:`UpcastLayerNorm`, in place."""
    for module in block.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = UpcastLayerNorm
