"""How fast training is: the time of the steps alone, without evaluation, sampling, saving and compiling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Times steps.

    Args:
        tokens_per_step: tokens in one.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self._steps = self._recent_steps = 0
        self._seconds = self._recent_seconds = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """The time of one step."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._steps += 1
        self._recent_steps += 1
        self._seconds += seconds
        self._recent_seconds += seconds

    def tokens_per_second(self) -> float:
        """Over the steps since the last call; 0 where there were none."""
        rate = self.tokens_per_step * self._recent_steps / self._recent_seconds if self._recent_steps else 0.0
        self._recent_steps, self._recent_seconds = 0, 0.0
        return rate

    def mean_tokens_per_second(self) -> float:
        """Over all steps; 0 where there were none."""
        return self.tokens_per_step * self._steps / self._seconds if self._steps else 0.0
