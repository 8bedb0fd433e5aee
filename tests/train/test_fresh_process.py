"""A process for one job: its answers, its end, and nothing of it left behind."""

from __future__ import annotations

import os
import sys
import time

import pytest

from onym.train.fresh_process import FreshProcess, ProcessFailed, TimedOut

ANSWERS = "from onym.train.fresh_process import answering; answer = answering(); print('noise'); "


def process(program: str) -> FreshProcess:
    return FreshProcess([sys.executable, "-c", program])


def test_answers_come_in_their_order_and_what_a_library_prints_is_none() -> None:
    with process(ANSWERS + "answer(a=int(input())); answer(b=[1.5])") as worker:
        worker.send("7")
        assert [worker.receive(), worker.receive(), worker.receive()] == [{"a": 7}, {"b": [1.5]}, None]


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit('no room')", 1, "its process ended with code 1: no room"),
        ("import os; os.kill(os.getpid(), 9)", -9, "its process was ended by SIGKILL, as a system short of memory does"),
        ("import os; os._exit(7)", 7, "its process ended with code 7"),
    ],
)
def test_an_end_without_success_is_told_with_its_last_words(program: str, code: int, said: str) -> None:
    with process(program) as worker, pytest.raises(ProcessFailed) as failed:
        worker.receive()
    assert (failed.value.code, str(failed.value)) == (code, said)


def test_the_deadline_ends_the_wait_and_the_process_with_all_that_it_started() -> None:
    """A grandchild that holds the pipe open."""
    child = "import time; time.sleep(600)"
    program = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', '{child}']); print('{{\"pid\": %d}}' % c.pid"
    )
    with process(program + ", flush=True); c.wait()") as worker:
        answer = worker.receive()
        assert answer is not None
        with pytest.raises(TimedOut):
            worker.receive(time.monotonic())
    with pytest.raises(ProcessLookupError):
        while True:  # until it has disappeared
            os.kill(answer["pid"], 0)


def test_an_end_is_seen_although_a_grandchild_holds_the_pipe() -> None:
    child = "import time; time.sleep(600)"
    with process(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{child}'])") as worker:
        assert worker.receive() is None
