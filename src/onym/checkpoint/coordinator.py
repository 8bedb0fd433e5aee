"""How ranks coordinate a save in the background: by the rendezvous store, not by collectives.

A background thread must not issue collectives while the training does. Each rank reports once what it has written, and rank 0
decides. Each sends heartbeats meanwhile, so a dead rank is distinguished from one with a slow disk.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch

from onym.errors import StorageError

PATIENCE_SECONDS = 60.0
"""After which a rank without a heartbeat is taken for dead."""
_TICK_SECONDS = 0.5
_SHORTEST_WAIT, _LONGEST_WAIT = 0.001, 0.02
_LINGERING_SECONDS = 5.0
_AT_ONCE = 256  # reports that are asked for together
_SILENT = "no sign of life for {:.0f} seconds"

T = TypeVar("T")


_connection: tuple[Any, Any] = (None, None)


def rendezvous_store() -> Any:
    """A connection of our own to the rendezvous store of torch.distributed: operations of torch do not block it."""
    global _connection
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    if _connection[0] is not store:
        _connection = store, store.clone()
    return _connection[1]


class StoreCoordinator:
    """Of one save, on one rank.

    Args:
        store: the rendezvous store; values go through it as pickles, as in torch's own object collectives.
        token: the unique beginning of the keys of this save.
        rank, world_size: of this process.
        what: is being written, for messages.
    """

    def __init__(self, store: Any, token: str, rank: int, world_size: int, what: str) -> None:
        self._store, self._token = store, token
        self._rank, self._world_size, self._what = rank, world_size, what
        self._failure: str | None = None  # the first one that was reported
        self._given_up, self._stop = threading.Event(), threading.Event()
        self._keys: set[str] = set()
        self._dead = 0
        self._committed = False

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within it, this rank sends heartbeats."""

        def tick() -> None:
            while not self._stop.wait(_TICK_SECONDS):
                with suppress(Exception):  # whoever waits for an answer raises the reason
                    self._store.add(self._key("alive", self._rank), 1)
                    if self._rank and self._store.check([self._key("decided")]):
                        self._given_up.set()

        thread = threading.Thread(target=tick, name="onym-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(_TICK_SECONDS)  # it may wait for a store that does not answer

    @property
    def given_up(self) -> bool:
        """Whether rank 0 has decided while this one was still at work: then it need not continue."""
        return self._given_up.is_set()

    def report(self, stage: str, value: Any = None, failure: BaseException | None = None) -> None:
        """Report to rank 0, once in a stage."""
        message = pickle.dumps((self._rank, value, None if failure is None else str(failure)))

        def send() -> None:
            arrived = self._store.add(self._key(stage, "reports"), 1)
            self._store.set(self._key(stage, arrived), message)

        self._ask(send)

    def reports(self, stage: str) -> list[Any]:
        """The reports of all ranks, by rank. In rank 0.

        Raises:
            StorageError: one of them failed, or has died. All know it then, and none is at work any more.
        """
        self._keys.add(f"{stage}/reports")
        values: dict[int, Any] = {}
        missing, unread, known = set(range(self._world_size)), set[int](), 0
        heartbeats, pause, looked = _Heartbeats(), _SHORTEST_WAIT, time.monotonic()

        def receive() -> list[tuple[int, Any, str | None]]:
            nonlocal known
            reported = self._store.add(self._key(stage, "reports"), 0)
            unread.update(range(known + 1, reported + 1))
            known = reported
            reports, waiting = [], sorted(unread)
            for begin in range(0, len(waiting), _AT_ONCE):
                keys = {each: self._key(stage, each) for each in waiting[begin : begin + _AT_ONCE]}
                if not self._store.check(list(keys.values())):  # one is counted before it is there
                    keys = {each: key for each, key in keys.items() if self._store.check([key])}
                for text in self._values(list(keys.values())):
                    reports.append(pickle.loads(text))
                for each, key in keys.items():
                    self._store.delete_key(key)
                    unread.remove(each)
            return reports

        while missing:
            there = self._ask(receive)
            for rank, value, failure in there:
                missing.discard(rank)
                values[rank] = value
                if failure is not None:
                    self._fail(rank, failure)
            if time.monotonic() - looked > _TICK_SECONDS:
                looked = time.monotonic()
                others = sorted(missing - {self._rank})
                counts = self._ask(partial(self._heartbeats_of, others))
                for rank, count in zip(others, counts, strict=True):
                    if heartbeats.are_late(rank, count):
                        missing.remove(rank)
                        self._dead += 1
                        self._fail(rank, f"{self._fate}: {_SILENT.format(PATIENCE_SECONDS)}.")
            pause = _SHORTEST_WAIT if there else min(pause * 2, _LONGEST_WAIT)
            if missing:
                time.sleep(pause)
        if self._failure is not None:
            raise StorageError(self._failure)
        return [values[rank] for rank in range(self._world_size)]

    def decide(self, value: Any = None, failure: BaseException | str | None = None, stage: str = "decided") -> None:
        """Publish a decision, in rank 0. The first one of a stage stays."""
        if stage in self._keys:
            return
        self._keys.add(stage)
        if stage == "decided":
            self._committed = failure is None
            self._given_up.set()
        message = pickle.dumps((value, None if failure is None else str(failure)))
        self._ask(lambda: self._store.set(self._key(stage), message))

    def decision(self, stage: str = "decided") -> Any:
        """The decision of rank 0.

        Raises:
            StorageError: the failure that it published; or it has died.
        """
        heartbeats, pause = _Heartbeats(), _SHORTEST_WAIT

        def look() -> tuple[bytes | None, int]:
            if self._store.check([self._key(stage)]):
                return self._store.get(self._key(stage)), 0
            return None, self._store.add(self._key("alive", 0), 0)

        while True:
            message, count = self._ask(look)
            if message is not None:
                break
            if heartbeats.are_late(0, count):
                raise StorageError(f"{self._fate}: rank 0: {_SILENT.format(PATIENCE_SECONDS)}.")
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_WAIT)
        value, failure = pickle.loads(message)
        if failure is not None:
            raise StorageError(failure)
        self._committed = True
        return value

    def leave(self) -> None:
        """End. Rank 0 waits some seconds for the others to do so, and frees the keys in the store."""
        key = self._key("heard")
        with suppress(Exception):
            if self._rank:
                self._ask(lambda: self._store.add(key, 1))
                return
            until = time.monotonic() + _LINGERING_SECONDS
            while self._ask(lambda: self._store.add(key, 0)) < self._world_size - 1 - self._dead and time.monotonic() < until:
                time.sleep(_SHORTEST_WAIT)
            alive = [f"alive/{rank}" for rank in range(self._world_size)]
            self._ask(lambda: [self._store.delete_key(self._key(each)) for each in (*self._keys, "heard", *alive)])

    def _values(self, keys: list[str]) -> list[bytes]:
        if len(keys) > 1 and self._store.has_extended_api():
            values: list[bytes] = self._store.multi_get(keys)
            return values
        return [self._store.get(key) for key in keys]

    def _heartbeats_of(self, ranks: list[int]) -> list[int]:
        return [self._store.add(self._key("alive", rank), 0) for rank in ranks]

    def _fail(self, rank: int, failure: str) -> None:
        if self._failure is None:
            self._failure = failure if rank == 0 else f"On rank {rank}: {failure}"
            self.decide(failure=self._failure)  # ranks that still write need not continue

    def _key(self, *parts: object) -> str:
        return "/".join(("onym", self._token, *map(str, parts)))

    def _ask(self, operation: Callable[[], T]) -> T:
        """The store's answer. It may be in a process that hangs, so the wait is bounded."""
        answers: list[T] = []
        errors: list[Exception] = []

        def ask() -> None:
            try:
                answers.append(operation())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=ask, name="onym-asks", daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        if answers:
            return answers[0]
        if errors and not isinstance(errors[0], RuntimeError):  # DistNetworkError and its kin are
            raise errors[0]
        reason = str(errors[0]).splitlines()[0][:160] if errors else _SILENT.format(PATIENCE_SECONDS)
        raise StorageError(f"{self._fate}: the connection to the other ranks broke ({reason}).")

    @property
    def _fate(self) -> str:
        return f"{self._what} was saved, and not read back" if self._committed else f"{self._what} was not saved"


class _Heartbeats:
    """When each rank was last seen alive."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}

    def are_late(self, rank: int, count: int) -> bool:
        """Whether a rank sent nothing new for too long."""
        now = time.monotonic()
        before, when = self._last.setdefault(rank, (count, now))
        if before != count:
            self._last[rank] = count, now
            return False
        return now - when > PATIENCE_SECONDS
