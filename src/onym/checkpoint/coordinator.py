"""What several processes tell each other of one save, behind the back of their training.

Not by collectives, which a thread may not use while the training uses them: by keys in the store that the processes met by.
Each reports once what it has written; the first one decides. Each gives signs of life meanwhile, so one that died is told from
one whose disk is slow.
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
"""After which a process that gives no sign of life is given up."""
_TICK_SECONDS = 0.5
_SHORTEST_WAIT, _LONGEST_WAIT = 0.001, 0.02
_LINGERING_SECONDS = 5.0
_AT_ONCE = 256  # reports that are asked for together
_SILENT = "no sign of life for {:.0f} seconds"

T = TypeVar("T")


def meeting_store() -> Any:
    """The store that the processes of torch.distributed met by."""
    return torch.distributed.distributed_c10d._get_default_store()


class StoreCoordinator:
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
        self._failure: str | None = None  # the first one that was told
        self._given_up, self._stop = threading.Event(), threading.Event()
        self._keys: set[str] = set()
        self._dead = 0
        self._kept = False  # it is in place already

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within it, the others see that this process lives."""

        def tick() -> None:
            while not self._stop.wait(_TICK_SECONDS):
                with suppress(Exception):  # whoever waits for an answer finds out, and tells
                    self._store.add(self._key("alive", self._number), 1)
                    if self._number and self._store.check([self._key("decided")]):
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
        """Whether the first process has decided while this one was still at work: then it need not go on."""
        return self._given_up.is_set()

    def report(self, stage: str, value: Any = None, failure: BaseException | None = None) -> None:
        """Tell the first process, once a stage."""
        said = pickle.dumps((self._number, value, None if failure is None else str(failure)))

        def tell() -> None:
            arrived = self._store.add(self._key(stage, "reports"), 1)
            self._store.set(self._key(stage, arrived), said)

        self._asked(tell)

    def reports(self, stage: str) -> list[Any]:
        """What all have reported, in the order of their numbers; the first process calls this.

        Raises:
            StorageError: one of them failed, or has died. All know it then, and none is at work any more.
        """
        self._keys.add(f"{stage}/reports")
        values: dict[int, Any] = {}
        missing, unread, known = set(range(self._count)), set[int](), 0
        signs, pause, looked = _Signs(), _SHORTEST_WAIT, time.monotonic()

        def heard() -> list[tuple[int, Any, str | None]]:
            nonlocal known
            reported = self._store.add(self._key(stage, "reports"), 0)
            unread.update(range(known + 1, reported + 1))
            known = reported
            said, waiting = [], sorted(unread)
            for begin in range(0, len(waiting), _AT_ONCE):
                keys = {each: self._key(stage, each) for each in waiting[begin : begin + _AT_ONCE]}
                if not self._store.check(list(keys.values())):  # one is counted before it is there
                    keys = {each: key for each, key in keys.items() if self._store.check([key])}
                for text in self._values(list(keys.values())):
                    said.append(pickle.loads(text))
                for each, key in keys.items():
                    self._store.delete_key(key)
                    unread.remove(each)
            return said

        while missing:
            there = self._asked(heard)
            for number, value, failure in there:
                missing.discard(number)
                values[number] = value
                if failure is not None:
                    self._tell_failure(number, failure)
            if time.monotonic() - looked > _TICK_SECONDS:
                looked = time.monotonic()
                others = sorted(missing - {self._number})
                counts = self._asked(partial(self._signs_of, others))
                for number, count in zip(others, counts, strict=True):
                    if signs.silent(number, count):
                        missing.remove(number)
                        self._dead += 1
                        self._tell_failure(number, f"{self._fate}: {_SILENT.format(PATIENCE_SECONDS)}.")
            pause = _SHORTEST_WAIT if there else min(pause * 2, _LONGEST_WAIT)
            if missing:
                time.sleep(pause)
        if self._failure is not None:
            raise StorageError(self._failure)
        return [values[number] for number in range(self._count)]

    def decide(self, value: Any = None, failure: BaseException | str | None = None, stage: str = "decided") -> None:
        """Tell all; the first process calls this. What was told already stays."""
        if stage in self._keys:
            return
        self._keys.add(stage)
        if stage == "decided":
            self._kept = failure is None
            self._given_up.set()
        said = pickle.dumps((value, None if failure is None else str(failure)))
        self._asked(lambda: self._store.set(self._key(stage), said))

    def decision(self, stage: str = "decided") -> Any:
        """What the first process has decided.

        Raises:
            StorageError: what it says went wrong; or it has died.
        """
        signs, pause = _Signs(), _SHORTEST_WAIT

        def look() -> tuple[bytes | None, int]:
            if self._store.check([self._key(stage)]):
                return self._store.get(self._key(stage)), 0
            return None, self._store.add(self._key("alive", 0), 0)

        while True:
            said, count = self._asked(look)
            if said is not None:
                break
            if signs.silent(0, count):
                raise StorageError(f"{self._fate}: process 0: {_SILENT.format(PATIENCE_SECONDS)}.")
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_WAIT)
        value, failure = pickle.loads(said)
        if failure is not None:
            raise StorageError(failure)
        self._kept = True
        return value

    def leave(self) -> None:
        """Say that this process has heard all; the first one waits some seconds for that, and frees what the store holds."""
        key = self._key("heard")
        with suppress(Exception):
            if self._number:
                self._asked(lambda: self._store.add(key, 1))
                return
            until = time.monotonic() + _LINGERING_SECONDS
            while self._asked(lambda: self._store.add(key, 0)) < self._count - 1 - self._dead and time.monotonic() < until:
                time.sleep(_SHORTEST_WAIT)
            alive = [f"alive/{number}" for number in range(self._count)]
            self._asked(lambda: [self._store.delete_key(self._key(each)) for each in (*self._keys, "heard", *alive)])

    def _values(self, keys: list[str]) -> list[bytes]:
        if len(keys) > 1 and self._store.has_extended_api():
            values: list[bytes] = self._store.multi_get(keys)
            return values
        return [self._store.get(key) for key in keys]

    def _signs_of(self, numbers: list[int]) -> list[int]:
        return [self._store.add(self._key("alive", number), 0) for number in numbers]

    def _tell_failure(self, number: int, failure: str) -> None:
        if self._failure is None:
            self._failure = failure if number == 0 else f"In process {number}: {failure}"
            self.decide(failure=self._failure)  # who still writes need not go on

    def _key(self, *parts: object) -> str:
        return "/".join(("onym", self._token, *map(str, parts)))

    def _asked(self, operation: Callable[[], T]) -> T:
        """The store's answer. Where it is in a process that hangs it would be waited for without an end."""
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
        raise StorageError(f"{self._fate}: the connection to the other processes broke ({reason}).")

    @property
    def _fate(self) -> str:
        return f"{self._what} was kept, and not read back" if self._kept else f"{self._what} was not kept"


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
