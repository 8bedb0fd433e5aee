"""As test_torch_dcp.py, with two processes and FSDP2: what torch's writer and reader do, ours do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onym

PROGRAM = """
import errno, gc, os, sys, time, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, warnings
from pathlib import Path
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import onym
from onym.storage.disk import Disk

warnings.simplefilter("ignore")
mode, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))

def state(seed, rows=5):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, rows), torch.nn.Linear(rows, 2))
    fully_shard(model, mesh=mesh)
    return {"model": get_model_state_dict(model), "own": {f"rank{rank}": torch.full((2,), float(seed + rank))},
            "step": seed, "loader": {f"rank{rank}": b"seed%d" % (seed + rank)}}

def same(one, other):
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    for name, value in one.items():
        if isinstance(value, dict):
            same(value, other[name])
        elif isinstance(value, torch.Tensor):
            local = [each.to_local() if hasattr(each, "to_local") else each for each in (value, other[name])]
            assert torch.equal(*local), (name, local)
        else:
            assert value == other[name], (name, value, other[name])

def require_loads(reader, path, seed):
    into = state(99)
    dcp.load(into, checkpoint_id=path, storage_reader=reader(path))
    same(into, state(seed))

writers = [("torch", dcp.FileSystemWriter, dcp.FileSystemReader), ("onym", onym.DCPWriter, onym.DCPReader),
           ("both", dcp.FileSystemWriter, onym.DCPReader)]
if mode == "pairs":
    for name, writer, reader in writers:
        one = reader(folder / name)
        for seed in (1, 2):
            dcp.save(state(seed), checkpoint_id=folder / name, storage_writer=writer(folder / name))
            require_loads(lambda path: one, folder / name, seed)
elif mode == "cached":
    for name, writer, reader in writers:
        for seed in range(3):
            planner = DefaultSavePlanner(enable_plan_caching=True)
            path = folder / f"{name}-{seed}"
            dcp.save(state(seed), checkpoint_id=path, storage_writer=writer(path), planner=planner)
            require_loads(reader, path, seed)
        for key, cache in vars(dcp.planner.SavePlanner).items():
            if key.startswith("_cached"):
                cache.clear()
elif mode == "alone":
    for name, writer, reader in writers:
        for seed in (1, 2):
            dcp.save(state(seed), checkpoint_id=folder / name, storage_writer=writer(folder / name), use_collectives=False)
            require_loads(reader, folder / name, seed)
        if reader is onym.DCPReader:  # with another sharding, what this rank had is not all that it asks for
            from torch.distributed.tensor import Replicate, distribute_tensor
            other = {"model": {key: value.redistribute(placements=[Replicate()]) for key, value in state(3)["model"].items()}}
            try:
                dcp.load(other, checkpoint_id=folder / name, storage_reader=reader(folder / name))
                raise SystemExit("it should have been refused")
            except Exception as error:
                assert "another part than is asked for" in str(error), error
            dist.barrier()
else:
    gc.disable()
    writer = onym.DCPWriter(folder / "step")
    dcp.save(state(1), storage_writer=writer)
    real = Disk.write
    for failing in (0, 1):
        def broken(disk, descriptor, data, position):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if rank == failing:
            Disk.write = broken
        try:
            dcp.save(state(2), storage_writer=writer)
            raise SystemExit("it should have failed")
        except CheckpointException as error:
            assert "disk is full" in str(error), error
        Disk.write = real
        dist.barrier()
        left = [name for name in os.listdir(folder) if name.startswith(".onym")]
        assert not left, left
        dist.barrier()
    require_loads(onym.DCPReader, folder / "step", 1)
dist.barrier()
print("as it should be", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("mode", ["pairs", "cached", "alone", "failing"])
def test_two_processes(tmp_path: Path, mode: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, str(tmp_path / "program.py"), mode, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout.count("as it should be") == 2, run.stdout + run.stderr
    if mode == "pairs":
        assert "0.weight" in onym.open_checkpoint(tmp_path / "out" / "onym").names
    if mode == "alone":
        part = tmp_path / "out" / "onym" / "rank-00001"
        onym.open_checkpoint(part).verify()
        with pytest.raises(onym.OnymError, match=r"only a part of 0\.weight"):
            onym.open_checkpoint(part).tensor("0.weight")
        with pytest.raises(onym.OnymError, match="what each rank saved for itself"):
            onym.open_checkpoint(tmp_path / "out" / "onym")
