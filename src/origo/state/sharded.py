"""Tensors that several processes hold in pieces: FSDP2's DTensors, and FSDP1's flat parameters.

Nothing of torch.distributed is imported here: where there is a piece, the program has imported what made it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which holds this process's piece."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def any_sharded(values: Iterable[Any]) -> bool:
    """Whether a model among these is in pieces, so that all processes have to take part in what is done with it."""
    modules = [value for value in values if isinstance(value, nn.Module)]
    return any(is_sharded(tensor) for module in modules for tensor in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this process has of it: of a plain tensor, all."""
    piece: Any = tensor
    return piece._local_tensor if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, in this process; for a sharded one each process has to call this."""
    pieces: Any = tensor
    full: Tensor = pieces.full_tensor() if is_sharded(tensor) else tensor
    return full


def shared_out_like(value: Tensor, target: Tensor) -> Tensor:
    """``value`` in the pieces that ``target`` has; a process that has the whole value takes its own piece of it."""
    if not is_sharded(target):
        return whole(value)
    pieces: Any = target
    given: Any = value
    if is_sharded(value) and (given.device_mesh, given.placements) == (pieces.device_mesh, pieces.placements):
        return value
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    device = pieces.device_mesh.device_type
    shared: Tensor = distribute(whole(value).to(device), pieces.device_mesh, pieces.placements, src_data_rank=None)
    return shared


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether FSDP1 is at work in it."""
    module = sys.modules.get(_FSDP1)
    if module is None:
        return False
    seen, ahead = {model}, [model]  # model.modules() takes ten times as long
    while ahead:
        part = ahead.pop()
        if isinstance(part, module.FullyShardedDataParallel):
            return True
        further = {child for child in part._modules.values() if child is not None and child._modules} - seen
        seen |= further
        ahead += further
    return False


@contextmanager
def whole_parameters(model: nn.Module, *, writeback: bool = False) -> Iterator[bool]:
    """Within it, FSDP1's flat parameters are the model's own, whole ones; every process has to enter.

    Args:
        model: any; without FSDP1 nothing happens.
        writeback: keep what was copied into them.

    Yields:
        Whether that was needed: the tensors are then gone afterwards.
    """
    flat = has_flat_parameters(model)
    fsdp: Any = sys.modules[_FSDP1].FullyShardedDataParallel if flat else None
    with fsdp.summon_full_params(model, writeback=writeback) if flat else nullcontext():
        yield flat
