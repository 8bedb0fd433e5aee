"""Why a run stops before its end: Ctrl-C, a signal of a batch scheduler, or its time being up.

Each of them finishes the step and saves it, whatever else is sent meanwhile. Only a second Ctrl-C stops at once, with the last
checkpoint intact.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from onym.train.distributed import DistContext

TIME_IS_UP = 75  # EX_TEMPFAIL of sysexits.h: the same command, again

# SIGUSR1 is what batch schedulers send ahead of their SIGTERM (as Slurm with --signal); Windows has none.
_SIGNALS = {name: number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)) is not None}


class StopRequest:
    """Listens to signals while it is entered, and watches the clock.

    Args:
        time_limit: seconds that the run may take in all, as of ``since``; None for any time.
        since: when it began, of :func:`time.monotonic`.
        ranks: this process among those that have to stop together; then each has to ask after each step.
    """

    def __init__(self, time_limit: float | None = None, since: float = 0.0, ranks: DistContext = DistContext()) -> None:  # noqa: B008
        self.exit_code = 0
        """0, or the exit code that says why to stop: 128 and the signal's number, as a shell has it, or 75 for the time."""
        self.reason = ""
        self.reserve = 0.0
        """Seconds that stopping takes: writing the last checkpoint."""
        self._ranks = ranks
        self._ends = None if time_limit is None else since + time_limit
        self._longest = 0.0  # seconds from one look at the clock to the next
        self._looked_at = time.monotonic()
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step. Asked after each: where one as long as the longest would not fit, time is up."""
        now = time.monotonic()
        self._longest, self._looked_at = max(self._longest, now - self._looked_at), now
        if not self.exit_code and self._ends is not None and now + self._longest + self.reserve >= self._ends:
            self.exit_code, self.reason = TIME_IS_UP, "the --time-limit is reached"
        code = self._ranks.max(self.exit_code)
        if code and code != self.exit_code:
            self.exit_code = code
            self.reason = "the --time-limit is reached" if code == TIME_IS_UP else _reason(code - 128)
        return bool(code)  # not a signal that came during the all-reduce: the next call sees it

    def __enter__(self) -> StopRequest:
        self._looked_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS.values()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        if not self.exit_code:
            self.exit_code, self.reason = 128 + number, _reason(number)
        if self._ranks.is_rank0:
            print(f"\nFinishing the step and saving it{again}.", file=sys.stderr, flush=True)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _reason(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
