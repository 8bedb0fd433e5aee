"""Several processes train as one: the same batches, the same files, one voice; and they stop, fail and go on together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import onym as library
from onym.train import distributed
from onym.train.distributed import DistContext, _rendezvous_id, join
from onym.train.launch import free_port
from onym.train.planned_kill import KILL_AT
from tests.cli.test_train import EAGER, assert_equal_bits, checkpoint, metrics
from tests.conftest import TINY_RUN, Run, workers

RUN = (*EAGER, "--precision", "fp32", "--steps", 40, "--save-every", 10, "--eval-every", 20, "--eval-batches", 3)
COUNTS = (1, 2, 3, 4) if os.environ.get("ONYM_PROVE") else (1, 2)
IN_FULL = bool(os.environ.get("ONYM_PROVE"))
OPTIONS = [("--drop-rate", 0.1, "--micro-batch", 1), ("--optimizer", "muon", "--ema", 0.9)][: None if IN_FULL else 1]
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)][: None if IN_FULL else 1]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


def start(folder: Path, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "onym", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not (folder / f"step-{step:09d}" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("kind", [(), ("--arch", "qwen3", "--optimizer", "muon")], ids=["gpt2", "decoder"])
def test_any_number_of_processes_trains_the_same_model(
    onym_process: Run, book: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    """The same tokens in each step, in the same order: only the order in which numbers are added differs."""
    for processes in COUNTS:
        run = (*RUN, *kind, "--batch-size", 12 if 3 in COUNTS else 4)
        done = onym_process("train", "--data", book, *run, "--name", processes, "--processes", processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("proof ") == 1, "one of them talks"
        assert not done.stderr
    one = [row for row in metrics(tmp_path / "runs/1") if "train_loss" in row]
    for processes in COUNTS[1:]:
        other = [row for row in metrics(tmp_path / f"runs/{processes}") if "train_loss" in row]
        assert [row["step"] for row in other] == [row["step"] for row in one]
        for mine, theirs in zip(one, other, strict=True):
            assert theirs["train_loss"] == pytest.approx(mine["train_loss"], abs=2e-5), mine["step"]
            assert theirs.get("val_loss") == pytest.approx(mine.get("val_loss"), abs=2e-5)
    models = [library.load_model(tmp_path / f"runs/{processes}").state_dict() for processes in COUNTS]
    for name, value in models[0].items():
        for other_model in models[1:]:
            assert torch.allclose(value, other_model[name], atol=2e-4), name


@needs_proc
@pytest.mark.parametrize("options", OPTIONS)
def test_one_that_dies_ends_all_and_the_run_goes_on_bit_for_bit(
    onym_process: Run, book: Path, tmp_path: Path, environment: dict[str, str], options: tuple[object, ...]
) -> None:
    command = ("train", "--data", book, *RUN, "--steps", 160, "--save-every", 20, "--processes", 2, *options)
    assert onym_process(*command, "--name", "straight").returncode == 0
    process = start(tmp_path, environment, *command, "--name", "killed")
    wait_for_step(tmp_path / "runs/killed/checkpoints", 40, process)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.splitlines() == [
        "onym: Process 1 of 2 was ended by SIGKILL, and the others with it. The same command continues from the "
        "newest checkpoint."
    ]
    assert onym_process(*command, "--name", "killed").returncode == 0
    one, other = (checkpoint(tmp_path / "runs" / name, 160) for name in ("straight", "killed"))
    assert_equal_bits(one, other)


@pytest.mark.parametrize("kill_at", ["-1:0:0", "3:1:0.5"])
def test_a_planned_kill_is_of_one_rank_and_never_of_the_launcher(
    book: Path, tmp_path: Path, environment: dict[str, str], kill_at: str
) -> None:
    """Of check-resume: the launcher lives, and says which of them was killed."""
    command = ("train", "--data", book, *RUN, "--processes", 2, "--name", "x")
    process = start(tmp_path, {**environment, KILL_AT: kill_at}, *command)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(rf"onym: Process {kill_at.split(':')[1]} of 2 was ended by SIG(ALRM|KILL), and the others .*\n", error)


@needs_proc
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_to_any_of_them_stops_all_and_keeps_the_step(
    onym_process: Run, book: Path, tmp_path: Path, environment: dict[str, str], number: int, code: int
) -> None:
    command = ("train", "--data", book, *RUN, "--steps", 4000, "--save-every", 30, "--processes", 2, "--name", "x")
    process = start(tmp_path, environment, *command)
    wait_for_step(tmp_path / "runs/x/checkpoints", 30, process)
    os.kill(workers(process.pid)[1], number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    stopped = re.search(r"Stopped after step (\d+) \((.*?)\); everything is saved", out)
    assert stopped, out
    assert (tmp_path / f"runs/x/checkpoints/step-{int(stopped[1]):09d}/manifest.json").exists()


@needs_proc
def test_ctrl_c_in_the_terminal_reaches_each_once(book: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    command = ("train", "--data", book, *RUN, "--steps", 4000, "--save-every", 30, "--processes", 2, "--name", "x")
    process = start(tmp_path, environment, *command)
    wait_for_step(tmp_path / "runs/x/checkpoints", 30, process)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.count("Finishing the step and saving it") == 1
    assert "everything is saved" in out


@needs_proc
@pytest.mark.prove
def test_nobody_is_left_where_the_launcher_dies(book: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    command = ("train", "--data", book, *RUN, "--steps", 4000, "--save-every", 30, "--processes", 2, "--name", "x")
    process = start(tmp_path, environment, *command)
    wait_for_step(tmp_path / "runs/x/checkpoints", 30, process)
    left = workers(process.pid)
    process.kill()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_another_number_of_processes_goes_on_with_the_same_text(onym_process: Run, book: Path, tmp_path: Path) -> None:
    command = ("train", "--data", book, *RUN, "--steps", 400, "--save-every", 100, "--eval-every", 200)
    assert onym_process(*command, "--name", "straight").returncode == 0
    stopped = onym_process(*command, "--name", "x", "--processes", 2, "--time-limit", "1s")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    done = onym_process(*command, "--name", "x", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "Changed since the run was started: --processes was 2, is 1" in done.stdout
    assert "without the interruption: processes was 2, is 1" in done.stdout
    last = [metrics(tmp_path / "runs" / name)[-1] for name in ("straight", "x")]
    assert last[1]["val_loss"] == pytest.approx(last[0]["val_loss"], abs=1e-4)


def test_torchrun_starts_it_too(book: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "onym", "train"]
    done = subprocess.run(
        [*launch, "--data", str(book), *map(str, RUN)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proof ") == 1
    assert library.load_model(tmp_path / "runs/book")


def test_one_of_several_leaves_before_torch_takes_itself_down_and_loses_nothing(environment: dict[str, str]) -> None:
    """Left to Python's own end, gloo aborts it on a busy machine, one time in some hundreds."""
    program = "\n".join(
        (
            "import atexit, concurrent.futures, sys, threading, time",
            "pool = concurrent.futures.ThreadPoolExecutor(1)",  # nobody ends it, as the compiler's
            "pool.submit(int)",
            "from onym.cli.main import program",
            "atexit.register(print, 'told at the exit')",
            "threading.Thread(target=lambda: (time.sleep(0.2), print('written behind its back'))).start()",
            "sys.argv, sys.exit = ['onym', '--version'], None",
            "program()",
        )
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment | {"WORLD_SIZE": "2"}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["written behind its back", "told at the exit"]


def test_two_machines_meet(book: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Two torchruns of one process each, as on two machines; what local number 0 prepares is prepared on each."""
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    launch += [
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=book",
        "-m",
        "onym",
        "train",
        "--data",
        str(book),
        *map(str, RUN),
    ]
    machines = [
        subprocess.Popen(launch, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in machines]
    assert [process.returncode for process in machines] == [0, 0], said
    assert sum(out.count("proof ") for out, _ in said) == 1
    assert metrics(tmp_path / "runs/book")[-1]["step"] == 40


@needs_proc
@pytest.mark.prove
def test_torchrun_restarts_what_was_killed(book: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run = ("--data", book, *RUN, "--steps", 300, "--save-every", 30, "--name", "x")
    process = subprocess.Popen(
        [*launch, "-m", "onym", "train", *map(str, run)],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(tmp_path / "runs/x/checkpoints", 60, process)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    assert "Continuing after step" in out
    assert metrics(tmp_path / "runs/x")[-1]["step"] == 300


@pytest.mark.prove
def test_compiled_they_train_the_same_too(onym_process: Run, book: Path, tmp_path: Path) -> None:
    shape = (*TINY_RUN, "--precision", "fp32", "--steps", 20, "--eval-batches", 2, "--compile", "whole")
    for processes in (1, 2):
        done = onym_process("train", "--data", book, *shape, "--name", processes, "--processes", processes)
        assert done.returncode == 0, done.stderr
        assert "compiled again" not in done.stdout
    last = [metrics(tmp_path / "runs" / str(processes))[-1] for processes in (1, 2)]
    assert last[1]["val_loss"] == pytest.approx(last[0]["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--processes", 3), "A step of 4 sequences cannot be divided among 3 processes: take --batch-size 3."),
        (("--processes", 0), "--processes must be more than 0, not 0."),
        (("--processes", 2, "--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_once(onym_process: Run, book: Path, options: tuple[object, ...], says: str) -> None:
    done = onym_process("train", "--data", book, *RUN, *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_process_that_has_nowhere_to_meet_says_so(onym_process: Run, book: Path) -> None:
    done = onym_process("train", "--data", book, *RUN, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "'MASTER_ADDR' is missing or no number: start it with torchrun or --processes" in done.stderr


def test_one_of_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu", 60) == (DistContext(), "cpu")


def test_alone_nothing_is_exchanged() -> None:
    alone = DistContext()
    assert alone.max(3) == 3
    value = torch.tensor(2.0)
    assert alone.mean(value) is value
    assert alone.local_rank0_first(lambda: "x") == "x"


class _Silent:
    """A store of another machine, from which nothing comes any more."""

    def add(self, key: str, value: int) -> int:
        time.sleep(60)
        return 1


class _Gone:
    def add(self, key: str, value: int) -> int:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("store", [_Silent(), _Gone()])
def test_where_nobody_can_be_asked_the_first_of_each_machine_tells(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_ASKING_SECONDS", 0.05)
    assert DistContext(2, 4, 0, store).reports_error()
    assert not DistContext(3, 4, 1, store).reports_error()
    monkeypatch.setenv(distributed.LAUNCHER, "1")
    assert not DistContext(1, 2, 0, store).reports_error(), "the launcher does"


def test_what_concerns_each_machine_is_told_once_on_each() -> None:
    store = torch.distributed.HashStore()
    assert [DistContext(number, 4, number % 2, store).reports_error(on_each_machine=True) for number in (3, 2, 1)] == [
        True,
        False,
        True,
    ]
    assert not DistContext(3, 4, 1, store).reports_error(), "it has been told"


def test_each_meeting_in_a_store_that_stays_has_a_name_of_its_own() -> None:
    store = torch.distributed.HashStore()
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            names.append(set(pool.map(lambda number: _rendezvous_id(store, number, 3, 20), (2, 1, 0))))
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    with pytest.raises(RuntimeError, match="process 1 is not there"):
        _rendezvous_id(store, 0, 3, 0.05)


_FAILING = """
import os
from onym.errors import ConfigError, OnymError
from onym.train.distributed import join
ranks, _ = join("cpu", 60)
def work():
    if ranks.rank == 1:
        raise ConfigError("this one cannot")
    return "done"
try:
    ranks.on_all_ranks(work)
except OnymError as error:
    os.write(1, f"{ranks.rank}: {error}\\n".encode())
assert ranks.local_rank0_first(lambda: ranks.rank) == ranks.rank
assert ranks.max(ranks.rank) == 1
if ranks.reports_error() != ranks.reports_error():
    os.write(1, b"told\\n")
ranks.close()
"""


def test_an_error_of_one_is_an_error_of_all(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(_FAILING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "work.py")]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split("\n")) == ["", "0: On rank 1: this one cannot", "1: this one cannot", "told"]
