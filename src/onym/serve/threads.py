"""Work in another thread, whose result the event loop waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def result_of(call: Callable[[], T], start: Callable[[Callable[[], None]], object]) -> T:
    """What a call gives or raises.

    Args:
        call: the work.
        start: has what it is given run in the other thread.
    """
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():  # nobody waits any more
            return
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    start(run)
    return await asyncio.wrap_future(future)


async def in_own_thread(call: Callable[[], T]) -> T:
    """What a call gives, in a thread that ends with it, and does not keep the program from ending.

    No thread of a pool, because one that has computed with torch keeps threads of OpenMP for as long as it lives. With more of
    these than cores libgomp lets each wait asleep, and the thread that decodes then takes 1.5 times as long for a step
    (docs/performance.md).
    """
    return await result_of(call, lambda run: Thread(target=run, name="onym-reads", daemon=True).start())
