"""One model over several processes, of which each has its share of the weights, their gradients and the optimizer's state.

FSDP2 (``fully_shard``) puts a block together when it is its turn, on the way forward and on the way back, and shares it out
again behind it; what is outside of the blocks stays together from one to the other. Gradients are averaged while they are
shared out, in each part of a batch, so that whole ones never add up anywhere.

What is put together is fp32, and autocast computes in ``--precision`` as it does without sharding: a norm's weights rounded to
bf16 would be another model than the one that is kept, and that a fresh process proves (with FSDP2's mixed precision the loss of
eight layers was 2e-4 apart, twice of what the proof allows).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from origo.errors import ConfigError
from origo.models.gpt import GPT
from origo.state.processes import gathered
from origo.state.sharded import whole
from origo.training.options import Parallel
from origo.training.ranks import Ranks


@dataclass(frozen=True)
class Sharding:
    """How a model is shared out."""

    mesh: Any
    """Of processes: all of them, or machines by the processes of each."""
    machines: int = 1
    """How often all of the model is there."""

    def __str__(self) -> str:
        return "weights sharded" + (f" within each of {self.machines} machines" if self.machines > 1 else "")

    def share_out(self, model: GPT) -> None:
        """Leave this process its share, on the device that computes; weights have to be the same in all of them."""
        from torch.distributed.fsdp import fully_shard  # takes a second

        for block in model.trf_blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)

    def last_of_step(self, model: nn.Module, last: bool) -> None:
        """Say whether the next backward pass is: sums of a machine are exchanged with other machines once a step."""
        if self.machines > 1:
            fsdp: Any = model
            fsdp.set_requires_all_reduce(last)

    def put_away(self, model: nn.Module) -> bool:
        """After a pass that failed half-way, in all processes: back to the shares; whether this torch can do it."""
        fsdp: Any = model
        if not hasattr(fsdp, "reset_iter_state"):  # torch 2.13 has it
            return False
        fsdp.reset_iter_state()
        return True


def make_sharding(parallel: Parallel, ranks: Ranks, device: torch.device) -> Sharding | None:
    """What ``--parallel`` asks for; None where each process has the whole model, as a single one has.

    Raises:
        ConfigError: FSDP2 does not run on the device, or the machines have unequal numbers of processes.
    """
    if parallel == "ddp" or ranks.count == 1:
        return None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--parallel {parallel} runs on CPUs and on CUDA devices, not on {device.type}: take --parallel ddp.")
    from torch.distributed.device_mesh import init_device_mesh

    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    each = (
        sorted({int(count) if count.isdecimal() else 0 for count in gathered(here)}) if parallel == "hybrid" else [ranks.count]
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
    if machines == 1:
        return Sharding(init_device_mesh(device.type, (ranks.count,), mesh_dim_names=("shard",)))
    return Sharding(init_device_mesh(device.type, (machines, each[0]), mesh_dim_names=("replicate", "shard")), machines)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients down where their norm is more than ``limit``; returns the norm, the whole model's in each process."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
