"""The next batch is read while this one is computed.

One batch ahead, in one thread: a batch is a function of its number alone, so what was read ahead and is not wanted after all (a
roll-back leaves text out) is dropped, and nothing else changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from onym.data.batches import Batch


class Prefetcher:
    """Batches by number, on the device that computes.

    Args:
        read: a batch by its number, both parts on the CPU.
        device: where they are to be. For a GPU they go through pinned memory, and the copy is not waited for.
    """

    def __init__(self, read: Callable[[int], Batch], device: torch.device) -> None:
        self._read, self._device = read, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onym-batches")
        self._ahead: tuple[int, Future[Batch]] | None = None
        self.waited_seconds = 0.0
        """In all, for batches that were not there yet."""

    def take(self, number: int, following: int) -> Batch:
        """A batch, and begin to read the one that will be asked for next.

        Raises:
            Exception: what reading raises.
        """
        start = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        inputs, targets = ahead[1].result() if ahead is not None and ahead[0] == number else self._prepared(number)
        self.waited_seconds += time.perf_counter() - start
        self._ahead = (following, self._thread.submit(self._prepared, following))
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _prepared(self, number: int) -> Batch:
        inputs, targets = self._read(number)
        if self._device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets
