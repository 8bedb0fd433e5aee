"""Whole or not at all, and nothing left behind; nothing of anybody else's touched."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import onym
from onym.errors import CheckpointError, StorageError
from onym.storage import local
from onym.storage.disk import Disk, _note_no_folder_fsync
from onym.storage.local import new_file, new_folder, remove_folder, repair_interrupted, sweep
from onym.storage.paths import replace_file


def write(path: Path, content: str) -> None:
    with new_folder(path, last="manifest.json") as folder:
        folder.create("manifest.json").write(content.encode())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "x.bin"
    with new_file(target) as file:
        file.write(b"first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError), new_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["x.bin"]


def test_files_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "x", "")
        write(tmp_path / "y", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "y" / "manifest.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o750


def test_a_file_keeps_the_mode_of_the_one_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "x").touch(mode=0o600)
    replace_file(tmp_path / "x", "new")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere" / "real")
    replace_file(tmp_path / "x", "one")
    replace_file(tmp_path / "x", "two")
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "elsewhere" / "real").read_text() == "two"


def test_a_reader_keeps_the_file_that_it_has_mapped(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"a" * 10_000)
    with target.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        replace_file(target, b"b")
        assert mapped[:] == b"a" * 10_000
    assert target.read_bytes() == b"b"


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_folder_replaces_its_predecessor(tmp_path: Path, exchanging: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanging:
        monkeypatch.setattr(Disk, "exchange", lambda *names: False)
    target = tmp_path / "model"
    for content in ("one", "two"):
        write(target, content)
        assert (target / "manifest.json").read_text() == content
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, "old")
    with pytest.raises(RuntimeError), new_folder(target, last="manifest.json") as folder:
        folder.create("manifest.json").write(b"new")
        raise RuntimeError
    assert (target / "manifest.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two names cannot be exchanged, the old folder is aside for a moment."""
    target = tmp_path / "model"
    write(target, "old")
    rename, calls = Disk.rename, []

    def failing(disk: Disk, source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2:  # the old one is aside, the new one not yet in place
            raise OSError(5, "Input/output error")
        rename(disk, source, to)

    monkeypatch.setattr(Disk, "exchange", lambda *names: False)
    monkeypatch.setattr(Disk, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        write(target, "new")
    assert len(calls) == 3
    assert (target / "manifest.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_replacement_that_was_cut_short_is_mended(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".onym-replaced-model")
    repair_interrupted(tmp_path / "model")
    assert (tmp_path / "model" / "manifest.json").read_text() == "old"
    write(tmp_path / ".onym-replaced-model", "older")  # died before deleting it
    write(tmp_path / "model", "new")
    assert os.listdir(tmp_path) == ["model"]


def test_refusals_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        replace_file(tmp_path / "file" / "x", "")
    with pytest.raises(StorageError, match="is a folder, not a file"):
        replace_file(tmp_path, "")


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"1000000\.0 TB are needed and .* left, so the disk is full"),
        new_file(tmp_path / "x", 10**18),
    ):
        raise AssertionError("nothing is written")
    assert os.listdir(tmp_path) == []


def test_removing_what_is_not_there_fails_quietly(tmp_path: Path) -> None:
    assert not remove_folder(tmp_path / "gone", "manifest.json")
    (tmp_path / "x").mkdir()
    assert remove_folder(tmp_path / "x", "manifest.json")
    assert os.listdir(tmp_path) == []


def test_what_a_dead_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from onym.storage.local import new_folder
with new_folder(Path({str(tmp_path / "model")!r}), "manifest.json") as folder:
    folder.create("manifest.json").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".onym-writing-")
    others = [".onym-writing-anotherhost-0123456789ab", ".onym-writing-notes", "mine"]
    for name in others:
        (tmp_path / name).mkdir()
    with new_file(tmp_path / "x") as file:  # a living writer, of this process
        file.write(b"whole")
        assert not (tmp_path / left).exists()
        sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "x"])


@pytest.mark.parametrize("operation", ["create", "write", "flush", "make_folder", "rename", "flush_folder", "close"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_an_error_of_the_system_is_a_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    """Each operation, at each of its calls, for a file and a folder; then the disk is well again and the next write works."""
    real = getattr(Disk, operation)
    if operation == "rename":
        monkeypatch.setattr(Disk, "exchange", lambda *names: False)
    for kind in ("file", "folder"):
        target = tmp_path / kind

        def save(content: str, target: Path = target, kind: str = kind) -> None:
            replace_file(target, content) if kind == "file" else write(target, content)

        def content(target: Path = target, kind: str = kind) -> str:
            return (target if kind == "file" else target / "manifest.json").read_text()

        save("old")
        failed = 0
        for number in range(100):
            calls = 0

            def failing(disk: Disk, *given: object, number: int = number) -> object:
                nonlocal calls
                calls += 1
                if calls - 1 == number:
                    if operation == "close":
                        real(disk, *given)  # the descriptor is gone whatever close says
                    raise OSError(code, os.strerror(code))
                return real(disk, *given)

            monkeypatch.setattr(Disk, operation, failing)
            told = ""
            try:
                save("new")
            except StorageError as error:
                told = str(error)
            finally:
                monkeypatch.setattr(Disk, operation, real)
            if told:
                failed += 1
                assert str(target) in told
                # What fails after the renaming is told too: then the new one is there, and may not be durable.
                assert content() in ("old", "new")
                if operation not in ("flush_folder", "close"):
                    assert content() == "old"
            if calls <= number:
                break
            save("old")
        assert failed
        assert sorted(os.listdir(tmp_path)) == sorted({"file", kind})


def test_a_file_system_without_fsync_of_folders_is_noted_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of Samba and VirtualBox."""
    fsync = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    model = nn.Linear(2, 1)
    _note_no_folder_fsync.cache_clear()
    with pytest.warns(UserWarning, match="cannot fsync a folder"):
        onym.save(model, tmp_path / "m.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once of a file system, however many folders
        onym.save(model, tmp_path / "m")
        with onym.Checkpointer(tmp_path / "run") as checkpointer:
            checkpointer.save(1, {"model": model})
    for name in ("m.safetensors", "m", "run"):
        fresh = nn.Linear(2, 1)
        onym.load(tmp_path / name, into=fresh)
        assert torch.equal(fresh.weight, model.weight)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m"])
def test_a_file_system_that_maps_no_files_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fresh = nn.Linear(2, 1), nn.Linear(2, 1)
    onym.save(model, tmp_path / name)

    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(local, "mmap", refused)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refused)
    onym.load(tmp_path / name, into=fresh)
    assert torch.equal(fresh.weight, model.weight)
    checkpoint = onym.open_checkpoint(tmp_path / name)
    checkpoint.verify()
    assert torch.equal(checkpoint.tensor("bias"), model.bias)
    file = tmp_path / name / "model.safetensors" if name == "m" else tmp_path / name
    content = bytearray(file.read_bytes())
    at = content.index(model.weight.detach().numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        onym.open_checkpoint(tmp_path / name).verify()
