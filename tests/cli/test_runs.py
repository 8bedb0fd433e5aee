"""``onym runs``: what there is, and how it compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_train import EAGER, start
from tests.conftest import Run


@pytest.fixture
def two(onym: Run, book: Path, tmp_path: Path) -> Path:
    for name, seed in (("first", 0), ("second", 1)):
        assert onym("train", "--data", book, *EAGER, "--steps", 20, "--seed", seed, "--name", name).returncode == 0
    return tmp_path / "runs"


def test_runs_are_listed_with_what_became_of_them(onym: Run, book: Path, two: Path) -> None:
    killed = start(*("train", "--data", book, *EAGER, "--steps", 10**6, "--save-every", 50, "--name", "night"),
                   cwd=book.parent, kill_at=two / "night/checkpoints/step-000000050")  # fmt: skip
    listed = onym("runs").stdout.splitlines()
    assert listed[1].split()[:2] == ["night", "running"]
    killed.kill()
    killed.wait()
    (two / "broken").mkdir()
    (two / "broken/run.json").write_text("{")
    done = onym("runs")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "status", "step", "held-out", "best", "tokens/s", "saved"]
    assert [line.split()[0] for line in lines[1:]] == ["broken", "night", "second", "first"], "the newest first"
    assert "run.json is damaged" in lines[1]
    assert lines[2].split()[1] == "killed"
    assert lines[4].split()[1:3] == ["finished", "20/20"]
    assert "@20" in lines[4]
    assert all(len(line) <= 80 for line in lines)
    rows = json.loads(onym("runs", "--json").stdout)["runs"]
    assert rows[3]["parameters"] > 0
    assert rows[3]["best"] == rows[3]["held_out"]


def test_runs_are_compared_in_one_picture(onym: Run, two: Path, tmp_path: Path) -> None:
    for output, begins in (("losses.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")):
        done = onym("runs", "first", two / "second", "--plot", output, "--x", "steps")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / output).read_bytes().startswith(begins)
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["first", "finished", "20/20"], ["second", "finished", "20/20"]]
    assert lines[3] == "Drawn: x.pdf"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("runs", "gone"), "There is no run or folder 'gone'"),
        (("runs", "."), "There are no runs in '.'"),
        (("runs", "frist", "--plot", "x.png"), "There is no run or folder 'frist' (did you mean 'first'?)"),
        (("runs", "first", "--plot", "x.doc"), "--plot takes a file that ends with .png, .svg, .pdf"),
        (("runs", "empty", "--plot", "x.png"), "has no metrics yet"),
    ],
)
def test_what_is_not_there_is_said(onym: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    for name in ("first", "empty"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text('{"step": 0}\n' if name == "first" else "")
    done = onym(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
