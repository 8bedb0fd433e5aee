"""A folder that two processes fill, and one of them is killed at its N-th operation on the disk: at each, in turn.

The processes are forked with everything imported and meet by a store alone, as under torchrun, whose store outlives them; so a
crash point takes half a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from onym.checkpoint import coordinator
from onym.checkpoint.retention import Retention, write_step
from onym.checkpoint.sharded import ShardedSave
from onym.checkpoint.steps import step_folder, steps
from onym.errors import OnymError
from onym.format.manifest import MODEL, Manifest
from onym.format.rank_files import ChunkOf, RankContent, ShardTable
from onym.format.reader import read_checkpoint
from onym.format.writer import About, write_folder
from onym.state.chunks import Chunk
from onym.storage.disk import Disk
from onym.storage.local import sweep
from tests.kills import CALLS, attach, calls_in, sample

IN_FULL = bool(os.environ.get("ONYM_PROVE"))
OPERATIONS = [name for name, value in vars(Disk).items() if callable(value) and not name.startswith("_")]
NAMES = ("a", "b", "c")


def fill(run: Path, number: int, store: Any, place: Path, kill_at: int) -> None:
    """One process's part in step 2; killed at its ``kill_at``-th operation on the disk."""
    rows = dict.fromkeys(NAMES, ("float32", (40, 50), 0))
    chunk = Chunk((20 * number, 0), (20, 50))
    table = ShardTable({MODEL: rows}, chunks={0: chunk})
    tensors = {MODEL: {name: torch.full((20, 50), 2.0 + number) for name in NAMES}}
    chunks = {MODEL: {name: ChunkOf(name, (40, 50), chunk) for name in NAMES}}
    content = RankContent(tensors, chunks, table)
    path = step_folder(run, 2)
    if number == 0:
        shared = ShardedSave.create(path, 100, 2, store)
        store.set("place", f"{shared.temporary}\n{shared.token}")
    else:
        try:
            store.wait(["place"], timedelta(seconds=3))
        except dist.DistStoreError:  # killed before there was a folder: collectives tell that
            (place / "said-1").write_text("nothing was begun")
            return
        folder, token = store.get("place").decode().split("\n")
        shared = ShardedSave(path, folder, token, 1, 2, store)
    count, lock = 0, threading.Lock()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        return operation

    for name in OPERATIONS:
        setattr(Disk, name, counted(getattr(Disk, name)))
    try:
        if number == 0:
            with shared.leading():
                write_step(
                    run,
                    2,
                    lambda path: shared.write(content, {}, About(step=2), lambda written: None),
                    retention=Retention(1),
                    verify=lambda path: shared.verify(),
                )
        else:
            shared.follow(content, lambda written: None)
        said = "kept"
    except OnymError as error:
        said = str(error)
    (place / f"said-{number}").write_text(said)
    (place / f"count-{number}").write_text(str(count))


def attempt(folder: Path, victim: int, kill_at: int = -1, traced: list[str] | None = None) -> list[str]:
    """What the two processes said; of one that was killed, nothing. What is there has been looked at.

    Args:
        victim: the number of the one that is killed.
        kill_at: the number of its operation.
        traced: options of strace, which watches it, and may kill it.
    """
    folder.mkdir()
    run = folder / "run"
    write_folder(step_folder(run, 1), {MODEL: {name: torch.ones(40, 50) for name in NAMES}}, {}, About(step=1))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    waiting, go = os.pipe()
    for number in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                os.read(waiting, 1)
                mine = dist.TCPStore("127.0.0.1", store.port, is_master=False)
                fill(run, number, mine, folder, kill_at if number == victim else -1)
            finally:
                os._exit(0)
        children.append(child)
    try:
        strace = attach(children[victim], traced) if traced is not None else None
    except SystemExit as reason:
        os.kill(children[1 - victim], signal.SIGKILL)
        os.waitpid(children[1 - victim], 0)
        pytest.skip(str(reason))
    os.write(go, b"..")
    for child in children:
        os.waitpid(child, 0)
    if strace is not None:
        strace.communicate()
    os.close(waiting)
    os.close(go)
    said = [(folder / f"said-{n}").read_text() if (folder / f"said-{n}").exists() else "" for n in (0, 1)]
    for step in steps(run):
        checkpoint = read_checkpoint(step_folder(run, step))
        checkpoint.verify()
        for name in NAMES:
            found = checkpoint.tensor(name)
            wanted = torch.ones(40, 50) if step == 1 else torch.cat([torch.full((20, 50), 2.0), torch.full((20, 50), 3.0)])
            assert torch.equal(found, wanted)
    assert steps(run), "nothing is left"
    if "kept" in said:
        assert steps(run)[-1] == 2, "it was told as kept"
    assert said[1 - victim], "the other one was told nothing"
    sweep(run)
    assert {entry.name for entry in run.iterdir()} <= {"step-000000001", "step-000000002"}, "something is in the way"
    Manifest.read(step_folder(run, steps(run)[-1]))
    return said


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_any_operation(tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(coordinator, "_TICK_SECONDS", 0.05)
    assert attempt(tmp_path / "alive", victim, -1) == ["kept", "kept"]
    operations = int((tmp_path / "alive" / f"count-{victim}").read_text())
    assert operations > 4
    points = range(1, operations + 1)
    outcomes = [
        attempt(tmp_path / str(at), victim, at)[1 - victim]
        for at in (points if IN_FULL else points[:: max(1, operations // 8)])
    ]
    assert any("no sign of life" in said for said in outcomes), outcomes
    if IN_FULL:
        print(f"killed at each of {operations} operations of process {victim}")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_any_system_call(tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That writes, or tells the other one: what our own operations do not show."""
    monkeypatch.setattr(coordinator, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(coordinator, "_TICK_SECONDS", 0.05)
    log, calls = tmp_path / "log", (*CALLS, "sendto", "sendmsg")
    watched = ["-e", "trace=" + ",".join("?" + call for call in calls), "-o", str(log)]
    for name in ("first", "alive"):  # the first one in a process imports and opens more than those that follow
        assert attempt(tmp_path / name, victim, traced=watched) == ["kept", "kept"]
    log.write_text(log.read_text().partition("/said-")[0].rpartition("\n")[0] + "\n")  # without what the test itself writes
    counted = calls_in(log)
    points = [(call, number) for call in calls for number in range(1, counted[call] + 1)]
    outcomes = Counter[tuple[bool, bool]]()
    for call, number in sample(points, 100_000 if IN_FULL else 8):
        options = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", "-o", os.devnull]
        try:
            said = attempt(tmp_path / f"{call}-{number}", victim, traced=options)
        except AssertionError as error:
            raise AssertionError(f"killed at {call} number {number}: {error}") from error
        outcomes[call in CALLS, not said[victim]] += 1
    assert outcomes[True, True] > outcomes[True, False], "how often it sends depends on the clock; what it writes does not"
    print(f"process {victim}, of {len(points)} calls: {outcomes}, {dict(counted)}")
