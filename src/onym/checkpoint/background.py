"""Saving in the background: one copy of the state, then everything else in a thread.

The training waits for the copy, so it goes into buffers that are reused: fresh memory costs ten times as much as the copying.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from onym.format.safetensors import as_bytes
from onym.format.stored import gather, in_memory
from onym.storage.threads import WORKERS, run_in_threads

_COPY_BYTES = 8 << 20


class Staging:
    """Buffers for a state, reused from save to save: pinned ones for what comes from a GPU, so that it is copied directly."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """How much memory they take."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """The same tensors, by file and name, as they are now. The next call overwrites them."""
        buffers: dict[tuple[str, str], Tensor] = {}
        staged: dict[str, dict[str, Tensor]] = {}
        moves: list[tuple[int, int, int]] = []
        devices: set[torch.device] = set()
        alive = []  # temporary copies that are still read
        for file, state in tensors.items():
            stored = gather(state)
            staged[file] = {}
            for name, tensor in stored.tensors.items():
                buffer = self._buffer(file, name, tensor)
                buffers[file, name] = staged[file][name] = buffer
                if tensor.device.type == "cuda":
                    buffer.copy_(tensor, non_blocking=True)
                    devices.add(tensor.device)
                elif tensor.nbytes:
                    source = in_memory(tensor)
                    alive.append(source)
                    start, target = as_bytes(source).data_ptr(), as_bytes(buffer).data_ptr()
                    moves += [
                        (target + begin, start + begin, min(_COPY_BYTES, source.nbytes - begin))
                        for begin in range(0, source.nbytes, _COPY_BYTES)
                    ]
            staged[file].update({alias: staged[file][name] for alias, name in stored.aliases.items()})
        self._buffers = buffers
        _move(moves)
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def _buffer(self, file: str, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get((file, name))
        if buffer is not None and (buffer.dtype, buffer.shape) == (tensor.dtype, tensor.shape):
            return buffer
        with torch.inference_mode(False):
            if tensor.device.type == "cuda":
                with suppress(RuntimeError):  # a system limits how much can be pinned; a copy into other memory is slower
                    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _move(moves: list[tuple[int, int, int]]) -> None:
    """Copy memory with several threads. torch divides each tensor among them, and waits for the slowest one each time."""

    threads = WORKERS if len(moves) > 1 else 1

    def work(number: int) -> None:
        for target, source, length in moves[number::threads]:
            ctypes.memmove(target, source, length)

    run_in_threads(work, threads)


class BackgroundTask:
    """At most one piece of work at a time in a thread. Its error is raised once, or printed when the program ends."""

    def __init__(self, what: str) -> None:
        self.what = what
        # Not Thread.is_alive and join: once a join was interrupted (Ctrl-C), Python takes the thread for ended.
        self._done = threading.Event()
        self._done.set()
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether it is still at work."""
        return not self._done.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """Begin; the one before has to be done, and its error raised."""
        assert not self.busy
        assert self._error is None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
                _failed.append(self)  # a strong reference: whoever started it may be gone
            finally:
                _running.discard(self)
                self._done.set()

        # Not a daemon: Python waits for it before it exits.
        thread = threading.Thread(target=run, name="onym-save")
        self._done.clear()
        _running.add(self)
        try:
            thread.start()
        except RuntimeError:  # none can be had any more, as at the exit
            run()

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            Exception: what went wrong in it; raised once.
        """
        if (error := self.forget()) is not None:
            try:
                raise error
            finally:
                del error  # see run_on_all_ranks

    def forget(self) -> BaseException | None:
        """Return when it is done; its error is returned once, and not raised."""
        self._done.wait()
        error, self._error = self._error, None
        if error is not None:
            _failed.remove(self)
        return error


_failed: list[BackgroundTask] = []
_running: set[BackgroundTask] = set()


@atexit.register
def _print_errors() -> None:
    for task in list(_running):  # begun by somebody else's work at the exit, which Python does not wait for
        task._done.wait()
    for task in _failed:
        print(f"onym: {task.what} was not saved: {task._error}", file=sys.stderr)
