"""``onym tools doctor``, as it is run: on this machine, and on this machine with something missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Run


def test_a_glance_is_told_in_80_columns_and_ends_with_the_command(onym: Run, tmp_path: Path) -> None:
    done = onym("tools", "doctor", "--quick", "--runs-dir", "runs")
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    assert "onym train" in lines[-1]
    assert f"--cache-dir {tmp_path / 'cache'}" not in lines[-1], "the environment says it already"
    table = lines[lines.index("This machine") : -1]
    # A line is longer only for one word, as the name of a folder that pytest has made.
    assert all(len(line) <= 80 or str(tmp_path) in line for line in table)
    for fact in ("memory", "products", "bf16", "C++ compiler", "torch.compile", "runs", "precision", "save every"):
        assert any(line.split("  ")[1].strip() == fact for line in table if line.startswith("  ")), fact
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_json_is_one_complete_object(onym: Run) -> None:
    done = onym("tools", "doctor", "--quick", "--json", "--device", "cpu")
    told = json.loads(done.stdout)
    assert set(told) == {"machine", "quick", "healthy", "advice", "problems", "command"}
    assert told["healthy"] is (done.returncode == 0)
    assert told["machine"]["cores"]["logical"] == os.cpu_count()
    assert told["machine"]["rates"]["fp32"] > 1e8
    assert told["machine"]["trial"] is None
    assert all(set(advice) == {"subject", "setting", "worth"} for advice in told["advice"])


@pytest.mark.slow
def test_the_whole_examination(onym_process: Run, tmp_path: Path) -> None:
    """What it computes takes less than 90 s on all cores; the clock on the wall would time other programs too."""
    before = cpu_seconds_of_children()
    done = onym_process("tools", "doctor", "--json")
    computed = cpu_seconds_of_children() - before
    told = json.loads(done.stdout)
    assert told["machine"]["trial"]["works"] is True, told["machine"]["trial"]
    assert told["machine"]["trial"]["eager_seconds"] > 0
    assert told["machine"]["runs"]["bytes_per_second"] > 1e5
    assert computed / (told["machine"]["cores"]["allowed"]) < 90
    assert list(tmp_path.iterdir()) == []


def cpu_seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_a_hidden_compiler_is_missed(onym_process: Run, tmp_path: Path) -> None:
    done = onym_process("tools", "doctor", CXX="/nonexistent", PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "There is no C++ compiler" in done.stdout
    assert "CXX is set to '/nonexistent'" in done.stdout
    assert "apt install g++" in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1].endswith("--compile off")


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_single_thread_is_noticed_and_its_price_measured(onym_process: Run) -> None:
    done = onym_process("tools", "doctor", "--quick", "--device", "cpu", OMP_NUM_THREADS="1")
    assert done.returncode == 1, done.stderr
    assert "torch computes with 1 thread, and there are" in done.stdout
    assert "export OMP_NUM_THREADS=" in done.stdout
    assert "torch has 1; fp32 products" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("OMP_NUM_THREADS=")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_leaves_no_file_and_no_process(tmp_path: Path, environment: dict[str, str]) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "onym", "tools", "doctor"]
    listens = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({command[0]!r}, {command!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", listens],  # what a shell runs in its background ignores Ctrl-C
        cwd=tmp_path,
        env={**environment, "TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(temporary.glob("onym-doctor-*/cache/*")):  # until the compiler has begun
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == "onym: stopped.\n"
    assert list(temporary.glob("onym-doctor-*")) == []
    until = time.monotonic() + 20
    while left := living(f"TMPDIR={temporary}".encode()):  # a process that was killed takes a moment to end
        assert time.monotonic() < until, left
        time.sleep(0.05)


def living(mark: bytes) -> list[str]:
    """Processes with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes()
        except OSError:  # it has ended, or is somebody else's
            continue
        if mark in environment and b"onym" in environment:
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "tpu"), "There is no device 'tpu' here"),
        (("--runs-dir", "f"), "is a file, not a folder"),
        (("--cache-dir", "f/cache"), "is a file, not a folder"),
    ],
)
def test_bad_input_is_one_sentence(onym: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    (tmp_path / "f").touch()
    done = onym("tools", "doctor", "--quick", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
