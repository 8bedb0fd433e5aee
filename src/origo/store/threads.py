"""A few threads that share one piece of work.

Not ``concurrent.futures``: its pools take no work while Python exits, which is when the last checkpoint may still be written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

WORKERS = min(4, os.cpu_count() or 1)


def share(work: Callable[[int], None], count: int) -> None:
    """Call ``work`` with 0 to ``count - 1``, each in a thread of its own, 0 in this one; return when all are done.

    Raises:
        Exception: the first that one of them raised.
    """
    failures: list[BaseException] = []

    def attempt(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = []
    here = [0]
    for number in range(1, count):
        thread = threading.Thread(target=attempt, args=(number,), name=f"origo-{number}")
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:  # no more threads are to be had: the work is done all the same
            here.append(number)
    for number in here:
        attempt(number)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
