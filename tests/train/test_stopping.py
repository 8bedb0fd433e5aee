"""Signals, time limits and full disks: a real run is stopped, or its disk is, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onym.checkpoint.steps import steps
from onym.errors import ConfigError
from onym.train.signals import StopRequest
from onym.units import parse_duration
from tests.cli.test_train import EAGER, assert_equal_bits, checkpoint, metrics, start
from tests.conftest import Run

LONG = (*EAGER, "--steps", 100_000, "--eval-every", 100_000, "--save-every", 20)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_keeps_the_step_and_the_same_command_continues(
    onym: Run, book: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "runs/book"
    process = start("train", "--data", book, *LONG, cwd=tmp_path, kill_at=run / "checkpoints/step-000000020")
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == code, out
    last = steps(run / "checkpoints")[-1]
    assert f"Stopped after step {last} ({'Ctrl-C' if code == 130 else number.name}); everything is saved" in out.decode()
    assert "The same command continues" in out.decode()
    assert onym("verify", run).returncode == 0
    done = onym("train", "--data", book, "--steps", last + 3)
    assert done.returncode == 0, done.stderr
    assert f"Continuing after step {last} of {last + 3}" in done.stdout


def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint_whole(onym: Run, book: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/book"
    process = start("train", "--data", book, *LONG, cwd=tmp_path, kill_at=run / "checkpoints/step-000000020")
    process.send_signal(signal.SIGSTOP)  # so that both are there before the step is done
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.returncode in (130, -signal.SIGINT), process.stdout and process.stdout.read()
    assert onym("verify", run).returncode == 0


def test_a_scheduler_that_sends_one_signal_after_the_other_loses_nothing(onym: Run, book: Path, tmp_path: Path) -> None:
    """As Slurm does: SIGUSR1, then SIGTERM; here as soon as the first is heard, and again and again until all is over."""
    run = tmp_path / "runs/book"
    command = ("train", "--data", book, *LONG, "--save-every", 100_000)
    process = start(*command, cwd=tmp_path, kill_at=run / "samples/step-000000000.txt")
    while len(metrics(run)) < 2 and process.poll() is None:  # it trains
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    for line in process.stdout:
        if b"Finishing the step" in line:
            break
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    out = process.communicate()[0].decode()
    assert process.returncode in (138, -signal.SIGTERM), out
    assert len(steps(run / "checkpoints")) == 1, out
    assert onym("verify", run).returncode == 0


def test_the_time_limit_stops_a_run_that_the_same_command_continues(onym: Run, book: Path, tmp_path: Path) -> None:
    command = ("train", "--data", book, *LONG, "--time-limit", "3s")
    reached = []
    for _ in range(2):
        done = onym(*command)
        assert done.returncode == 75, done.stdout + done.stderr
        reached.append(steps(tmp_path / "runs/book/checkpoints")[-1])
        assert f"Stopped after step {reached[-1]} (the --time-limit is reached); everything is saved" in done.stdout
    assert reached[0] < reached[1]


def test_time_is_up_when_a_step_as_long_as_the_longest_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopRequest(60.0, since=90.0) as stop:
        asked = []
        for seconds in (5, 20, 5, 5):
            now += seconds
            asked.append(stop.requested)
        assert asked == [False, False, True, True], "at 130 of 150 another 20 s would not fit"
        assert stop.exit_code == 75
    now = 100.0
    with StopRequest(60.0, since=90.0) as stop:
        stop.reserve = 30.0
        now += 11
        assert stop.requested, "writing the checkpoint takes 30 s more"
    now = 1e9
    with StopRequest() as stop:
        now += 1e9
        assert not stop.requested


@pytest.mark.parametrize("text", ["", "soon", "0", "3h55", "-1h", "1h1h", "5 parsecs", "٣h", "9" * 20])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--time-limit is a time as 3h55m"):
        parse_duration(text, "--time-limit")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6000000", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # lazily: this process has files of it mapped


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                if not file.write(bytes(4096)):
                    break
            except OSError:
                break
    return filler


def test_a_full_disk_does_not_stop_training(onym: Run, book: Path, tmp_path: Path, small_disk: Path) -> None:
    command = ("train", "--data", book, *EAGER, "--steps", 800, "--save-every", 50, "--eval-every", 400, "--log-every", 50)
    run = small_disk / "book"
    process = start(*command, "--runs-dir", small_disk, cwd=tmp_path, kill_at=run / "checkpoints/step-000000050")
    filler = fill(small_disk)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.decode())
        if "A checkpoint was not saved" in said[-1]:
            break
    filler.unlink()
    out = "".join(said) + process.communicate()[0].decode()
    assert process.returncode == 0, out
    assert "the disk is full" in out
    assert "Training continues" in out
    assert steps(run / "checkpoints")[-1] == 800
    rows = [row for row in metrics(run) if "event" not in row]
    assert [row["step"] for row in rows] == list(range(0, 801, 50)), metrics(run)
    assert onym("verify", run).returncode == 0


def test_a_disk_that_stays_full_ends_the_run_with_the_reason(onym: Run, book: Path, tmp_path: Path, small_disk: Path) -> None:
    command = ("train", "--data", book, *EAGER, "--steps", 160, "--save-every", 20, "--eval-every", 160)
    assert onym(*command, "--name", "straight").returncode == 0
    run = small_disk / "book"
    process = start(*command, "--runs-dir", small_disk, cwd=tmp_path, kill_at=run / "checkpoints/step-000000020")
    filler = fill(small_disk)
    out = process.communicate()[0].decode()
    assert process.returncode == 2, out
    assert "the disk is full" in out.splitlines()[-1]
    kept = steps(run / "checkpoints")[-1]
    assert kept < 160, "it was filled too late to test anything"
    filler.unlink()
    done = onym(*command, "--runs-dir", small_disk)
    assert done.returncode == 0, done.stderr
    assert f"Continuing after step {kept} of 160" in done.stdout
    assert_equal_bits(checkpoint(tmp_path / "runs/straight", 160), checkpoint(run, 160))


def test_two_processes_do_not_train_one_run(onym: Run, book: Path, tmp_path: Path) -> None:
    process = start("train", "--data", book, *LONG, cwd=tmp_path, kill_at=tmp_path / "runs/book/checkpoints/step-000000020")
    second = onym("train", "--data", book, *LONG)
    process.kill()
    process.wait()
    assert second.returncode == 2
    assert f"process {process.pid}" in second.stderr
    assert "Text" not in second.stdout, "told before the work begins"


if sys.platform == "win32":
    pytestmark = pytest.mark.skip(reason="signals are POSIX's")
