"""``onym tools ladder``, run as a user runs it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onym.cli import ladder as command
from onym.tools.ladder import ladder
from onym.tools.ladder.ladder import RUNGS
from tests.conftest import Run

TINY = ("--preset", "nano", "--vocab-size", 300, "--context-length", 32, "--batch-size", 2)


@pytest.mark.slow
def test_every_rung_has_a_figure_or_a_reason(onym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "_TURN", 0.01)  # turns shorter and fewer than good figures need
    monkeypatch.setattr(ladder, "_MOST_PAIRS", 3)
    # Of those that compile, half a minute each, the first and the last; all of them in make prove.
    rungs = RUNGS if os.environ.get("ONYM_PROVE") else (*RUNGS[:9], RUNGS[-1])
    monkeypatch.setattr(command, "climb", functools.partial(ladder.climb, rungs=rungs))
    done = onym("tools", "ladder", *TINY, "--device", "cpu", "--minutes", 6, "--out", "here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("rung "))
    assert lines[head].split() == ["rung", "tokens/s", "×", "total", "memory", "util", "A100", "×"]
    assert all(len(line) <= 80 for line in lines[head : head + len(rungs) + 1])
    assert lines[-1].startswith("Next: onym train --preset nano --context-length 32 ")
    assert " 3 skipped: TF32" in done.stdout

    values = json.loads((tmp_path / "here/ladder.json").read_text(encoding="utf-8"))
    figures = values["figures"]
    assert [figure["number"] for figure in figures] == list(range(1, len(rungs) + 1))
    for figure in figures:
        assert bool(figure["reason"]) != bool(figure["tokens_per_second"]), figure
        if figure["tokens_per_second"]:
            assert figure["memory_bytes"] > 50e6, "Python and torch alone take more"
            assert figure["utilisation"] > 0
            assert figure["pairs"] > 0
    measured = [figure for figure in figures if figure["factor"]]
    product = 1.0
    for figure in measured:
        product *= figure["factor"]
    assert figures[-1]["total"] == pytest.approx(product)
    assert {figure["number"] for figure in figures if figure["reason"]} <= {3, 5, 6}
    assert values["config"]["vocab_size"] == 300
    picture = (tmp_path / "here/ladder.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "onym", "tools", "ladder", *map(str, TINY), "--device", "cpu", "--minutes", "1"]
    # A shell's background ignores Ctrl-C, and so would the command where the tests run there.
    listens = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({command[0]!r}, {command!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", listens], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(" 1 "):
            break
    while len(below := children(process.pid)) < 2:  # the first rung's, and the second's that is warming up
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip() == "onym: stopped."
    ends = time.monotonic() + 10
    while (left := [pid for pid in below if Path(f"/proc/{pid}").exists()]) and time.monotonic() < ends:
        os.sched_yield()
    assert not left
    assert not (tmp_path / "ladder/ladder.json").exists()


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--minutes", 0), "--minutes must be more than 0, not 0"),
        (("--minutes", "nan"), "--minutes must be more than 0, not nan"),
        (("--batch-size", -1), "--batch-size must be more than 0, not -1"),
        (("--vocab-size", 0), "vocab_size must be a whole number of at least 1, not 0"),
        (("--context-length", -4), "context_length must be a whole number of at least 1, not -4"),
        (("--preset", "mimi"), "A GPT-2 has no preset 'mimi' (did you mean 'mini'?)"),
        (("--device", "tpu"), "There is no device 'tpu' here"),
        (("--out", "file"), "Could not write the ladder at 'file'"),
    ],
)
def test_a_wrong_option_is_one_sentence(onym: Run, tmp_path: Path, arguments: tuple[object, ...], says: str) -> None:
    (tmp_path / "file").touch()
    done = onym("tools", "ladder", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
