"""Several at once: two that write, one that reads what another deletes or writes over."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onym
from onym import Checkpointer
from onym.checkpoint.steps import steps
from onym.errors import CheckpointError, ConfigError, OnymError, StorageError
from onym.format.manifest import OPTIMIZER
from onym.storage.lock import LEASE

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks, and deletes nothing that is open")
COUNT = 500 if os.environ.get("ONYM_PROVE") == "1" else 40
WIDTH = 64  # a weight of 16 kB: several pages


class Step(nn.Module):
    """A model of which every number is its step's, so that a mixture of two shows."""

    def __init__(self, step: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH, WIDTH), float(step)))
        self.bias = nn.Parameter(torch.full((WIDTH,), float(step)))

    @property
    def step(self) -> int:
        """Which step it is of."""
        found = {float(value) for tensor in (self.weight, self.bias) for value in tensor.detach().unique()}
        assert len(found) == 1, f"a mixture of {found}"
        return int(found.pop())


def training(step: int) -> dict[str, Any]:
    model = Step(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + step, momentum=0.5)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, float(step))}
    return {"model": model, "optimizer": optimizer, "extra": {"step": step}}


def step_of(live: dict[str, Any]) -> int:
    """The one step that all parts are of."""
    model, optimizer = live["model"], live["optimizer"]
    buffers = {float(value) for state in optimizer.state.values() for value in state["momentum_buffer"].unique()}
    assert buffers == {float(model.step)} == {optimizer.param_groups[0]["lr"] - 1} == {float(live["extra"]["step"])}
    return int(model.step)


_WRITER = """
import sys, time, torch
from onym import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, {"model": torch.nn.Linear(2, 1)})
checkpointer.wait()
print("saved", flush=True)
time.sleep(60)
"""


@contextmanager
def process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another Python, gone at the end."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def line_of(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


# --- who may write ----------------------------------------------------------------------------------------------------------


@posix
def test_a_second_process_is_told_who_writes_and_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(_WRITER, run) as first:
        assert line_of(first) == "saved"
        second = Checkpointer(run)
        with pytest.raises(StorageError, match=f"being written by process {first.pid} on {platform.node()}"):
            second.save(2, {"model": nn.Linear(2, 1)})
        assert steps(run) == [1]
        assert second.restore({"model": nn.Linear(2, 1)}).step == 1, "reading needs no right"
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert (run / LEASE).exists(), "it had no time to say goodbye"
        second.save(2, {"model": nn.Linear(2, 1)})
        second.close()
    assert steps(run) == [1, 2]
    assert not (run / LEASE).exists()


@posix
def test_a_stopped_process_still_holds_what_it_holds(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(_WRITER, run) as first:
        assert line_of(first) == "saved"
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(StorageError, match=f"process {first.pid}"):
            Checkpointer(run).acquire()
        os.kill(first.pid, signal.SIGTERM)
        os.kill(first.pid, signal.SIGCONT)
        first.wait()
        Checkpointer(run).acquire()


@posix
def test_the_child_of_a_dead_writer_does_not_hold_its_right(tmp_path: Path) -> None:
    program = """
import os, sys, time
from onym import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.acquire()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
    run = tmp_path / "run"
    with process(program, run) as first:
        child = int(line_of(first))
        try:
            with pytest.raises(StorageError, match=f"process {first.pid}"):
                Checkpointer(run).acquire()
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            Checkpointer(run).acquire()
        finally:
            os.kill(child, signal.SIGKILL)


@posix
def test_a_program_that_a_dead_writer_was_starting_is_waited_for(tmp_path: Path) -> None:
    """Between fork and exec it has the lock's descriptor; here for half a second."""
    program = """
import os, sys, time
from onym import Checkpointer
from onym.storage import lock
checkpointer = Checkpointer(sys.argv[1])
checkpointer.acquire()
lock._held_descriptors.clear()  # what is forked by C code lets nothing go
if os.fork() == 0:
    print("started", flush=True)
    time.sleep(0.5)
    os._exit(0)
time.sleep(60)
"""
    run = tmp_path / "run"
    with process(program, run) as first:
        line_of(first)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        Checkpointer(run).acquire()


def test_a_lease_of_another_machine_is_respected_until_it_is_deleted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lease = run / LEASE
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "2031-01-01 00:00:00 UTC", "command": "train.py"}))
    before = lease.read_bytes()
    with pytest.raises(StorageError) as told:
        Checkpointer(run).save(1, {"model": nn.Linear(2, 1)}) and None
    assert "process 7 on elsewhere, since 2031-01-01" in str(told.value)
    assert str(lease) in str(told.value)
    assert lease.read_bytes() == before
    assert steps(run) == []
    lease.unlink()
    with Checkpointer(run) as checkpointer:
        checkpointer.save(1, {"model": nn.Linear(2, 1)})
    assert steps(run) == [1]


@posix
def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = Checkpointer(run), Checkpointer(run)
    first.save(1, {"model": nn.Linear(2, 1)})
    with pytest.raises(StorageError, match=f"process {os.getpid()}|by another Checkpointer of this program"):
        second.save(2, {"model": nn.Linear(2, 1)})
    first.close()
    second.save(2, {"model": nn.Linear(2, 1)})
    second.close()
    assert first.restore({"model": nn.Linear(2, 1)}).step == 2  # else step 2 would be of a past that it does not know
    first.save(3, {"model": nn.Linear(2, 1)})
    first.close()
    assert steps(run) == [1, 2, 3]


@posix
def test_a_forgotten_checkpointer_lets_go(tmp_path: Path) -> None:
    checkpointer: Checkpointer | None = Checkpointer(tmp_path / "run", background=False)
    assert checkpointer is not None
    checkpointer.save(1, {"model": nn.Linear(2, 1)})
    checkpointer = None
    Checkpointer(tmp_path / "run").acquire()


@pytest.mark.parametrize(
    "content",
    [
        *("", "5", "[]", "{}", "{", "\0" * 99, "[" * 100_000, '{"host": 1}'),
        '{"host": "x", "pid": 1e999, "since": "", "command": ""}',
        '{"host": "x", "pid": "y", "since": "", "command": ""}',
        '{"host": "x", "pid": null, "since": [], "command": {}}',
        "9" * 5000,
    ],
    ids=range(12),
)
def test_a_lease_that_says_nothing_is_settled(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LEASE).write_text(content)
    try:
        with Checkpointer(run) as checkpointer:
            checkpointer.save(1, {"model": nn.Linear(2, 1)})
    except StorageError as error:
        assert LEASE in str(error)
    else:
        assert steps(run) == [1]


def test_a_folder_in_the_place_of_the_lease_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "run" / LEASE).mkdir(parents=True)
    with pytest.raises(StorageError, match=LEASE.replace(".", r"\.")):
        Checkpointer(tmp_path / "run").save(1, {"model": nn.Linear(2, 1)})


@posix
def test_of_many_that_start_at_once_one_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held, refused, errors = [], [], list[BaseException]()
    gate, done = threading.Barrier(6), threading.Event()

    def start() -> None:
        checkpointer = Checkpointer(run)
        gate.wait()
        try:
            checkpointer.acquire()
            held.append(checkpointer)
            if len(held) + len(refused) + len(errors) == 6:
                done.set()
            done.wait(10)
            checkpointer.close()
        except StorageError as error:
            refused.append(error)
        except BaseException as error:
            errors.append(error)
        if len(held) + len(refused) + len(errors) == 6:
            done.set()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (len(held), len(refused)) == (1, 5)


def test_two_writers_of_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    """No lease is needed for that: each writes beside it, and renames."""
    for name in ("x.safetensors", "x.pth"):
        path, errors = tmp_path / name, list[BaseException]()

        def write(number: int, path: Path = path, errors: list[BaseException] = errors) -> None:
            try:
                for _ in range(5):
                    onym.save(Step(number), path)
                    model = Step()
                    onym.load(path, into=model)
                    assert model.step in (1, 2, 3)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert [entry.name for entry in tmp_path.iterdir()] == [name]
        path.unlink()


# --- reading what is being written ------------------------------------------------------------------------------------------

_MANY_STEPS = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from tests.storage.test_concurrent import training
from onym import Checkpointer
with Checkpointer(sys.argv[1], keep_last=1) as checkpointer:
    for step in range(1, int(sys.argv[2]) + 1):
        checkpointer.save(step, training(step))
print("done", flush=True)
"""


def read_on(run: Path, read: Callable[[], int | None], finished: Callable[[], bool], last: int) -> None:
    """Read again and again: never an error, never a mixture, never an earlier step after a later one."""
    seen, newest = set(), 0
    until = time.monotonic() + 60
    while time.monotonic() < until:
        over = finished()
        found = read()
        if found is not None:
            assert found >= newest, f"step {found} after step {newest}"
            newest = found
            seen.add(found)
        if over:
            break
    assert newest == last, f"{seen}"
    assert steps(run) == [last]


READERS: dict[str, Callable[[Path], int | None]] = {}


def reader(function: Callable[[Path], int | None]) -> Callable[[Path], int | None]:
    READERS[function.__name__] = function
    return function


@reader
def restore(run: Path) -> int | None:
    live = training(0)
    restored = Checkpointer(run).restore(live, rng=False)
    assert restored.skipped == [], restored
    assert restored.step in (None, step_of(live))
    return restored.step


@reader
def restore_without_verification(run: Path) -> int | None:
    live = training(0)
    restored = Checkpointer(run).restore(live, verify=False, rng=False)
    assert restored.skipped == [], restored
    assert restored.step in (None, step_of(live))
    return restored.step


@reader
def load(run: Path) -> int | None:
    if not steps(run):  # none yet; or a listing that saw neither the step that went nor the one that came
        return None
    model = Step()
    onym.load(run, into=model)
    return model.step


@reader
def open_and_read(run: Path) -> int | None:
    if not steps(run):
        return None
    opened = onym.open_checkpoint(run)
    found = {float(opened.tensor(name).unique()) for name in opened.names}
    assert len(found) == 1, found
    assert opened.manifest is not None
    assert found == {opened.manifest.step}
    return opened.manifest.step


def read_in_every_way(run: Path, finished: Callable[[], bool], last: int) -> dict[str, str]:
    """Each reader in a thread of its own; what went wrong in which."""
    errors: dict[str, str] = {}

    def work(name: str) -> None:
        try:
            read_on(run, lambda: READERS[name](run), finished, last)
        except BaseException as error:
            errors[name] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=work, args=(name,)) for name in READERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@posix
def test_reading_the_latest_while_another_process_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(_MANY_STEPS, run, COUNT, Path(__file__).parents[2]) as writer:
        assert read_in_every_way(run, lambda: writer.poll() is not None, COUNT) == {}
        assert writer.returncode == 0, writer.stderr and writer.stderr.read()


@posix
def test_reading_the_latest_while_another_thread_writes(tmp_path: Path) -> None:
    run, errors = tmp_path / "run", list[BaseException]()

    def write() -> None:
        try:
            with Checkpointer(run, keep_last=1) as checkpointer:
                for step in range(1, COUNT + 1):
                    checkpointer.save(step, training(step))
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert read_in_every_way(run, lambda: not writer.is_alive(), COUNT) == {}
    finally:
        writer.join()
    assert not errors


@posix
def test_a_reader_keeps_what_is_deleted(tmp_path: Path) -> None:
    """A file that is open stays readable; what was not open yet is missed in a sentence."""
    run = tmp_path / "run"
    with Checkpointer(run) as checkpointer:
        checkpointer.save(1, training(1))
    for touched in (False, True):
        for delete in ("the files", "the folder"):
            copy = tmp_path / f"{touched}-{delete}"
            shutil.copytree(run, copy)
            path = copy / "step-000000001"
            opened = onym.open_checkpoint(copy)
            early = opened.tensor("weight") if touched else None
            if delete == "the folder":
                shutil.rmtree(path)
            else:
                for file in path.iterdir():
                    file.unlink()
            for name in ("weight", "bias"):
                try:
                    assert opened.tensor(name).unique().tolist() == [1.0]
                except CheckpointError:
                    assert not touched, "it was open"
            assert early is None or early.unique().tolist() == [1.0]
            with pytest.raises(CheckpointError):
                opened.tensors(OPTIMIZER).state()
            with pytest.raises(CheckpointError):
                opened.verify()
            with pytest.raises(OnymError):
                Checkpointer(copy).restore_from(opened, training(0))


@posix
def test_pruning_leaves_a_readers_tensors_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Checkpointer(run, keep_last=1, background=False) as checkpointer:
        checkpointer.save(1, training(1))
        mapped = onym.open_checkpoint(run).model.state()
        for step in range(2, 6):
            checkpointer.save(step, training(step))
        assert steps(run) == [5]
    assert {name: tensor.unique().tolist() for name, tensor in mapped.items()} == {"weight": [1.0], "bias": [1.0]}


# --- writing over what is mapped --------------------------------------------------------------------------------------------


def gpt(value: float) -> nn.Module:
    torch.manual_seed(0)
    model = onym.GPT(onym.GPTConfig(vocab_size=50, context_length=8, emb_dim=32, n_heads=2, n_layers=2, tie_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values_of(state: dict[str, torch.Tensor]) -> set[float]:
    return {float(value) for tensor in state.values() if tensor.is_floating_point() for value in tensor.detach().unique()}


ENDINGS = ["x.safetensors", "x.pth", "x"]


@pytest.mark.parametrize("name", ENDINGS)
def test_saving_over_a_file_that_is_mapped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    onym.save(gpt(1.0), path)
    lazy, mapped = onym.open_checkpoint(path), onym.open_checkpoint(path).model.state()
    names = lazy.names
    for value in (2.0, 3.0):
        onym.save(gpt(value), path)
        assert values_of(mapped) == {1.0}, "the old file stays for those who have it"
        assert values_of(onym.open_checkpoint(path).model.state()) == {value}
    found = set()
    for each in names:  # what was open, but not read yet
        try:
            found |= values_of({each: lazy.tensor(each)})
        except CheckpointError:
            found.add(1.0)
    assert found == {1.0}
    assert values_of(mapped) == {1.0}


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_load_modify_save_in_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    onym.save(gpt(1.0), path)
    for value in (2.0, 3.0, 4.0):
        model = onym.load_model(path)
        assert values_of(model.state_dict()) == {value - 1}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        onym.save(model, path)
        assert values_of(model.state_dict()) == {value}
        assert values_of(onym.load_model(path).state_dict()) == {value}
    onym.open_checkpoint(path).verify()


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("modified", [False, True])
def test_saving_a_model_whose_parameters_are_the_file(tmp_path: Path, name: str, modified: bool) -> None:
    path = tmp_path / name
    onym.save(gpt(1.0), path)
    model = gpt(0.0)
    model.load_state_dict(onym.open_checkpoint(path).model.state(), assign=True)
    assert values_of(model.state_dict()) == {1.0}
    if modified:
        before = path.read_bytes() if path.is_file() else b""
        with torch.no_grad():
            for parameter in {each.data_ptr(): each for each in model.parameters()}.values():
                parameter.add_(1.0)  # a tied one once
        assert before == (path.read_bytes() if path.is_file() else b""), "what is mapped is this process's own"
        onym.open_checkpoint(path).verify()
    right = {2.0} if modified else {1.0}
    for _ in range(2):
        onym.save(model, path)
        assert values_of(model.state_dict()) == right
        assert values_of(onym.open_checkpoint(path).model.state()) == right
    onym.open_checkpoint(path).verify()


@posix
def test_saving_steps_of_a_model_that_is_mapped_from_one_of_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Checkpointer(run, keep_last=1) as checkpointer:
        checkpointer.save(1, {"model": gpt(1.0)})
        checkpointer.wait()
        model = gpt(0.0)
        model.load_state_dict(onym.open_checkpoint(run).model.state(), assign=True)
        for step in (2, 1, 1, 3):  # step 1 is written over too
            checkpointer.save(step, {"model": model})
        checkpointer.wait()
    assert steps(run) == [3]
    assert values_of(onym.open_checkpoint(run).model.state()) == {1.0}


def test_what_was_checked_and_then_changed_in_place_is_not_given_out_as_right(tmp_path: Path) -> None:
    """Somebody copies another file over it, without renaming: same size, same inode."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    onym.save(Step(1), first)
    onym.save(Step(2), second)
    opened = onym.open_checkpoint(first)
    assert opened.tensor("bias").unique().tolist() == [1.0]
    with first.open("r+b") as file:
        file.write(second.read_bytes())
    for name in ("weight", "bias"):
        try:
            assert opened.tensor(name).unique().tolist() == [1.0]
        except CheckpointError:
            continue


def test_saving_in_the_background_is_of_the_moment_of_the_call(tmp_path: Path) -> None:
    live = training(1)
    with Checkpointer(tmp_path / "run", keep_last=9) as checkpointer:
        for step in range(1, 20):
            with torch.no_grad():
                for parameter in live["model"].parameters():
                    parameter.fill_(step)
                    live["optimizer"].state[parameter]["momentum_buffer"].fill_(step)
            live["optimizer"].param_groups[0]["lr"] = 1.0 + step
            live["extra"]["step"] = step
            checkpointer.save(step, live)
        checkpointer.wait()
        for step in checkpointer.steps:
            found = training(0)
            checkpointer.restore(found, step=step)
            assert step_of(found) == step


def test_reading_in_several_threads_at_once(tmp_path: Path) -> None:
    path, errors = tmp_path / "x.safetensors", list[BaseException]()
    onym.save(Step(3), path)
    opened = onym.open_checkpoint(path)

    def read() -> None:
        try:
            for _ in range(30):
                assert values_of({name: opened.tensor(name) for name in opened.names}) == {3.0}
                assert values_of(opened.model.state()) == {3.0}
                opened.verify()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_two_trainings_may_not_be_given_one_name(tmp_path: Path) -> None:
    """A step that is not there is told, whatever was there a moment ago."""
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, training(1))
        checkpointer.wait()
        shutil.rmtree(tmp_path / "run" / "step-000000001")
        with pytest.raises(CheckpointError, match="no step 1"):
            checkpointer.restore(training(0), step=1)
        assert checkpointer.restore(training(0)).step is None
        with pytest.raises(ConfigError, match="no step 1"):
            checkpointer.pin(1, "good")
