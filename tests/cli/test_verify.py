"""verify: every byte of every step, and what could not be checked is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import onym as library
from onym.cli import verify
from onym.format.manifest import MANIFEST
from tests.cli.test_inspect import CONFIG, damage, make_run, step_of, told
from tests.conftest import Run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def test_every_step_is_read(onym: Run, run_folder: Path) -> None:
    done = onym("verify", run_folder)
    assert done.returncode == 0
    assert done.stdout.count("good  ") == len(done.stdout.splitlines()) == 3
    assert done.stderr == ""
    damage(step_of(run_folder, 20) / "model.safetensors")
    done = onym("verify", run_folder)
    assert done.returncode == 1
    assert done.stdout.count("good  ") == 2
    assert "DAMAGED" in done.stdout
    assert "step-000000020/model.safetensors' is damaged: the bytes of" in done.stdout
    result = told(onym, "verify", run_folder, code=1)
    assert not result["good"]
    assert [len(step["damages"]) for step in result["checked"]] == [0, 1, 0]
    only = result["checked"][1]["damages"][0]
    assert (only["step"], only["file"]) == (20, "model.safetensors")
    assert only["tensor"] in library.GPT(CONFIG).state_dict()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", MANIFEST])
def test_each_file_counts(onym: Run, run_folder: Path, file: str) -> None:
    damage(step_of(run_folder, 30) / file)
    assert onym("verify", run_folder).returncode == 1
    assert onym("verify", run_folder, "--step", "latest").returncode == 1, "the newest itself, not the newest good one"
    assert onym("verify", step_of(run_folder, 30)).returncode == 1
    assert onym("verify", run_folder, "--step", 10).returncode == 0
    assert onym("verify", run_folder, "--step", "keep-me").returncode == 0


def test_what_is_missing_or_short_is_damage(onym: Run, run_folder: Path) -> None:
    (step_of(run_folder, 30) / MANIFEST).unlink()
    (step_of(run_folder, 20) / "optimizer.safetensors").write_bytes(b"")
    result = told(onym, "verify", run_folder, code=1)
    assert [len(step["damages"]) for step in result["checked"]] == [0, 1, 1]


def test_it_says_what_it_could_check(onym: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "stock.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pth")
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    library.save(nn.Linear(1, 1), tmp_path / "ours.safetensors")
    for file, says, checked in (
        ("stock.safetensors", "its structure only: it holds no hashes", "structure"),
        ("x.pth", "the checksums of its zip", "checksums of the zip"),
        ("old.pth", "its structure only", "structure"),
        ("ours.safetensors", "ours.safetensors\n", "every byte"),
    ):
        done = onym("verify", file)
        assert done.returncode == 0
        assert says in done.stdout
        assert told(onym, "verify", file)["checked"][0]["checked"] == checked
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(b"\x00\x00\x80\x3f")] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    damage(tmp_path / "ours.safetensors")
    for file in ("x.pth", "ours.safetensors"):
        assert onym("verify", file).returncode == 1


def test_a_step_that_its_run_deletes_meanwhile_is_no_damage(
    onym: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = verify.read_checkpoint

    def late(path: Path) -> library.Checkpoint:
        if path.name == "step-000000010":
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(verify, "read_checkpoint", late)
    done = onym("verify", run_folder)
    assert (done.returncode, done.stdout.count("good  ")) == (0, 2)
    assert "step-000000010' was deleted meanwhile" in done.stderr


def test_a_terminal_sees_how_far_it_is(onym: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    done = onym("verify", run_folder)
    assert "reading 2 of 3" in done.stderr
    assert "reading" not in done.stdout
    assert done.stderr.endswith(" \r"), "the line is wiped away"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("absent",), "nothing at 'absent'"),
        (("run", "--step", "77"), "no step 77"),
        (("empty",), "holds no weights"),
        (("young",), "has no checkpoints yet"),
    ],
)
def test_bad_input_is_a_sentence(onym: Run, run_folder: Path, arguments: tuple[str, ...], says: str) -> None:
    (run_folder.parent / "empty").mkdir()
    (run_folder.parent / "young" / "checkpoints").mkdir(parents=True)
    done = onym("verify", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
