"""A few threads that divide one job.

Not ``concurrent.futures``: its pools take no work while Python exits, which is when the last checkpoint may still be written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

WORKERS = min(4, os.cpu_count() or 1)


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Call ``work`` with 0 to ``count - 1``, each in a thread of its own, 0 in this one; return when all are done.

    Raises:
        Exception: the first that one of them raised.
    """
    failures: list[BaseException] = []
    ended = [threading.Event() for _ in range(count)]

    def attempt(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)
        finally:
            ended[number].set()

    here = [0]
    for number in range(1, count):
        try:
            threading.Thread(target=attempt, args=(number,), name=f"onym-{number}").start()
        except RuntimeError:  # no more threads can be started: the work is done here
            here.append(number)
    for number in here:
        attempt(number)
    for event in ended:  # also after Ctrl-C: they use the caller's memory
        while not event.is_set():
            try:
                event.wait()
            except BaseException as error:
                failures.append(error)
    if failures:
        raise failures[0]
