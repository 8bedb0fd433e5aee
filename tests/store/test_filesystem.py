"""Whole or not at all."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import pytest

from origo.errors import StorageError
from origo.store.filesystem import new_file, new_folder, remove_folder


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "x.bin"
    with new_file(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError), new_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["x.bin"]


def test_files_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with new_file(tmp_path / "x") as temporary:
            temporary.touch(mode=0o600)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    finally:
        os.umask(old)


def test_a_reader_keeps_the_file_that_it_has_mapped(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"a" * 10_000)
    with target.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with new_file(target) as temporary:
            temporary.write_bytes(b"b")
        assert mapped[:] == b"a" * 10_000
    assert target.read_bytes() == b"b"


def test_a_folder_replaces_its_predecessor(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with new_folder(target, last="manifest.json") as temporary:
            (temporary / "manifest.json").write_text(content)
        assert (target / "manifest.json").read_text() == content
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target, last="manifest.json") as temporary:
        (temporary / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target, last="manifest.json") as temporary:
        (temporary / "manifest.json").write_text("new")
        raise RuntimeError
    assert (target / "manifest.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with new_folder(target, last="manifest.json") as temporary:
        (temporary / "manifest.json").write_text("old")
    replace, calls = os.replace, []

    def failing(source: object, to: object) -> None:
        calls.append(to)
        if len(calls) == 2:  # the old one is aside, the new one not yet in place
            raise OSError(5, "Input/output error")
        replace(source, to)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError, match="Input/output error"), new_folder(target, last="manifest.json") as temporary:
        (temporary / "manifest.json").write_text("new")
    assert len(calls) == 3
    assert (target / "manifest.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_keeps_the_mode_of_the_one_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "x").touch(mode=0o600)
    with new_file(tmp_path / "x") as temporary:
        temporary.touch()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_refusals_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file, not a folder"), new_file(tmp_path / "file" / "x"):
        pass
    with pytest.raises(StorageError, match="is a folder, not a file"), new_file(tmp_path):
        pass


def test_removing_what_is_not_there_fails_quietly(tmp_path: Path) -> None:
    assert not remove_folder(tmp_path / "gone")
    (tmp_path / "x").mkdir()
    assert remove_folder(tmp_path / "x")
    assert os.listdir(tmp_path) == []
