"""Several processes of one training: the first one decides, and the others do as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from onym.errors import CheckpointError, OnymError

T = TypeVar("T")
Question = TypeVar("Question")
Answer = TypeVar("Answer")


def get_world_size() -> int:
    """How many processes train together; 1 without torch.distributed."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def get_rank() -> int:
    """This process's number among them."""
    return torch.distributed.get_rank() if get_world_size() > 1 else 0


def is_rank0() -> bool:
    """Whether this is the one that writes."""
    return get_rank() == 0


def broadcast_from_rank0(decide: Callable[[], T], collective: bool = True) -> T:
    """What the first process decides, in all of them; each has to call this.

    Args:
        decide: called in the first process.
        together: False: each decides for itself, and need not wait for any other.

    Raises:
        OnymError: what the first one raised, so that none goes on alone.
    """
    return broadcast_with_questions(lambda ask: decide(), lambda question: None, collective)


def broadcast_with_questions(
    decide: Callable[[Callable[[Question], list[Answer]]], T], answer: Callable[[Question], Answer], collective: bool = True
) -> T:
    """As :func:`agreed`, where the first process asks all of them on its way to a decision.

    Args:
        decide: called in the first process, with a function that asks all of them and gives their answers.
        answer: called in each of them for each question, also in the first. It must not raise.
        together: False: each decides for itself, and answers its own questions.

    Raises:
        OnymError: what the first one raised.
    """
    if get_world_size() == 1 or not collective:
        return decide(lambda question: [answer(question)])
    if is_rank0():

        def ask(question: Question) -> list[Answer]:
            _told(("asked", question))
            return all_gather_object(answer(question))

        said: tuple[str, Any]
        try:
            said = "decided", decide(ask)
        except Exception as error:
            said = "failed", error if isinstance(error, OnymError) else OnymError(f"The first process failed: {error}")
        _told(said)
    else:
        while (said := _told(None))[0] == "asked":
            all_gather_object(answer(said[1]))
    if said[0] == "failed":
        raise said[1]
    result: T = said[1]
    return result


def _told(said: Any) -> Any:
    """What the first process says, in all of them."""
    message = [said]
    torch.distributed.broadcast_object_list(message, src=0)
    return message[0]


def all_gather_object(value: T, collective: bool = True) -> list[T]:
    """Every process's value, in the order of their numbers; each has to call this. Not ``together``: its own alone."""
    if get_world_size() == 1 or not collective:
        return [value]
    values: list[T | None] = [None] * get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def raise_on_all_ranks(
    failure: BaseException | None, collective: bool = True, error: type[OnymError] = CheckpointError
) -> None:
    """Where something failed in one of several processes, raise in all of them; each has to call this.

    Args:
        failure: of this process.
        together: False: the others are not asked.
        error: what another one's failure is raised as; its own is raised as it is.
    """
    told = all_gather_object(None if failure is None else str(failure) or type(failure).__name__, collective)
    if failure is not None:
        raise failure
    for number, reason in enumerate(told):
        if reason is not None:
            raise error(reason if number == 0 else f"In process {number}: {reason}")
