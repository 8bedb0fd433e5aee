"""A fresh Python process for one job: it gets a request, and answers in lines of JSON.

The parent's side is :class:`FreshProcess`; :func:`answering` is the child's. Whatever ends the parent's interest (an answer, a
deadline, Ctrl-C), nothing of the child is left: not the process, and nothing that it started, such as a compiler.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

_POLL_SECONDS = 0.2
_DRAINING_SECONDS = 2.0  # for the last lines of a process that has ended
_DYING_SECONDS = 3.0  # the most that is waited for killed processes to disappear


class ProcessFailed(Exception):
    """The process ended without success.

    Args:
        code: its exit code; negative for a signal.
        last_line: of its standard error; empty where it said nothing.
    """

    def __init__(self, code: int, last_line: str) -> None:
        self.code, self.last_line = code, last_line
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as a system short of memory does" if name == "SIGKILL" else ""
            super().__init__(f"its process was ended by {name}{hint}")
        else:
            super().__init__(f"its process ended with code {code}" + (f": {last_line[:160]}" if last_line else ""))


class TimedOut(Exception):
    """The process has not answered before the deadline."""


def command_of(module: str, request: Mapping[str, Any]) -> list[str]:
    """The command line that runs one of our modules, with the request as its argument."""
    return [sys.executable, "-P", "-m", module, json.dumps(request)]


class FreshProcess:
    """The parent's side; a context, which ends the process.

    Args:
        command: as :func:`command_of` makes it.
        environment: this process's by default.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        # In a session of its own: Ctrl-C in a terminal reaches the parent alone, which then ends all of the session.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: receive() will say so
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def receive(self, deadline: float = float("inf")) -> dict[str, Any] | None:
        """The next answer; None once the process has ended with success.

        Args:
            deadline: of :func:`time.monotonic`.

        Raises:
            ProcessFailed: it ended otherwise.
            TimedOut: there is no answer before the deadline.
        """
        while True:
            # What it started may hold its pipe open, so the end of the pipe is not waited for without a limit.
            ended = self._process.poll() is not None
            left = max(0.0, deadline - time.monotonic())
            with contextlib.suppress(queue.Empty):
                if line := self._lines.get(timeout=_DRAINING_SECONDS if ended else min(_POLL_SECONDS, left)):
                    with contextlib.suppress(ValueError):  # a line that is cut off, or not an answer
                        return dict(json.loads(line))
                    continue
                ended = True
            if ended:
                if code := self._process.wait():
                    raise ProcessFailed(code, self._last_line())
                return None
            if time.monotonic() >= deadline:
                raise TimedOut

    def close(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()
        until = time.monotonic() + _DYING_SECONDS  # what it started may still write where a caller deletes
        with contextlib.suppress(OSError):
            while hasattr(os, "killpg") and time.monotonic() < until:
                os.killpg(self._process.pid, 0)  # an error once nobody is left
                time.sleep(0.01)
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def answering() -> Callable[..., None]:
    """In the child: a function that sends its keyword arguments as an answer. What a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    return answer
