"""Kills a saving process at its every system call that writes, and looks at what is left.

    python -m tests.kills FOLDER MOST

A child is forked that has everything imported, strace attaches to it, and kills it when it enters the N-th call of a kind; so a
crash point takes a tenth of a second. Tries at most MOST points, spread over all; prints how many, and ends with an error at
the first one after which something is lost, half there, or in the way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import onym
from onym.checkpoint.steps import newest_good, step_folder, steps
from onym.format.reader import read_checkpoint

CALLS = (
    *("openat", "write", "pwrite64", "fsync", "close", "rename", "renameat2", "mkdir", "unlink", "rmdir", "flock", "ftruncate"),
    *("chmod", "fchmod", "fchmodat", "sync_file_range"),
)
T = TypeVar("T")
TASKS = 5  # two steps, three files


def model_of(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value_in(path: Path) -> float:
    """What every weight in it is; an error if they are not all the same."""
    model = model_of(-1)
    onym.load(path, into=model)
    (value,) = {each for parameter in model.parameters() for each in parameter.flatten().tolist()}
    return value


def prepare(folder: Path) -> None:
    """Two steps, and an older version of each file."""
    with onym.Checkpointer(folder / "run", keep_last=2, background=False) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step))
    for name in ("m.safetensors", "m.pth", "m"):
        onym.save(model_of(0), folder / name)


def state(step: int) -> dict[str, object]:
    model = model_of(step)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def work(folder: Path, told: int) -> None:
    """What is killed: writes a byte for each task that is done."""
    checkpointer = onym.Checkpointer(folder / "run", keep_last=2, background=False)
    for step in (3, 4):
        checkpointer.save(step, state(step))
        os.write(told, b".")
    checkpointer.close()
    for name in ("m.safetensors", "m.pth", "m"):
        onym.save(model_of(1), folder / name)
        os.write(told, b".")


def attach(child: int, options: list[str]) -> subprocess.Popen[str]:
    """strace on a child that waits for a word; where it cannot be, the child is ended, and a sentence raised as SystemExit."""
    strace = subprocess.Popen(["strace", "-f", "-qq", "-p", str(child), *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        if strace.poll() is not None or time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(f"strace cannot attach: {strace.stderr.read() if strace.stderr else ''}")
        time.sleep(0.001)
    return strace


def calls_in(log: Path) -> Counter[str]:
    """How often each call is in what strace wrote."""
    return Counter(line.split(None, 1)[1].partition("(")[0] for line in log.read_text().splitlines() if "(" in line)


def sample(points: Sequence[T], most: int) -> list[T]:
    """At most so many of them, spread over all."""
    return list(points) if len(points) <= most else [points[index * len(points) // most] for index in range(most)]


def attempt(folder: Path, options: list[str]) -> int:
    """Run the child under strace; how many tasks it said were done."""
    reading, told = os.pipe()
    waiting, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(waiting, 1)
        try:
            work(folder, told)
        finally:
            os._exit(0)
    os.close(told)
    os.close(waiting)
    strace = attach(child, options)
    os.write(go, b".")
    os.close(go)
    os.waitpid(child, 0)
    strace.wait()
    with os.fdopen(reading, "rb") as pipe:
        return len(pipe.read())


def examine(folder: Path, done: int) -> None:
    """Nothing that was done is lost, all that is there is whole, and the next save works."""
    run = folder / "run"
    for step in steps(run):
        read_checkpoint(step_folder(run, step)).verify()
    found = newest_good(run)
    assert found is not None
    assert not found.skipped
    newest = found.checkpoint.manifest.step if found.checkpoint.manifest else None
    assert newest in ([2, 3], [3, 4], [4], [4], [4], [4])[done], (newest, done)
    assert value_in(run) == newest
    assert len(steps(run)) >= 2, "an earlier one was deleted too soon"
    for number, name in enumerate(("m.safetensors", "m.pth", "m"), start=3):
        value = value_in(folder / name)
        assert value == 1 if done >= number else value in (0, 1), (name, value, done)
    with onym.Checkpointer(run, keep_last=2, background=False) as checkpointer:
        restored = checkpointer.restore(state(-1))
        assert restored.step == newest
        checkpointer.save(9, state(9))
    assert value_in(run) == 9
    for name in ("m.safetensors", "m.pth", "m"):
        onym.save(model_of(2), folder / name)
        assert value_in(folder / name) == 2
    left = [path.name for path in (*folder.iterdir(), *run.iterdir()) if path.name.startswith(".onym") or "lease" in path.name]
    assert not left, left


def main(folder: Path, most: int) -> None:
    torch.set_num_threads(1)
    onym.save(model_of(0), folder / "warm.safetensors")  # what is done once a process is done before the forks
    pristine = folder / "pristine"
    pristine.mkdir()
    prepare(pristine)

    def fresh() -> Path:
        place = folder / "try"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(pristine, place)
        return place

    log = folder / "log"
    assert attempt(fresh(), ["-e", "trace=" + ",".join("?" + call for call in CALLS), "-o", str(log)]) == TASKS
    counted = calls_in(log)
    points = [(call, number) for call in CALLS for number in range(1, counted[call] + 1)]
    chosen = sample(points, most)
    outcomes: Counter[int] = Counter()
    for call, number in chosen:
        place = fresh()
        done = attempt(place, ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", "-o", os.devnull])
        outcomes[done] += 1
        try:
            examine(place, done)
        except BaseException as error:
            raise AssertionError(f"killed at {call} number {number}, {done} of {TASKS} tasks done: {error}") from error
    killed = sum(count for done, count in outcomes.items() if done < TASKS)
    print(json.dumps({"points": len(points), "tried": len(chosen), "killed before the end": killed, "calls": dict(counted)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
