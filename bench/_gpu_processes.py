"""The parent's side of bench/gpu.py's child processes: started within bounds of time and memory, then asked in turns.

    start_all: the most important first, as many at once as memory and cores allow; what runs out of memory beside others is
               started again alone; what is not ready in time is ended
    take_turns: a turn of each, in an order that turns, as many rounds as there is time for

What fails has its reason, and costs its own rows alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _gpu_children import OUT_OF_MEMORY
from onym.train.fresh_process import FreshProcess, ProcessFailed, TimedOut

LEFT_OUT = "left out: no time left"
_POLL_SECONDS = 0.05
_TURN_SECONDS = 90.0
"""The longest that a turn may take."""


class Failed(Exception):
    """A child that gives no answer any more; the text says why."""


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"  {text}", file=sys.stderr, flush=True)


@dataclass
class Job:
    """One child process.

    Args:
        name: as progress calls it.
        request: what the child is told, but for what all have in common.
        gib: device memory that it takes at its peak.
        idle_gib: that it keeps between its turns.
        least_seconds: it is not begun with less time left.
    """

    name: str
    request: Mapping[str, Any]
    gib: float = 1.0
    idle_gib: float = 1.0
    least_seconds: float = 5.0
    ready: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    """Why there is nothing of it."""
    alone: bool = False
    """Whether nothing else may start beside it."""
    began: float = 0.0
    _process: FreshProcess | None = field(default=None, repr=False)

    @property
    def live(self) -> bool:
        """Whether it can be asked for turns."""
        return bool(self.ready) and not self.failed

    def start(self, common: Mapping[str, Any], compile_threads: int) -> None:
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(compile_threads)}
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--child"]
        self.began = time.monotonic()
        self._process = FreshProcess([*command, json.dumps({**self.request, "common": common})], environment)

    def is_settled(self) -> bool:
        """Whether it is ready, or has failed; does not wait."""
        try:
            answer = self._answer(0.0)
        except TimedOut:
            return False
        except Failed as failed:
            self.fail(str(failed))
            return True
        self.ready = answer["ready"]
        return True

    def turn(self, **what: Any) -> dict[str, Any]:
        """Let it compute.

        Raises:
            Failed: it has ended, or does not answer; nothing is left of it.
        """
        if self._process is None:
            raise Failed(self.failed)
        try:
            self._process.send(json.dumps(what))
            return self._answer(time.monotonic() + _TURN_SECONDS)
        except TimedOut:
            self.fail(f"no answer in {_TURN_SECONDS:.0f} s")
            raise Failed(self.failed) from None
        except Failed as failed:
            self.fail(str(failed))
            raise

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self._process is not None
        try:
            answer = self._process.receive(deadline)
        except ProcessFailed as failed:
            raise Failed(str(failed)) from failed
        if answer is None:
            raise Failed("its process ended without an answer")
        if "failed" in answer:
            raise Failed(str(answer["failed"]))
        return answer

    def fail(self, reason: str) -> None:
        """Give it up."""
        self.failed = reason
        self.close()

    def close(self) -> None:
        """End it and what it started."""
        if self._process is not None:
            self._process.close()
            self._process = None


def start_all(jobs: list[Job], common: Mapping[str, Any], deadline: float, gib: float, at_once: int) -> None:
    """Start child processes, and wait until each is ready or has failed.

    Args:
        jobs: the most important first.
        common: what all children are told.
        deadline: of :func:`time.monotonic`; what is not ready then has failed.
        gib: device memory for all of them.
        at_once: how many may start at the same time.
    """
    waiting, starting = list(jobs), list[Job]()
    # On a CPU the pool of compiling processes would compute beside the turns; a GPU's many kernels want several.
    threads = 1 if common["device"] == "cpu" else max(2, (os.cpu_count() or 1) // max(1, min(at_once, len(jobs))))
    while waiting or starting:
        now = time.monotonic()
        if now >= deadline:
            for job in starting:
                job.failed = f"left out: not ready after {now - job.began:.0f} s"
                say(f"{job.name}: {job.failed}")
            close_all(starting)
        for job in [job for job in waiting if deadline - now < job.least_seconds]:
            job.fail(LEFT_OUT)
            say(f"{job.name}: {job.failed}")
            waiting.remove(job)
        if now >= deadline:
            return
        while waiting and _fits(waiting[0], starting, jobs, gib, at_once):
            job = waiting.pop(0)
            job.start(common, threads)
            starting.append(job)
        for job in [job for job in starting if job.is_settled()]:
            starting.remove(job)
            seconds = time.monotonic() - job.began
            if job.failed == OUT_OF_MEMORY and not job.alone and len(jobs) > 1:
                job.failed, job.alone = "", True
                waiting.append(job)
                say(f"{job.name}: out of memory beside others; again, alone")
            else:
                lost = "; ".join(dict.fromkeys(job.ready.get("failed", {}).values()))  # rows of it
                say(f"{job.name}: {job.failed or lost or 'ready'} after {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def close_all(jobs: Collection[Job]) -> None:
    """End all of them at once: to leave a GPU takes a process a second."""
    with ThreadPoolExecutor(max(1, len(jobs))) as threads:
        list(threads.map(Job.close, jobs))


def _fits(job: Job, starting: Collection[Job], jobs: Collection[Job], gib: float, at_once: int) -> bool:
    if not starting:
        return True  # whether it really does shows then
    if job.alone or any(each.alone for each in starting) or len(starting) >= at_once:
        return False
    held = sum(each.gib for each in starting) + sum(each.idle_gib for each in jobs if each.live)
    return held + job.gib <= gib


Ask = Callable[[int], dict[str, Any]]
"""One turn, by the number of the round."""


@dataclass
class Turns:
    """What turns gave, by name."""

    answers: dict[str, list[dict[str, Any]]]
    failed: dict[str, str] = field(default_factory=dict)


def take_turns(what: str, asks: Mapping[str, Ask], rounds: int, deadline: float) -> Turns:
    """Ask each in turns; one that fails is asked no more, and its turns do not count.

    Args:
        what: as progress calls it.
        rounds: at most; at least one is taken.
        deadline: of :func:`time.monotonic`; no round begins that would not end before it.
    """
    taken, longest = Turns({name: [] for name in asks}), 0.0
    for number in range(rounds):
        began = time.monotonic()
        if number and began + longest > deadline:
            say(f"{what}: no time for more than {number} of {rounds} rounds")
            break
        names = [name for name in asks if name not in taken.failed]
        for name in names if number % 2 == 0 else reversed(names):
            if name in taken.failed:  # a process may have several rows
                continue
            try:
                taken.answers[name].append(asks[name](number))
            except Failed as failed:
                taken.failed[name] = str(failed)
                say(f"{name}: {failed}")
        longest = max(longest, time.monotonic() - began)
        say(f"{what}: round {number + 1} of {rounds} took {time.monotonic() - began:.1f} s")
    for name in taken.failed:
        taken.answers.pop(name)
    return taken
