"""Ctrl-C: finish the step, keep a checkpoint, stop. A second one stops at once, with the last checkpoint intact."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Listens while it is entered; ``requested`` says whether to stop after this step."""

    def __init__(self) -> None:
        self.requested = False
        self._before: object = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        print("\nFinishing the step and keeping it; Ctrl-C again stops at once.", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
