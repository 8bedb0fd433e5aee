"""The commit is found without a lock in the user's repository, so that no kill leaves one behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import onym
from onym.format import provenance


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    (tmp_path / "train.py").write_text("print(1)\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    provenance._git_commit.cache_clear()
    yield tmp_path
    provenance._git_commit.cache_clear()


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_files_differ(repository: Path) -> None:
    commit = git("rev-parse", "HEAD")
    (repository / "a new file").write_text("not tracked")
    assert provenance.provenance()["git"] == commit
    provenance._git_commit.cache_clear()
    (repository / "train.py").write_text("print(2)\n")
    assert provenance.provenance()["git"] == f"{commit}-dirty"


def test_no_program_that_a_repository_names_is_started(repository: Path) -> None:
    monitor = repository / "monitor"
    monitor.write_text(f"#!/bin/sh\ntouch {repository}/started\n")
    monitor.chmod(0o755)
    git("config", "core.fsmonitor", str(monitor))
    git("status")
    assert (repository / "started").exists(), "git itself does"
    (repository / "started").unlink()
    provenance._git_commit.cache_clear()
    assert "git" in provenance.provenance()
    assert not (repository / "started").exists()


def test_where_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    provenance._git_commit.cache_clear()
    assert "git" not in provenance.provenance()
    git("init", "-q")
    provenance._git_commit.cache_clear()
    assert "git" not in provenance.provenance()
    provenance._git_commit.cache_clear()


def test_git_is_asked_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @cache
    def commit() -> str:
        asked.append(threading.current_thread().name)
        return "0123"

    monkeypatch.setattr(provenance, "_git_commit", commit)
    monkeypatch.setattr(provenance, "_asking", None)
    with onym.Checkpointer(tmp_path, background=False) as checkpointer:
        checkpointer.save(1, {"model": torch.nn.Linear(1, 1)})
        checkpointer.save(2, {"model": torch.nn.Linear(1, 1)})
    assert asked == ["onym-git"], "once, and not in the thread that saves"
    assert checkpointer.open(2).provenance["git"] == "0123"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_killed_at_any_moment_it_leaves_the_repository_free(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run
    opened = 0

    def killed_at(number: int) -> Any:
        def traced(command: list[str], **options: Any) -> Any:
            inject = ["-e", "trace=openat", "-e", f"inject=openat:signal=KILL:when={number}"]
            return run(["strace", "-f", "-o", os.devnull, *inject, *command], **options)

        return traced

    while True:
        opened += 1
        os.utime(repository / "train.py", (opened, opened))  # git has to look into it again, and would like to note that
        provenance._git_commit.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "run", killed_at(opened))
            found = provenance._git_commit()
        assert not list((repository / ".git").glob("*.lock")), f"killed at its openat {opened}"
        git("commit", "-q", "--allow-empty", "-m", "goes on")
        if found is not None:
            break
    assert opened > 10


def test_sources_that_are_used_without_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PYTHONPATH=src: there is no version to be found, which is no reason not to save."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("onym.version.version", version)
    assert onym.__version__ == "not installed"
    onym.save(torch.nn.Linear(2, 1), tmp_path / "saved")
    assert onym.open_checkpoint(tmp_path / "saved").provenance["onym"] == "not installed"
