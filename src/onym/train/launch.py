"""``onym train --processes N``: N processes on this machine, started and ended together.

``torchrun`` does the same and more (several machines, restarts); it answers with a table and the exit code 1 whatever the
reason was. Here signals reach each process once, the exit code is theirs, and one that dies is named.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from onym.errors import RunError
from onym.train.distributed import LAUNCHER

_GRACE_SECONDS = 20.0  # for the others to end by themselves, when one has
_SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)) is not None]


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command in several processes, and return the exit code of the first that failed, or 0.

    Args:
        count: of processes.
        command: what each runs; it finds its number in ``RANK``.

    Raises:
        RunError: one of them died.
    """
    port = free_port()
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    # The user reads one sentence instead of torch's warnings about connections that end.
    shared = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), LAUNCHER: str(os.getpid())}
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        for rank in range(count):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            # In a group of their own: Ctrl-C reaches them through here, once, and not from the terminal as well.
            processes.append(subprocess.Popen(command, env=environment, process_group=0))
        return _watch(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """One that nobody listens at, and that no connection is given meanwhile: systems give those from 32768 on, or 49152."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    ended: dict[int, int] = {}
    until = None
    while len(ended) < len(processes):
        for rank, process in enumerate(processes):
            if rank not in ended and (code := process.poll()) is not None:
                ended[rank] = code
                if code and until is None:
                    until = time.monotonic() + _GRACE_SECONDS
        if until is not None and time.monotonic() > until:
            break
        time.sleep(0.05)
    dead = {rank: -code for rank, code in ended.items() if code < 0}
    if dead:
        rank, number = next(iter(dead.items()))
        raise RunError(
            f"Process {rank} of {len(processes)} was ended by {signal.Signals(number).name}, and the others with it. The same "
            "command continues from the newest checkpoint."
        )
    return next((code for code in ended.values() if code), 0)


def leave_with_the_launcher() -> None:
    """End this process when the one that started it has gone: nothing else would stop it."""
    parent = os.environ.get(LAUNCHER, "")
    if not parent.isdecimal() or os.getppid() != int(parent):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        print("onym: stopped, because the process that started this one has gone.", file=sys.stderr, flush=True)
        os._exit(2)

    threading.Thread(target=watch, name="onym-launcher", daemon=True).start()
