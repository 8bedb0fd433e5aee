"""Work that takes long, in a thread that ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def in_own_thread(call: Callable[[], T]) -> T:
    """The result of a call, which does not keep the program from ending.

    No thread of a pool, because one that has computed with torch keeps threads of OpenMP for as long as it lives. With more of
    these than cores libgomp lets each wait asleep, and the thread that decodes then takes 1.5 times as long for a step
    (docs/performance.md).
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        future.set_exception(error) if error is not None else future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    Thread(target=work, name="onym-reads", daemon=True).start()
    return await future
