"""prune: it deletes what it says, and nothing where it should not."""

from __future__ import annotations

from pathlib import Path

import pytest

import onym as library
from onym.cli import prune
from onym.storage.lock import LEASE
from tests.cli.test_inspect import damage, make_run, step_of, told
from tests.conftest import Run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def there(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_a_dry_run_says_it_and_deletes_nothing(onym: Run, run_folder: Path) -> None:
    done = onym("prune", run_folder, "--keep-last", 1, "--dry-run")
    fate = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert "would go" in fate["10"]
    assert "stays     pinned as 'keep-me'" in fate["20"]
    assert "stays     one of the newest" in fate["30"]
    assert "would be freed" in done.stdout
    assert there(run_folder) == [10, 20, 30]
    assert not (run_folder / "checkpoints" / LEASE).exists()


def test_it_deletes_what_need_not_stay(onym: Run, run_folder: Path) -> None:
    size = sum(file.stat().st_size for file in step_of(run_folder, 20).iterdir())
    assert onym("prune", run_folder, "--pin", 10, "--as", "first").returncode == 0
    assert onym("prune", run_folder, "--unpin", "keep-me").returncode == 0
    assert there(run_folder) == [10, 20, 30]
    result = told(onym, "prune", run_folder, "--keep-last", 1)
    assert result["deleted"] == result["to_delete"] == [20]
    assert result["retained"] == {"10": "pinned as 'first'", "30": "one of the newest"}
    assert result["bytes"] == size
    assert there(run_folder) == [10, 30]
    assert not (run_folder / "checkpoints" / LEASE).exists()


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (("--keep-every", "10"), [10, 20, 30]),
        (("--keep-every", "30"), [20, 30]),
        (("--keep-best", "val_loss:max"), [10, 20, 30]),
        (("--keep-best", "val_loss"), [20, 30]),
    ],
)
def test_each_reason_to_stay(onym: Run, run_folder: Path, arguments: tuple[str, ...], left: list[int]) -> None:
    assert onym("prune", run_folder, "--keep-last", 1, *arguments).returncode == 0
    assert there(run_folder) == left


def test_not_against_a_writer_that_lives(onym: Run, run_folder: Path) -> None:
    with library.Checkpointer(run_folder / "checkpoints") as checkpointer:
        checkpointer.acquire()
        done = onym("prune", run_folder, "--keep-last", 1)
        assert done.returncode == 2
        assert "is being written by another Checkpointer of this program" in done.stderr
        assert onym("prune", run_folder, "--keep-last", 1, "--dry-run").returncode == 0
    assert there(run_folder) == [10, 20, 30]


def test_not_before_a_successor_that_is_damaged(onym: Run, run_folder: Path) -> None:
    damage(step_of(run_folder, 30) / "model.safetensors")
    done = onym("prune", run_folder, "--keep-last", 1)
    assert done.returncode == 2
    assert "does not read back" in done.stderr
    assert there(run_folder) == [10, 20, 30]
    assert not (run_folder / "checkpoints" / LEASE).exists(), "the lease is given back after an error too"


def test_what_could_not_be_deleted_is_said(onym: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onym.storage.local.remove_folder", lambda path, last: False)
    done = onym("prune", run_folder, "--keep-last", 1)
    assert done.returncode == prune.INCOMPLETE
    assert "is still there" in done.stdout
    assert "0 bytes freed" in done.stdout
    assert "could not be deleted" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("absent",), "is no run"),
        (("young",), "is no run with checkpoints"),
        (("run", "--keep-last", "0"), "keep_last is 0"),
        (("run", "--keep-best", "x:lowest"), "keep_best is"),
        (("run", "--keep-best", "val_los"), "a metric 'val_los' (did you mean 'val_loss'?): they have val_loss"),
        (("run", "--pin", "10"), "--pin takes a step and --as its name"),
        (("run", "--as", "x"), "--pin takes a step and --as its name"),
        (("run", "--pin", "10", "--as", "x", "--unpin", "keep-me"), "two things"),
        (("run", "--pin", "11", "--as", "x"), "no step 11 to pin"),
        (("run", "--unpin", "x"), "Nothing is pinned as 'x'"),
    ],
)
def test_bad_input_is_a_sentence(onym: Run, run_folder: Path, arguments: tuple[str, ...], says: str) -> None:
    (run_folder.parent / "young" / "checkpoints").mkdir(parents=True)
    done = onym("prune", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert there(run_folder) == [10, 20, 30]
