"""One model over several processes, of which each has its share of the weights, their gradients and the optimizer's state.

FSDP2 (``fully_shard``) puts a block together when it is its turn, on the way forward and on the way back, and shares it out
again behind it; what is outside of the blocks stays together from one to the other. Gradients are averaged while they are
shared out, in each part of a batch, so that whole ones never add up anywhere.

What is put together is fp32, and autocast computes in ``--precision`` as it does without sharding. With ``--gather-dtype bf16``
a block is put together in bf16. Autocast rounds its matrices anyway; what changes is that norms are rounded too, so the loss is
that of another model than the one that is kept (2e-4 apart with eight layers), and the proof rounds as the training does. What
goes from block to block stays fp32, and what is outside of them too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onym.errors import ConfigError
from onym.gpt.config import GPTConfig
from onym.gpt.gpt2 import GPT, Block
from onym.state.collectives import all_gather_object
from onym.state.dtensor import full_tensor, local
from onym.train.distributed import DistContext
from onym.train.options import RunOptions
from onym.train.precision import Compute


@dataclass(frozen=True)
class Sharding:
    """How a model is shared out."""

    mesh: Any
    """Of processes: all of them, or machines by the processes of each."""
    machines: int = 1
    """How often all of the model is there."""
    gather_bf16: bool = False
    """Whether a block's weights are put together in bf16."""
    offloads: bool = False
    """Whether the shares are in main memory, and not where they are computed with."""

    def __str__(self) -> str:
        within = f" within each of {self.machines} machines" if self.machines > 1 else ""
        return f"weights sharded{within}{', put together in bf16' * self.gather_bf16}{', in main memory' * self.offloads}"

    def make(self, config: GPTConfig) -> GPT:
        """A new model of which each process has its share; a whole block, and what is outside of them, only on the way there.

        With the same random numbers in all processes its weights are those of ``GPT(config)``.
        """
        model = GPT.without_values(config)
        model.materialise(self._share_out)
        self._share_out(model)
        return model

    def copy(self, model: GPT) -> GPT:
        """Another one with the same weights."""
        made = GPT.without_values(model.config)
        made.materialise(self._share_out, draw=False)
        self._share_out(made)
        with torch.no_grad():
            for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
                local(mine).copy_(local(theirs))
        return made

    def _share_out(self, part: nn.Module) -> None:
        """Leave this process its share of a block, or of what is outside of the blocks, where shares are."""
        from torch.distributed.fsdp import (  # takes a second
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        where = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda") if self.offloads else OffloadPolicy()
        rounded = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = rounded if self.gather_bf16 and isinstance(part, Block) else MixedPrecisionPolicy()
        fully_shard(part, mesh=self.mesh, mp_policy=policy, offload_policy=where)

    def last_of_step(self, model: nn.Module, last: bool) -> None:
        """Say whether the next backward pass is: sums of a machine are exchanged with other machines once a step."""
        if self.machines > 1:
            fsdp: Any = model
            fsdp.set_requires_all_reduce(last)

    def reshard(self, model: nn.Module) -> bool:
        """After a pass that failed half-way, in all processes: back to the shares; whether this torch can do it."""
        fsdp: Any = model
        if not hasattr(fsdp, "reset_iter_state"):  # torch 2.13 has it
            return False
        fsdp.reset_iter_state()
        return True


def make_sharding(run: RunOptions, ranks: DistContext, compute: Compute) -> Sharding | None:
    """What ``--parallel`` asks for; None where each process has the whole model, as a single one has.

    Raises:
        ConfigError: FSDP2 does not run on the device, the machines have unequal numbers of processes, or something of this kind
            has no sense here.
    """
    parallel, device = run.parallel, compute.device
    if run.cpu_offload and device.type == "cpu":
        raise ConfigError("--cpu-offload is for weights that a GPU computes with; this run's are in main memory: leave it out.")
    if run.cpu_offload and ranks.count == 1:
        raise ConfigError("--cpu-offload needs several processes, one for each GPU (--processes): with one, leave it out.")
    if run.gather_dtype == "bf16" and compute.dtype != torch.bfloat16:
        raise ConfigError(
            f"--gather-dtype bf16 is for --precision bf16, and this run computes in {compute.precision}: leave it out."
        )
    if parallel == "ddp" or ranks.count == 1:
        return None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--parallel {parallel} runs on CPUs and on CUDA devices, not on {device.type}: take --parallel ddp.")
    from torch.distributed.device_mesh import init_device_mesh

    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    each = (
        sorted({int(count) if count.isdecimal() else 0 for count in all_gather_object(here)})
        if parallel == "hybrid"
        else [ranks.count]
    )
    if 0 in each:
        raise ConfigError(
            "--parallel hybrid has to know how many processes a machine has, and LOCAL_WORLD_SIZE does not say it: start it "
            "with torchrun or --processes, or take --parallel fsdp."
        )
    if len(each) > 1 or ranks.count % each[0]:
        raise ConfigError(
            f"--parallel hybrid needs the same number of processes on each machine, not {' and '.join(map(str, each))}: take "
            "--parallel fsdp."
        )
    machines = ranks.count // each[0]
    shape, names = ((ranks.count,), ("shard",)) if machines == 1 else ((machines, each[0]), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Sharding(mesh, machines, run.gather_dtype == "bf16", run.cpu_offload)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients down where their norm is more than ``limit``; returns the norm, the whole model's in each process."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
