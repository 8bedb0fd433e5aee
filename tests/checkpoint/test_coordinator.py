"""What processes tell each other by a store is heard whole, whichever of it comes first."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from onym.checkpoint import coordinator
from onym.checkpoint.coordinator import StoreCoordinator
from onym.errors import StorageError


class Late:
    """A store that takes its time over one process's report, which is counted already."""

    def __init__(self, store: Any, seconds: float) -> None:
        self._store, self._seconds = store, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def set(self, key: str, value: bytes) -> None:
        time.sleep(self._seconds)
        self._store.set(key, value)


def stores(kind: str, count: int) -> list[Any]:
    """One for each process: a server and its clients, or one without calls for many keys at once."""
    if kind == "hash":
        return [dist.HashStore()] * count
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [first, *(dist.TCPStore("127.0.0.1", first.port, is_master=False) for _ in range(count - 1))]


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_every_report_is_heard_and_none_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_AT_ONCE", 4)
    count = 11
    there = stores(kind, count)

    def tell(number: int) -> None:
        store = Late(there[number], 0.3) if number == 3 else there[number]
        mine = StoreCoordinator(store, "x", number, count, "it")
        mine.report("written", f"from {number}")
        mine.report("read", number * number)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(1, count)]
    first = StoreCoordinator(there[0], "x", 0, count, "it")
    first.report("written", "from 0")
    first.report("read", 0)
    for thread in reversed(threads):
        thread.start()
    assert first.reports("written") == [f"from {number}" for number in range(count)]
    assert first.reports("read") == [number * number for number in range(count)]
    for thread in threads:
        thread.join()


def test_a_failure_is_told_with_the_number_of_whose_it_was() -> None:
    (store,) = stores("tcp", 1)
    first, second = (StoreCoordinator(store, "x", number, 2, "it") for number in range(2))
    second.report("written", failure=OSError("the disk is full"))
    first.report("written", 1)
    with pytest.raises(StorageError, match="On rank 1: the disk is full"):
        first.reports("written")
    with pytest.raises(StorageError, match="On rank 1: the disk is full"):
        second.decision()
