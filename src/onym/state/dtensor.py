"""Sharded tensors: FSDP2's DTensors, and FSDP1's flat parameters.

Nothing of torch.distributed is imported here: where there is a sharded tensor, the program has imported its module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from onym.state.chunks import Chunk

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def any_sharded(values: Iterable[Any]) -> bool:
    """Whether there is a sharded tensor in these objects, so that all ranks have to take part in what is done with them."""
    try:
        return any(map(_has_sharded, values))
    except RecursionError:  # nested too deep, or it holds itself, which is said where it is saved
        return False


def _has_sharded(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(map(is_sharded, chain(value.parameters(), value.buffers()))) or has_flat_parameters(value)
    if isinstance(value, Mapping):
        return any_sharded(value.values())
    if isinstance(value, list | tuple):
        return any_sharded(value)
    return isinstance(value, Tensor) and is_sharded(value)


def without_gradients(sharded: bool) -> AbstractContextManager[object]:
    """For forward passes alone. Training reuses what FSDP2 all-gathers in them, so that cannot be of ``inference_mode``."""
    return torch.no_grad() if sharded else torch.inference_mode()


def reshard(model: nn.Module) -> None:
    """After forward passes alone: FSDP2 keeps the root's parameters all-gathered for a backward pass that does not come."""
    fsdp: Any = model
    fsdp.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's chunk of a sharded tensor; a plain tensor itself."""
    dtensor: Any = tensor
    return dtensor._local_tensor if is_sharded(tensor) else tensor


def computes_on(tensor: Tensor) -> torch.device:
    """The device that a model with this parameter computes on: a shard may be offloaded to main memory."""
    dtensor: Any = tensor
    return torch.device(dtensor.device_mesh.device_type) if is_sharded(tensor) else tensor.device


def has_chunks(tensor: Any) -> TypeGuard[Tensor]:
    """Whether it is a DTensor of which each rank has one chunk, or a replica of one: not so for partial sums, say."""
    if not isinstance(tensor, Tensor) or not is_sharded(tensor):
        return False
    dtensor: Any = tensor
    kinds = sys.modules["torch.distributed.tensor"]
    placed = list(zip(dtensor.placements, dtensor.device_mesh.shape, strict=True))
    return all(
        type(placement) in (kinds.Shard, kinds.Replicate)
        or _is_strided_chunk(placement, [(each, size) for each, size in placed[number + 1 :] if type(each) is kinds.Shard])
        for number, (placement, _) in enumerate(placed)
    )


def _is_strided_chunk(placement: Any, inner: list[tuple[Any, int]]) -> bool:
    """Whether FSDP2 divided the chunks of tensor parallelism (``inner``, with the sizes of their mesh dimensions) by it."""
    if type(placement).__name__ != "_StridedShard":
        return False
    factor: int = math.prod(size for each, size in inner if each.dim == placement.dim)
    return bool(factor == placement.split_factor)


def local_chunk(tensor: Tensor) -> Chunk:
    """This rank's chunk of a tensor that :func:`has_chunks`; an empty one if the rank is not in the tensor's mesh."""
    dtensor: Any = tensor
    if dtensor.device_mesh.get_coordinate() is None:
        return Chunk((0,) * tensor.dim(), (0,) * tensor.dim())
    compute = sys.modules["torch.distributed.tensor"]._utils.compute_local_shape_and_global_offset  # as DCP does it
    sizes, offsets = compute(dtensor.shape, dtensor.device_mesh, dtensor.placements)
    return Chunk(tuple(offsets), tuple(sizes))


def sharding_key(tensor: Any, turn: int) -> Any:
    """Equal for tensors of one shape of which each rank writes the same chunk; None for one without chunks.

    Args:
        turn: as for :func:`writes_chunk`.
    """
    if not has_chunks(tensor):
        return None
    dtensor: Any = tensor
    return dtensor.device_mesh, dtensor.placements, turn % _replicas(dtensor)[1]


def writes_chunk(tensor: Tensor, turn: int) -> bool:
    """Whether this rank writes its chunk: of the ranks with replicas of a chunk, one does.

    Args:
        tensor: one that :func:`has_chunks`.
        turn: any number, equal in all ranks; with another one for each tensor the ranks write about as much.
    """
    replica, count = _replicas(tensor)
    return replica is not None and replica == turn % count


def _replicas(dtensor: Any) -> tuple[int | None, int]:
    """The number of this rank's replica, and how many there are."""
    replicate = sys.modules["torch.distributed.tensor"].Replicate
    coordinate = dtensor.device_mesh.get_coordinate()
    replica, count = 0, 1
    for dimension, (size, placement) in enumerate(zip(dtensor.device_mesh.shape, dtensor.placements, strict=True)):
        if isinstance(placement, replicate):
            replica, count = replica * size + (coordinate[dimension] if coordinate is not None else 0), count * size
    return (replica if coordinate is not None else None), count


def from_local_chunk(values: Tensor, like: Tensor) -> Tensor:
    """A DTensor with the sharding of another one, from this rank's chunk."""
    dtensor: Any = like
    made: Tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        values.to(dtensor._local_tensor.device),
        dtensor.device_mesh,
        dtensor.placements,
        run_check=False,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )
    return made


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor all-gathered, for which each rank has to call this; a plain tensor itself."""
    dtensor: Any = tensor
    full: Tensor = dtensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def distribute_like(value: Tensor, target: Tensor) -> Tensor:
    """``value`` with the sharding of ``target``; of a full tensor each rank takes its own chunk."""
    if not is_sharded(target):
        return full_tensor(value)
    dtensor: Any = target
    given: Any = value
    if is_sharded(value) and (given.device_mesh, given.placements) == (dtensor.device_mesh, dtensor.placements):
        return value
    if has_chunks(target) and tuple(value.shape) == tuple(target.shape):
        chunk = full_tensor(value)[local_chunk(target).slices]
        chunk = chunk.clone(memory_format=torch.contiguous_format)  # else it would hold the memory of the full tensor
        return from_local_chunk(chunk, target)  # on the device of the shard, which may not be that of the mesh
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    full = full_tensor(value).to(dtensor.device_mesh.device_type)
    sharded: Tensor = distribute(full, dtensor.device_mesh, dtensor.placements, src_data_rank=None)
    return sharded


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether it has a module that FSDP1 wrapped."""
    module = sys.modules.get(_FSDP1)
    if module is None:
        return False
    seen, ahead = {model}, [model]  # model.modules() takes ten times as long
    while ahead:
        current = ahead.pop()
        if isinstance(current, module.FullyShardedDataParallel):
            return True
        children = {child for child in current._modules.values() if child is not None and child._modules} - seen
        seen |= children
        ahead += children
    return False


@contextmanager
def full_parameters(model: nn.Module, *, writeback: bool = False) -> Iterator[bool]:
    """Within it, the model has its own full parameters instead of FSDP1's flat ones; every rank has to enter.

    Args:
        model: any; without FSDP1 nothing happens.
        writeback: changes of the full parameters stay.

    Yields:
        Whether the model has flat parameters; then the full ones are freed afterwards.
    """
    flat = has_flat_parameters(model)
    fsdp: Any = sys.modules[_FSDP1].FullyShardedDataParallel if flat else None
    with fsdp.summon_full_params(model, writeback=writeback) if flat else nullcontext():
        yield flat
