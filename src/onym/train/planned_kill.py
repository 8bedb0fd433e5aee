"""A process that ends itself without notice inside a chosen step, for ``onym tools check-resume``.

``ONYM_KILL_AT=STEP:RANK:SHARE``: in this step of the process that has this in its RANK (nothing, of a run of one process; so a
launcher is never meant), after that share of the time that the step before took. With -1 in the place of STEP: that many
seconds after the start, at the latest in the first step. Placed by step and not by somebody else's
clock, a kill is never too late, however fast the machine is. SIGALRM's default action ends a process as SIGKILL does: at once,
at any instruction, and nothing is cleaned up.
"""

from __future__ import annotations

import os
import signal
import time

KILL_AT = "ONYM_KILL_AT"
AT_THE_START = -1


class PlannedKill:
    """What ``ONYM_KILL_AT`` says of this process; nothing happens without it."""

    def __init__(self) -> None:
        step, rank, share = (os.environ.get(KILL_AT) or f"0:{AT_THE_START}:0").split(":")
        self._is_mine = rank == os.environ.get("RANK", "")
        self._step, self._share, self._began = int(step), float(share), time.monotonic()
        if self._is_mine and self._step == AT_THE_START:
            self._arm(self._share)

    def before(self, step: int) -> None:
        """Called before each step of the training."""
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        if self._is_mine and step > self._step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_mine and step == self._step:
            self._arm(self._share * seconds)

    def _arm(self, seconds: float) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


planned_kill = PlannedKill()  # at the import, so that a process can be ended while it starts
