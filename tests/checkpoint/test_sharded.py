"""Checkpointer with FSDP2 in real processes (gloo): each writes its share, all or nothing is kept, and any number reads it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onym
from onym.format.chunk_index import CHUNKS
from onym.format.reader import read_checkpoint
from onym.train.launch import free_port

IN_FULL = bool(os.environ.get("ONYM_PROVE"))

PROGRAM = """
import copy, errno, os, signal, sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import onym
from onym.checkpoint import coordinator
from onym.state.dtensor import full_tensor
from onym.storage.disk import Disk

what, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(11, 6)
        self.odd = nn.Linear(6, 7)      # rows that no number of processes but 1 and 7 can share evenly
        self.few = nn.Linear(7, 6)
        self.one = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        self.seen += 1
        return self.head(self.few(torch.relu(self.odd(self.token(tokens))))) * self.one

def training(seed, mesh=None):
    torch.manual_seed(seed)
    model = Net()
    fully_shard(model.odd, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "progress": {"tokens": seed}}

def step(state):
    state["model"](torch.arange(11)[None]).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["schedule"].step()

def values(state):
    tensors, description = onym.optimizer_state(state["model"], state["optimizer"])
    found = {**onym.state_dict(state["model"]), **tensors}
    return {name: full_tensor(value).clone() for name, value in found.items()}, description, state["schedule"].state_dict()

def same(one, other):
    assert one[0].keys() == other[0].keys()
    for name in one[0]:
        assert torch.equal(one[0][name], other[0][name]), name
    assert one[1:] == other[1:], (one[1:], other[1:])

def leave():
    until = time.monotonic() + 5   # one that is done may still be ending
    while left := [thread for thread in threading.enumerate() if thread.name.startswith("onym")]:
        assert time.monotonic() < until, f"threads of Onym are left: {left}"
    print("as it should be", flush=True)
    dist.barrier()
    os._exit(0)  # before torch takes itself down, which it aborts now and then

def failing(work, says):
    try:
        work()
    except onym.OnymError as error:
        assert says in str(error), error
        print(f"{rank} was told", flush=True)
    else:
        raise SystemExit(f"it should have failed: {says}")

if what == "write":
    state = training(1)
    step(state)
    torch.manual_seed(100 + rank)
    with onym.Checkpointer(folder) as checkpointer:
        checkpointer.save(1, state, {"loss": 1.0}, files={"notes.txt": "hello"})
        step(state)   # what is written is what was, not what is
        checkpointer.save(2, state)
        torch.save((values(state), torch.randn(3)), folder.parent / f"expected-{count}-{rank}.pt")
    leave()

if what == "read":
    for written in sys.argv[3:]:
        state = training(2)
        checkpointer = onym.Checkpointer(folder.parent / written)
        restored = checkpointer.restore(state)
        assert restored.step == 2 and restored.values["progress"] == {"tokens": 1}, restored
        expected, _ = torch.load(folder.parent / f"expected-{written}-0.pt", weights_only=False)
        same(values(state), expected)
        assert onym.state_dict(state["model"])["head.weight"] is not None
        if int(written) == count:
            _, drawn = torch.load(folder.parent / f"expected-{written}-{rank}.pt", weights_only=False)
            assert torch.equal(torch.randn(3), drawn), "each goes on with its own random numbers"
        step(state)
    leave()

if what == "hybrid":
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    state = training(1, mesh)
    step(state)
    with onym.Checkpointer(folder) as checkpointer:
        checkpointer.save(1, state)
        expected = values(state)
    again = training(2)
    assert onym.Checkpointer(folder).restore(again).step == 1
    same(values(again), expected)
    leave()

if what == "tensor":   # parallelism of two, and that shared out in two; what is in no plan has copies
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    def parallel(seed):
        torch.manual_seed(seed)
        model = Net()
        parallelize_module(model, mesh["tensor"], {"odd": ColwiseParallel(), "few": RowwiseParallel()})
        fully_shard(model.odd, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        # One at a time: the tensors are of two meshes.
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)}
    def stepped(state):
        for number, parameter in enumerate(state["model"].parameters()):
            parameter.grad = parameter.detach() * (number + 1)
        state["optimizer"].step()
        return state
    def everything(state):
        tensors, _ = onym.optimizer_state(state["model"], state["optimizer"])
        return {name: full_tensor(value).clone() for name, value in {**onym.state_dict(state["model"]), **tensors}.items()}
    state = stepped(parallel(1))
    strided = [name for name, value in state["model"].named_parameters() if "_StridedShard" in str(value.placements)]
    assert strided == ["odd.weight", "odd.bias"], strided
    with onym.Checkpointer(folder) as checkpointer:
        checkpointer.save(1, state)
        expected = everything(state)
    plain = training(2)
    for again in (stepped(parallel(2)), {key: plain[key] for key in state}):
        assert onym.Checkpointer(folder).restore(again).step == 1
        found = everything(again)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    leave()

if what == "full":   # the disk, for one of them; then the next save works
    state = training(1)
    step(state)
    checkpointer = onym.Checkpointer(folder)
    checkpointer.save(1, state)
    checkpointer.wait()
    real = Disk.write
    def broken(disk, descriptor, data, position):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def slow(disk, descriptor, data, position):
        time.sleep(0.2)   # so that another one fails meanwhile, and it is given up
        return real(disk, descriptor, data, position)
    for bad, told_by in ((count - 1, checkpointer.wait), (0, lambda: checkpointer.save(3, state))):
        Disk.write = broken if rank == bad else slow if rank == 1 else real
        checkpointer.save(2, state)
        failing(told_by, "disk is full")   # the reason itself, in all of them
        Disk.write = real
        dist.barrier()
        assert checkpointer.steps == [1]
        dist.barrier()
    step(state)
    checkpointer.save(2, state)
    checkpointer.close()
    again = training(2)
    assert checkpointer.restore(again).step == 2
    same(values(again), values(state))
    leave()

if what == "flat":   # FSDP1, whose flat parameters are no tensors of the model's: gathered
    from torch.distributed.fsdp import FullyShardedDataParallel
    torch.manual_seed(1)
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    checkpointer = onym.Checkpointer(folder)
    checkpointer.save(1, {"model": model})
    checkpointer.wait()
    before = {name: value.clone() for name, value in onym.state_dict(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert checkpointer.restore({"model": model}).step == 1
    after = onym.state_dict(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and before["odd.weight"].any()
    checkpointer.close()
    leave()

if what == "alone":   # where one of them fails, or has something of its own, none goes on alone
    from torch.distributed.tensor import distribute_tensor, Shard
    state = training(1)
    step(state)
    checkpointer = onym.Checkpointer(folder, keep_last=1)
    checkpointer.save(1, state, {"loss": 1.0} if rank == 0 else {"loss": None})   # the first one's are kept
    failing(lambda: checkpointer.save(2 + rank, state), "different steps")
    failing(lambda: checkpointer.save(2, {**state, "own": object() if rank else 1}), "cannot be saved")
    failing(lambda: checkpointer.restore({**state, "progress": [] if rank else {}}), "was given to be filled")
    named = nn.Linear(3, 4)
    named.register_buffer("weight[0:2,0:3]", torch.full((2, 3), 7.0))
    fully_shard(named)
    checkpointer.save(2, {"model": named})
    failing(checkpointer.wait, "also that of a chunk of another one")

    empty = nn.Linear(2, 2)
    empty.nothing = nn.Parameter(torch.empty(0, 4))
    fully_shard(empty)
    copies = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    twice = nn.Linear(2, 2)
    fully_shard(twice, mesh=copies["shard"])   # neither copy knows of the other
    average = {"weight": distribute_tensor(torch.arange(6.0).reshape(3, 2), init_device_mesh("cpu", (2,)), [Shard(0)])}
    odd = {"model": empty, "twice": twice, "average": average}
    checkpointer.save(2, odd)
    checkpointer.wait()
    before = full_tensor(empty.weight).clone(), twice.weight.to_local().clone()
    with torch.no_grad():
        for parameter in (*empty.parameters(), *twice.parameters()):
            parameter.to_local().zero_()
    restored = checkpointer.restore(odd)
    assert torch.equal(full_tensor(empty.weight), before[0]) and torch.equal(twice.weight.to_local(), before[1])
    assert torch.equal(restored.values["average"]["weight"], torch.arange(6.0).reshape(3, 2))
    files = list((folder / "step-000000002").glob("twice-*"))
    assert len(files) == 1, files

    for number in range(3, 8):
        checkpointer.save(number, state)
    checkpointer.wait()
    held = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd")
            and os.path.islink(f"/proc/self/fd/{each}")] if sys.platform == "linux" else []
    assert not [each for each in held if "(deleted)" in each], "a deleted step takes room still"

    keeping = onym.Checkpointer(folder.parent / "two", keep_last=2)
    keeping.save(1, state)
    keeping.save(2, state)
    keeping.wait()
    real = os.pread
    def unreadable(descriptor, *more):
        if "step-000000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *more)
    if sys.platform == "linux":
        if rank:
            os.pread = unreadable
        found = keeping.restore(state)
        os.pread = real
        assert found.step == 1 and "Input/output error" in found.skipped[0][1], found

    from onym.checkpoint.sharded import ShardedSave
    damage = ShardedSave._damage
    if rank:
        ShardedSave._damage = lambda shared: "as if it were damaged"
    keeping.save(3, state)   # the damaged one goes aside
    keeping.save(4, state)   # and now the first would be deleted
    failing(keeping.wait, "does not read back")
    ShardedSave._damage = damage
    keeping.close()
    checkpointer.close()
    leave()

if what == "unseen":   # as on two machines with a disk each
    from onym.checkpoint.sharded import ShardedSave
    if rank:
        ShardedSave.seen = property(lambda self: False)
    state = training(1)
    step(state)
    checkpointer = onym.Checkpointer(folder)
    checkpointer.save(1, state)
    checkpointer.save(2, state)
    checkpointer.close()
    again = training(2)
    assert checkpointer.restore(again).step == 2
    same(values(again), values(state))
    assert rank or len(checkpointer.notes) == 1, checkpointer.notes
    leave()

if what == "slow":   # longer than anybody would wait for one that gives no sign of life
    coordinator.PATIENCE_SECONDS = 1.0
    real = Disk.flush
    def slow(disk, descriptor):
        time.sleep(2.5 if rank else 0)
        real(disk, descriptor)
    Disk.flush = slow
    state = training(1)
    checkpointer = onym.Checkpointer(folder)
    checkpointer.save(1, state)
    for _ in range(20):   # collectives of the training, while it is written
        step(state)
    checkpointer.close()
    assert checkpointer.steps == [1]
    leave()

if what == "forever":   # until somebody kills one of them
    coordinator.PATIENCE_SECONDS = 3.0
    state = training(1)
    checkpointer = onym.Checkpointer(folder, keep_last=2)
    start = checkpointer.restore(state).step or 0
    print(f"from {start}", flush=True)
    try:
        for number in range(start + 1, start + (4 if sys.argv[3:] else 100_000)):
            checkpointer.save(number, state)
            checkpointer.wait()
            print(f"saved {number}", flush=True)
    except onym.OnymError as error:
        print(f"told: {error}", flush=True)
        os._exit(7)
    except RuntimeError as error:   # a collective in the main thread
        print(f"collective: {error}", flush=True)
        os._exit(8)
    checkpointer.close()
    leave()
"""

PLAIN = "\n".join(
    (
        PROGRAM.partition("dist.init_process_group")[0],
        "def fully_shard(module, mesh=None): pass",
        PROGRAM[PROGRAM.index("class Net") : PROGRAM.index("def leave")],
        "state = training(3)",
        "assert onym.Checkpointer(folder).restore(state).step == 2",
        "same(values(state), torch.load(sys.argv[3], weights_only=False)[0])",
        "assert state['model'].head.weight is state['model'].token.weight",
        "step(state)",
        "print(onym.load(folder, into=Net()))",
    )
)

Launch = Callable[..., list[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Some processes that meet, without anybody who ends the others when one dies."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started: list[subprocess.Popen[str]] = []

    def start(count: int, what: str, folder: Path, *more: object) -> list[subprocess.Popen[str]]:
        port = free_port()
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", program, what, folder, *map(str, more)]
        mine = [
            subprocess.Popen(
                command, env=os.environ | meet | {"RANK": str(n)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for n in range(count)
        ]
        started.extend(mine)
        return mine

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(start: Callable[..., list[subprocess.Popen[str]]]) -> Launch:
    def launch(count: int, what: str, folder: Path, *more: object) -> list[str]:
        processes = start(count, what, folder, *more)
        said = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * count, "\n".join(error[-3000:] for _, error in said)
        assert all("as it should be" in out for out, _ in said), said
        return [out for out, _ in said]

    return launch


def test_what_any_number_of_processes_keeps_any_number_reads(launch: Launch, tmp_path: Path) -> None:
    """Each its share: model, AdamW, schedule, values, tied weights, chunks of unequal size, and each one's random numbers."""
    counts = (1, 2, 3, 4) if IN_FULL else (2, 3)
    for count in counts:
        launch(count, "write", tmp_path / str(count))
    for count in counts:
        launch(count, "read", tmp_path / "none", *counts)
    for count in counts[1 if IN_FULL else 0 :]:
        folder = tmp_path / str(count)
        newest = folder / "step-000000002"
        assert {f"model-{number:05d}.safetensors" for number in range(count)} <= {file.name for file in newest.iterdir()}
        program = tmp_path / "plain.py"
        program.write_text(PLAIN)
        command = [sys.executable, program, "plain", folder, tmp_path / f"expected-{count}-0.pt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "8 tensors loaded" in done.stdout


def test_of_copies_one_process_each_writes_some(launch: Launch, tmp_path: Path) -> None:
    """Sharded over two, and that twice: nothing is written twice, and each of the four has something to write."""
    launch(4, "hybrid", tmp_path / "run")
    step = tmp_path / "run/step-000000001"
    files = [step / f"model-{number:05d}.safetensors" for number in range(4)]
    assert all(file.stat().st_size > 200 for file in files)
    checkpoint = read_checkpoint(step)
    checkpoint.verify()
    assert checkpoint.chunk_index is not None
    for entries in checkpoint.chunk_index.tensors.values():
        for entry in entries.values():
            assert len(entry.layout.shards) <= 2


def test_tensor_parallelism_that_is_shared_out_is_written_in_shares(launch: Launch, tmp_path: Path) -> None:
    """And read in others: what FSDP2 has cut again is one box of each process too."""
    launch(4, "tensor", tmp_path / "run")
    checkpoint = read_checkpoint(tmp_path / "run/step-000000001")
    checkpoint.verify()
    assert checkpoint.chunk_index is not None
    tensors = checkpoint.chunk_index.tensors
    parts = {name: len(entry.layout.shards) for entries in tensors.values() for name, entry in entries.items()}
    assert {name: parts[name] for name in ("odd.weight", "few.weight", "state.exp_avg.odd.weight", "token.weight")} == {
        "odd.weight": 4,
        "few.weight": 4,
        "state.exp_avg.odd.weight": 4,
        "token.weight": 2,
    }


def test_a_disk_that_is_full_for_one_is_told_to_all_once_and_nothing_is_lost(launch: Launch, tmp_path: Path) -> None:
    assert sum(out.count("was told") for out in launch(3, "full", tmp_path / "run")) == 6


def test_where_one_fails_or_has_something_of_its_own_none_goes_on_alone(launch: Launch, tmp_path: Path) -> None:
    """Each of these hung, or was kept and could not be read again."""
    assert [out.count("was told") for out in launch(2, "alone", tmp_path / "run")] == [5, 5]


def test_where_they_do_not_see_the_same_disk_the_first_gathers_and_writes(launch: Launch, tmp_path: Path) -> None:
    launch(2, "unseen", tmp_path / "run")
    assert not (tmp_path / "run/step-000000002" / CHUNKS).exists()


def test_what_is_sharded_in_another_way_is_gathered(launch: Launch, tmp_path: Path) -> None:
    launch(2, "flat", tmp_path / "run")
    onym.open_checkpoint(tmp_path / "run").verify()


def test_one_whose_disk_is_slow_is_waited_for(launch: Launch, tmp_path: Path) -> None:
    launch(2, "slow", tmp_path / "run")


@pytest.mark.parametrize("number", range(40 if IN_FULL else 2))
def test_killed_at_any_point_of_a_save(
    start: Callable[..., list[subprocess.Popen[str]]], launch: Launch, tmp_path: Path, number: int
) -> None:
    """SIGKILL of one: the others are told, whatever was kept before is whole, and the next run continues from it."""
    run = tmp_path / "run"
    processes = start(2, "forever", run)
    victim = number % 2
    watched = processes[1 - victim].stdout
    assert watched is not None
    for line in watched:
        if line.startswith("saved 3"):
            break
    time.sleep((number * 37 % 101) / 500)
    processes[victim].kill()
    until = time.monotonic() + 60
    out = watched.read()
    assert processes[1 - victim].wait(timeout=max(1.0, until - time.monotonic())) in (7, 8), out
    told = re.search(r"step-(\d+)' was (not )?saved", out)
    assert told or "collective" in out, out
    kept = onym.Checkpointer(run).steps
    assert kept
    assert not told or told[2] or int(told[1]) in kept, "it was said to be there"
    for step in kept:
        read_checkpoint(run / f"step-{step:09d}").verify()
    assert kept[-1] >= max([int(each) for each in re.findall(r"saved (\d+)", out)] + [3]), "what was told as kept is there"
    again = launch(2, "forever", run, "a few")
    assert f"from {kept[-1]}" in again[0]
    assert not [entry for entry in run.iterdir() if not entry.name.startswith("step-") and entry.is_dir()]
