"""A disk that fills up, at every size: one sentence, the earlier checkpoints whole, and the next save works."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import onym
from onym.errors import StorageError
from onym.storage import local
from tests.kills import model_of, state, value_in

SIZE = 400_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def free(disk: Path) -> int:
    return shutil.disk_usage(disk).free


@pytest.mark.parametrize("estimated", [True, False])
def test_every_amount_of_room(disk: Path, monkeypatch: pytest.MonkeyPatch, estimated: bool) -> None:
    """With the estimate before the writing, and without: then it runs out in the middle."""
    if estimated:
        monkeypatch.setattr("onym.format.writer.MARGIN_BYTES", 20_000)
    else:
        monkeypatch.setattr(local, "_require_room", lambda *given: None)
    run = disk / "run"
    with onym.Checkpointer(run, background=False) as checkpointer:
        checkpointer.save(1, state(1))
    for name in ("m.safetensors", "m.pth", "m"):
        onym.save(model_of(0), disk / name)
    room, refused, kept = free(disk), 0, 0
    for left in range(0, 120_000, 4096):
        filler = disk / "filler"
        filler.write_bytes(b"")
        with filler.open("wb") as file:
            file.write(bytes(max(0, free(disk) - left)))
        before = sorted(path for path in disk.rglob("*") if path != filler)
        try:
            with onym.Checkpointer(run, background=False) as checkpointer:
                checkpointer.save(2, state(2))
            kept += 1
        except StorageError as error:
            refused += 1
            assert "the disk is full" in str(error)
            assert sorted(path for path in disk.rglob("*") if path != filler) == before, "nothing half-written"
            assert value_in(run) == 1
        for name in ("m.safetensors", "m.pth", "m"):
            try:
                onym.save(model_of(1), disk / name)
            except StorageError as error:
                assert "the disk is full" in str(error)
                assert value_in(disk / name) == 0
            else:
                assert value_in(disk / name) == 1
        filler.unlink()
        for name in ("m.safetensors", "m.pth", "m"):
            onym.save(model_of(0), disk / name)
        shutil.rmtree(run / "step-000000002", ignore_errors=True)
        assert free(disk) >= room - 8192
    assert refused > 3
    assert kept > 3
    with onym.Checkpointer(run, background=False) as checkpointer:
        checkpointer.save(2, state(2))
    assert value_in(run) == 2


def test_a_disk_that_is_read_only(disk: Path) -> None:
    with onym.Checkpointer(disk / "run", background=False) as checkpointer:
        checkpointer.save(1, state(1))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StorageError, match="read-only"):
        onym.Checkpointer(disk / "run", background=False).save(2, state(2))
    with pytest.raises(StorageError, match="read-only"):
        onym.save(model_of(1), disk / "x.safetensors")
    assert value_in(disk / "run") == 1, "reading needs no right to write"


def test_a_folder_that_goes_away_comes_back(tmp_path: Path) -> None:
    with onym.Checkpointer(tmp_path / "run", background=False) as checkpointer:
        checkpointer.save(1, state(1))
        shutil.rmtree(tmp_path / "run")
        checkpointer.save(2, state(2))
    assert value_in(tmp_path / "run") == 2


def test_a_file_that_may_not_be_so_large(tmp_path: Path) -> None:
    onym.save(torch.nn.Linear(2, 1), tmp_path / "x.safetensors")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            onym.save(torch.nn.Linear(200, 200), tmp_path / "x.safetensors")
        except StorageError as error:
            os._exit(0 if "raise the limit" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert onym.open_checkpoint(tmp_path / "x.safetensors").tensor("weight").shape == (1, 2)
    assert os.listdir(tmp_path) == ["x.safetensors"]
