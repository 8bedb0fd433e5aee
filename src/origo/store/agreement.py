"""What several processes tell each other of one save, behind the back of their training.

Not by collectives, which a thread may not use while the training uses them: by keys in the store that the processes met by.
Each reports once what it has written; the first one decides. Each gives signs of life meanwhile, so one that died is told from
one whose disk is slow.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from origo.errors import OrigoError, StorageError

PATIENCE_SECONDS = 60.0
"""After which a process that gives no sign of life is given up."""
_TICK_SECONDS = 0.5
_SHORTEST_WAIT, _LONGEST_WAIT = 0.001, 0.1


def meeting_store() -> Any:
    """The store that the processes of torch.distributed met by, on a connection of its own: no wait of torch's holds it up."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    return store.clone()


class Agreement:
    """One save's.

    Args:
        store: of torch.distributed; what is told goes through it as pickles, as torch's own collectives do it.
        token: nobody else uses it as the beginning of a key.
        number, count: this process among those that save.
        what: is being written, for sentences.
    """

    def __init__(self, store: Any, token: str, number: int, count: int, what: str) -> None:
        self._store, self._token = store, token
        self._number, self._count, self._what = number, count, what
        self._stages: list[str] = []
        self._given_up = threading.Event()
        self._stop = threading.Event()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within it, the others see that this process lives."""

        def tick() -> None:
            while not self._stop.wait(_TICK_SECONDS):
                with suppress(Exception):  # whoever waits for an answer finds out, and tells
                    self._store.add(self._key("alive", self._number), 1)
                    if self._number and self._store.check([self._key("decided")]):
                        self._given_up.set()

        thread = threading.Thread(target=tick, name="origo-alive")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    @property
    def given_up(self) -> bool:
        """Whether the first process has decided while this one was still at work: then it need not go on."""
        return self._given_up.is_set()

    def report(self, stage: str, value: Any = None, failure: BaseException | None = None) -> None:
        """Tell the first process, once a stage."""
        said = pickle.dumps((self._number, value, None if failure is None else str(failure)))
        with self._connection():
            arrived = self._store.add(self._key(stage, "reports"), 1)
            self._store.set(self._key(stage, arrived), said)

    def reports(self, stage: str) -> list[Any]:
        """What all have reported, in the order of their numbers; the first process calls this.

        Raises:
            StorageError: one of them failed, or has died. All know it then, and none is at work any more.
        """
        self._stages.append(f"{stage}/reports")
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}
        missing, unread, known = set(range(self._count)), set[int](), 0
        signs, pause, looked = _Signs(), _SHORTEST_WAIT, time.monotonic()
        with self._connection():
            while missing:
                reported = self._store.add(self._key(stage, "reports"), 0)
                unread |= set(range(known + 1, reported + 1))
                known = reported
                there = [arrived for arrived in sorted(unread) if self._store.check([self._key(stage, arrived)])]
                for arrived in there:
                    number, value, failure = pickle.loads(self._store.get(self._key(stage, arrived)))
                    self._store.delete_key(self._key(stage, arrived))
                    unread.remove(arrived)
                    missing.discard(number)
                    values[number] = value
                    if failure is not None:
                        failures[number] = failure
                if time.monotonic() - looked > _TICK_SECONDS:
                    looked = time.monotonic()
                    for number in sorted(missing - {self._number}):
                        if signs.silent(number, self._store.add(self._key("alive", number), 0)):
                            failures[number] = f"{self._what} was not kept: no sign of life for {PATIENCE_SECONDS:.0f} seconds."
                            missing.remove(number)
                if failures:
                    self.decide(failure=self._told(failures))  # who still writes need not go on
                pause = _SHORTEST_WAIT if there else min(pause * 2, _LONGEST_WAIT)
                if missing:
                    time.sleep(pause)
        if failures:
            raise self._told(failures)
        return [values[number] for number in range(self._count)]

    def decide(self, value: Any = None, failure: BaseException | None = None) -> None:
        """Tell all; the first process calls this. A failure that was told already stays."""
        if self._given_up.is_set():
            return
        self._given_up.set()
        with self._connection():
            self._store.set(self._key("decided"), pickle.dumps((value, None if failure is None else str(failure))))

    def decision(self) -> Any:
        """What the first process has decided.

        Raises:
            StorageError: what it says went wrong; or it has died.
        """
        with self._connection():
            signs, pause = _Signs(), _SHORTEST_WAIT
            while not self._store.check([self._key("decided")]):
                if signs.silent(0, self._store.add(self._key("alive", 0), 0)):
                    raise StorageError(
                        f"{self._what} was not kept: no sign of life of process 0 for {PATIENCE_SECONDS:.0f} seconds."
                    )
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_WAIT)
            value, failure = pickle.loads(self._store.get(self._key("decided")))
        if failure is not None:
            raise StorageError(failure)
        return value

    def forget(self) -> None:
        """Free what the store holds of it, once all have heard; the first process calls this."""
        with suppress(Exception):
            for key in (*self._stages, "decided"):
                self._store.delete_key(self._key(key))
            for number in range(self._count):
                self._store.delete_key(self._key("alive", number))

    def _key(self, *parts: object) -> str:
        return "/".join(("origo", self._token, *map(str, parts)))

    def _told(self, failures: dict[int, str]) -> OrigoError:
        number, failure = min(failures.items())
        return StorageError(failure if number == 0 else f"In process {number}: {failure}")

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except OrigoError:
            raise
        except RuntimeError as error:  # DistNetworkError and its kin are
            reason = str(error).splitlines()[0][:160]
            raise StorageError(f"{self._what} was not kept: the connection to the other processes broke ({reason}).") from error


class _Signs:
    """When each process was last seen to live."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}

    def silent(self, number: int, count: int) -> bool:
        """Whether there is nothing new of a process for too long."""
        now = time.monotonic()
        before, when = self._last.setdefault(number, (count, now))
        if before != count:
            self._last[number] = count, now
            return False
        return now - when > PATIENCE_SECONDS
