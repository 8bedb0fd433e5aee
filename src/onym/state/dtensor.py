"""Tensors that several processes hold in pieces: FSDP2's DTensors, and FSDP1's flat parameters.

Nothing of torch.distributed is imported here: where there is a piece, the program has imported what made it.
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

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which holds this process's piece."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def any_sharded(values: Iterable[Any]) -> bool:
    """Whether something among these is in pieces, so that all processes have to take part in what is done with it."""
    return any(_is_in_pieces(value) for value in values)


def _is_in_pieces(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(map(is_sharded, chain(value.parameters(), value.buffers()))) or has_flat_parameters(value)
    if isinstance(value, Mapping):
        return any(map(_is_in_pieces, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_in_pieces, value))
    return isinstance(value, Tensor) and is_sharded(value)


def without_gradients(sharded: bool) -> AbstractContextManager[object]:
    """For forward passes alone; what FSDP2 puts together there, training uses too, so it cannot be of ``inference_mode``."""
    return torch.no_grad() if sharded else torch.inference_mode()


def reshard(model: nn.Module) -> None:
    """After such passes: FSDP2 leaves what is outside of the blocks put together, for a backward pass that does not come."""
    fsdp: Any = model
    fsdp.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process has of it: of a plain tensor, all."""
    piece: Any = tensor
    return piece._local_tensor if is_sharded(tensor) else tensor


def computes_on(tensor: Tensor) -> torch.device:
    """Where a model with this parameter computes: a share may be kept in main memory, and be put together elsewhere."""
    pieces: Any = tensor
    return torch.device(pieces.device_mesh.device_type) if is_sharded(tensor) else tensor.device


def is_cut(tensor: Any) -> TypeGuard[Tensor]:
    """Whether each process has one box of it, or a copy of one: not so where parts are still to be added up, say."""
    if not isinstance(tensor, Tensor) or not is_sharded(tensor):
        return False
    pieces: Any = tensor
    kinds = sys.modules["torch.distributed.tensor"]
    placed = list(zip(pieces.placements, pieces.device_mesh.shape, strict=True))
    return all(
        type(placement) in (kinds.Shard, kinds.Replicate)
        or _is_cut_later(placement, [(each, size) for each, size in placed[number + 1 :] if type(each) is kinds.Shard])
        for number, (placement, _) in enumerate(placed)
    )


def _is_cut_later(placement: Any, inner: list[tuple[Any, int]]) -> bool:
    """Whether it cuts boxes that ``inner`` (with the number of processes of each) has cut before, as FSDP2 does those of tensor
    parallelism; what is left is one box still."""
    if type(placement).__name__ != "_StridedShard":
        return False
    factor: int = math.prod(size for each, size in inner if each.dim == placement.dim)
    return bool(factor == placement.split_factor)


def local_chunk(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole this process's piece is, of a tensor that :func:`is_cut`."""
    pieces: Any = tensor
    if pieces.device_mesh.get_coordinate() is None:  # it is other processes' alone
        return (slice(0, 0),) * tensor.dim()
    # What torch.distributed.checkpoint finds its own boxes with.
    boxed = sys.modules["torch.distributed.tensor"]._utils.compute_local_shape_and_global_offset
    sizes, starts = boxed(pieces.shape, pieces.device_mesh, pieces.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def cut_as(tensor: Any, turn: int) -> Any:
    """Equal for tensors of one shape of which each process is to write the same box; None for one that is not cut.

    Args:
        turn: as for :func:`is_mine_to_write`.
    """
    if not is_cut(tensor):
        return None
    pieces: Any = tensor
    _, copies = _copy(pieces)
    return pieces.device_mesh, pieces.placements, turn % copies


def is_mine_to_write(tensor: Tensor, turn: int) -> bool:
    """Of the processes that have a copy of the same box one is to write it.

    Args:
        tensor: one that :func:`is_cut`.
        turn: any number, the same in all of them; with another for each tensor they write about as much.
    """
    pieces: Any = tensor
    which, copies = _copy(pieces)
    return which is not None and which == turn % copies


def _copy(pieces: Any) -> tuple[int | None, int]:
    """Which of the copies this process has, and how many there are."""
    replicate = sys.modules["torch.distributed.tensor"].Replicate
    coordinate = pieces.device_mesh.get_coordinate()
    which, copies = 0, 1
    for dimension, (size, placement) in enumerate(zip(pieces.device_mesh.shape, pieces.placements, strict=True)):
        if isinstance(placement, replicate):
            which, copies = which * size + (coordinate[dimension] if coordinate is not None else 0), copies * size
    return (which if coordinate is not None else None), copies


def from_own_piece(values: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a tensor that is cut as another one is."""
    pieces: Any = like
    made: Tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        values.to(pieces._local_tensor.device),
        pieces.device_mesh,
        pieces.placements,
        run_check=False,
        shape=pieces.shape,
        stride=pieces.stride(),
    )
    return made


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it, in this process; for a sharded one each process has to call this."""
    pieces: Any = tensor
    full: Tensor = pieces.full_tensor() if is_sharded(tensor) else tensor
    return full


def distribute_like(value: Tensor, target: Tensor) -> Tensor:
    """``value`` in the pieces that ``target`` has; a process that has the whole value takes its own piece of it."""
    if not is_sharded(target):
        return full_tensor(value)
    pieces: Any = target
    given: Any = value
    if is_sharded(value) and (given.device_mesh, given.placements) == (pieces.device_mesh, pieces.placements):
        return value
    if is_cut(target) and tuple(value.shape) == tuple(target.shape):
        mine = full_tensor(value)[local_chunk(target)].clone(
            memory_format=torch.contiguous_format
        )  # without the memory of the rest
        return from_own_piece(mine, target)  # on the device of the share, not of the mesh
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    device = pieces.device_mesh.device_type
    shared: Tensor = distribute(full_tensor(value).to(device), pieces.device_mesh, pieces.placements, src_data_rank=None)
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
def full_parameters(model: nn.Module, *, writeback: bool = False) -> Iterator[bool]:
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
