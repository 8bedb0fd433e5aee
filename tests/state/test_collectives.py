"""A failure that is raised keeps nothing alive once it is handled: open files of a deleted step would take room still."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onym.checkpoint.background import BackgroundTask
from onym.errors import CheckpointError
from onym.state.collectives import raise_on_all_ranks, run_on_all_ranks


class Opened:
    """What stands for an open file."""


@pytest.fixture
def _uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def in_background(work: Callable[[], Any]) -> None:
    task = BackgroundTask("this")
    task.start(work)
    task.wait()


def given(work: Callable[[], Any]) -> None:
    try:
        work()
    except CheckpointError as error:
        raise_on_all_ranks(error)


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("run", [run_on_all_ranks, in_background, given])
def test_it_goes_without_being_collected(run: Callable[[Callable[[], Any]], Any]) -> None:
    seen: list[weakref.ref[Opened]] = []

    def work() -> None:
        opened = Opened()
        seen.append(weakref.ref(opened))
        raise CheckpointError("no")

    failed = False
    try:
        run(work)
    except CheckpointError:
        failed = True
    assert failed
    assert seen[0]() is None
