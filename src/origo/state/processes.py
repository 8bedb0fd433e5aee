"""Several processes of one training: the first one decides, and the others do as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from origo.errors import CheckpointError, OrigoError

T = TypeVar("T")
Question = TypeVar("Question")
Answer = TypeVar("Answer")


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
    return agreed_with_help(lambda ask: decide(), lambda question: None, together)


def agreed_with_help(
    decide: Callable[[Callable[[Question], list[Answer]]], T], answer: Callable[[Question], Answer], together: bool = True
) -> T:
    """As :func:`agreed`, where the first process asks all of them on its way to a decision.

    Args:
        decide: called in the first process, with a function that asks all of them and gives their answers.
        answer: called in each of them for each question, also in the first. It must not raise.
        together: False: each decides for itself, and answers its own questions.

    Raises:
        OrigoError: what the first one raised.
    """
    if process_count() == 1 or not together:
        return decide(lambda question: [answer(question)])
    if first_process():

        def ask(question: Question) -> list[Answer]:
            _told(("asked", question))
            return gathered(answer(question))

        said: tuple[str, Any]
        try:
            said = "decided", decide(ask)
        except Exception as error:
            said = "failed", error if isinstance(error, OrigoError) else OrigoError(f"The first process failed: {error}")
        _told(said)
    else:
        while (said := _told(None))[0] == "asked":
            gathered(answer(said[1]))
    if said[0] == "failed":
        raise said[1]
    result: T = said[1]
    return result


def _told(said: Any) -> Any:
    """What the first process says, in all of them."""
    message = [said]
    torch.distributed.broadcast_object_list(message, src=0)
    return message[0]


def gathered(value: T, together: bool = True) -> list[T]:
    """Every process's value, in the order of their numbers; each has to call this. Not ``together``: its own alone."""
    if process_count() == 1 or not together:
        return [value]
    values: list[T | None] = [None] * process_count()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def none_goes_on_alone(failure: BaseException | None, together: bool = True, error: type[OrigoError] = CheckpointError) -> None:
    """Where something failed in one of several processes, raise in all of them; each has to call this.

    Args:
        failure: of this process.
        together: False: the others are not asked.
        error: what another one's failure is raised as; its own is raised as it is.
    """
    told = gathered(None if failure is None else str(failure) or type(failure).__name__, together)
    if failure is not None:
        raise failure
    for number, reason in enumerate(told):
        if reason is not None:
            raise error(reason if number == 0 else f"In process {number}: {reason}")
