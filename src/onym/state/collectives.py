"""Everything that ranks agree upon by collectives: rank 0 decides, values are gathered, failures are raised in all.

Each rank has to call the same functions in the same order. With one process, or with ``collective=False``, each function uses
this process alone. A background thread must not call them: see :mod:`onym.checkpoint.coordinator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from onym.errors import CheckpointError, OnymError

T = TypeVar("T")


def get_world_size() -> int:
    """How many processes train together; 1 without torch.distributed."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def get_rank() -> int:
    """This process's rank; 0 without torch.distributed."""
    from torch import distributed

    return distributed.get_rank() if get_world_size() > 1 else 0


def is_rank0() -> bool:
    """Whether this is the process that decides."""
    return get_rank() == 0


def broadcast_from_rank0(decide: Callable[[], T], collective: bool = True) -> T:
    """The result of ``decide`` in rank 0, in all ranks.

    Raises:
        OnymError: in all ranks, where ``decide`` raised in rank 0.
    """
    if not collective or get_world_size() == 1:
        return decide()
    from torch import distributed

    message: list[Any] = [None]
    if is_rank0():
        try:
            message = [(decide(), None)]
        except Exception as error:
            message = [(None, error if isinstance(error, OnymError) else OnymError(f"Rank 0 failed: {error}"))]
    distributed.broadcast_object_list(message, src=0)
    result: T
    result, failure = message[0]
    if failure is not None:
        try:
            raise failure
        finally:
            del failure, message  # see run_on_all_ranks
    return result


def all_gather_object(value: T, collective: bool = True) -> list[T]:
    """The values of all ranks, by rank."""
    if not collective or get_world_size() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * get_world_size()
    distributed.all_gather_object(values, value)
    return values


def raise_on_all_ranks(
    failure: BaseException | None, collective: bool = True, error: type[OnymError] = CheckpointError
) -> None:
    """Raise in all ranks where one of them failed.

    Args:
        failure: of this rank; it is raised as it is.
        collective: False: only this rank's own failure counts.
        error: the type that another rank's failure is raised as.
    """
    reasons = all_gather_object(None if failure is None else str(failure) or type(failure).__name__, collective)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # see run_on_all_ranks
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise error(reason if rank == 0 else f"On rank {rank}: {reason}")


def run_on_all_ranks(work: Callable[[], T], collective: bool = True, error: type[OnymError] = CheckpointError) -> T:
    """The result of ``work`` on this rank; where it fails on one of them, all raise; the others an ``error``."""
    failure: BaseException | None = None
    try:
        result = work()
    except BaseException as raised:
        failure = raised
    try:
        raise_on_all_ranks(failure, collective, error)
    finally:
        del failure  # its traceback has this frame: each would keep the other, and open files, until Python collects
    return result
