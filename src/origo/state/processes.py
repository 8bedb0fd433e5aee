"""Several processes of one training: the first one decides, and the others do as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from origo.errors import OrigoError

T = TypeVar("T")


def process_count() -> int:
    """How many processes train together; 1 without torch.distributed."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_number() -> int:
    """This process's number among them."""
    return torch.distributed.get_rank() if process_count() > 1 else 0


def first_process() -> bool:
    """Whether this is the one that writes."""
    return process_number() == 0


def agreed(decide: Callable[[], T], together: bool = True) -> T:
    """What the first process decides, in all of them; each has to call this.

    Args:
        decide: called in the first process.
        together: False: each decides for itself, and need not wait for any other.

    Raises:
        OrigoError: what the first one raised, so that none goes on alone.
    """
    if process_count() == 1 or not together:
        return decide()
    said: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if first_process():
        try:
            said[0] = decide(), None
        except Exception as error:
            said[0] = None, error if isinstance(error, OrigoError) else OrigoError(f"The first process failed: {error}")
    torch.distributed.broadcast_object_list(said, src=0)
    result, failure = said[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gathered(value: T, together: bool = True) -> list[T]:
    """Every process's value, in the order of their numbers; each has to call this. Not ``together``: its own alone."""
    if process_count() == 1 or not together:
        return [value]
    values: list[T | None] = [None] * process_count()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]
