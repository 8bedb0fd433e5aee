"""diff: equal is said only of what is equal, and differences are summed up."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onym as library
from onym.cli import diff
from tests.cli.test_inspect import CONFIG, damage, make_run, told
from tests.conftest import Run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def differences(onym: Run, folder: Path, a: dict[str, Any], b: dict[str, Any], code: int = 1) -> Any:
    """What is told of two state dicts."""
    torch.save(a, folder / "a.pth")
    torch.save(b, folder / "b.pth")
    return told(onym, "diff", folder / "a.pth", folder / "b.pth", code=code)


def test_equal_weights_are_told_first(onym: Run, run_folder: Path, tmp_path: Path) -> None:
    library.save(library.load_model(run_folder), tmp_path / "same.safetensors")
    done = onym("diff", run_folder, "same.safetensors")
    assert done.returncode == 0
    assert done.stdout.startswith("The same weights (identity ")
    result = told(onym, "diff", run_folder, "same.safetensors")
    assert result["equal"]
    assert result["identity"][0] == result["identity"][1] is not None


def test_a_damaged_file_is_never_the_same(onym: Run, tmp_path: Path) -> None:
    library.save(nn.Linear(4, 4), tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    damage(tmp_path / "b.safetensors")
    done = onym("diff", "a.safetensors", "b.safetensors")
    assert done.returncode == 2
    assert "'b.safetensors' is damaged" in done.stderr
    assert done.stdout == ""


def test_polluted_names_are_put_right(onym: Run, run_folder: Path, tmp_path: Path) -> None:
    model = library.load_model(run_folder)
    torch.save(torch.compile(model).state_dict(), tmp_path / "whole.pth")
    model.trf_blocks[1] = torch.compile(model.trf_blocks[1])
    torch.save(model.state_dict(), tmp_path / "part.pth")
    for file in ("whole.pth", "part.pth"):
        for pair in ((run_folder, file), (file, run_folder)):
            done = onym("diff", *pair)
            assert done.returncode == 0, done.stdout
            assert "The same weights: every name" in done.stdout
            assert f"Names of {'AB'[pair.index(file)]} that wrappers had changed were cleaned" in done.stdout
    assert "trf_blocks.1._orig_mod.norm1.weight" in done.stdout
    renamed = told(onym, "diff", run_folder, "whole.pth")["renamed"]["b"]
    assert renamed["_orig_mod.tok_emb.weight"] == "tok_emb.weight"


def test_differences_are_summed_up(onym: Run, run_folder: Path, tmp_path: Path) -> None:
    done = onym("diff", run_folder, run_folder, "--step-a", "10", "--step-b", "30")
    assert done.returncode == 1
    assert "1 tensor has other values" in done.stdout
    assert "trf_blocks.1.norm1.weight  1            2        100.00%" in done.stdout
    other = library.GPTConfig.from_dict({**CONFIG.to_dict(), "n_layers": 2, "emb_dim": 16})
    library.save(library.GPT(other), tmp_path / "other")
    done = onym("diff", run_folder, "other")
    assert "config: n_layers is 3 in A, 2 in B" in done.stdout
    assert "Only in A" in done.stdout
    assert "  trf_blocks.2.norm1.weight\n" in done.stdout
    result = told(onym, "diff", run_folder, "other", code=1)
    assert result["kinds"]["tok_emb.weight"] == [["float32", [50, 8]], ["float32", [50, 16]]]
    assert all(name.startswith("trf_blocks.2.") for name in result["only_a"])
    assert result["only_b"] == []


def test_many_differences_are_cut_to_the_largest_and_grouped(onym: Run, tmp_path: Path) -> None:
    a = {f"b.{number}.w": torch.ones(2) for number in range(30)}
    b = {name: tensor + number for number, (name, tensor) in enumerate(a.items())}
    result = differences(onym, tmp_path, a, b)
    assert result["equal_tensors"] == 1
    assert len(result["values"]) == 29
    assert result["groups"].keys() == {"b.*.w"}
    squares = sum(number**2 for number in range(30))
    assert result["total"]["relative"] == pytest.approx(math.sqrt(squares / 30))
    text = onym("diff", "a.pth", "b.pth").stdout
    assert "29 tensors have other values, 1 are equal. Those that differ most:" in text
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  b.") and "*" not in line]
    assert shown == [f"b.{number}.w" for number in range(29, 19, -1)]
    assert "b.*.w" in text


def test_measures(onym: Run, tmp_path: Path) -> None:
    a = {"w": torch.tensor([3.0, 4.0, 0.0, math.nan])}
    assert differences(onym, tmp_path, a, a, code=0)["equal"], "a NaN is equal to a NaN here"
    gap = differences(onym, tmp_path, a, {"w": torch.tensor([3.0, 4.5, 0.0, math.nan])})["values"]["w"]
    assert gap == {"largest": 0.5, "relative": pytest.approx(0.1), "changed": 0.25}
    assert differences(onym, tmp_path, a, {"w": torch.tensor([3.0, 4.0, 0.0, 1.0])})["values"]["w"]["largest"] == "inf"
    zero = {"w": torch.zeros(2)}
    assert differences(onym, tmp_path, zero, {"w": torch.ones(2)})["values"]["w"]["relative"] == "inf"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([2**60]), torch.tensor([2**60 + 1])),
        (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([2.0]).to(torch.float8_e4m3fn)),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
        (torch.tensor([math.inf]), torch.tensor([-math.inf])),
        (torch.tensor([1.0, 0.0]).to_sparse(), torch.tensor([0.0, 1.0]).to_sparse()),
    ],
    ids=["large integers", "float8", "bool", "complex", "infinities", "sparse"],
)
def test_every_dtype_is_told_apart(onym: Run, tmp_path: Path, one: torch.Tensor, other: torch.Tensor) -> None:
    assert differences(onym, tmp_path, {"w": one}, {"w": other})["values"].keys() == {"w"}
    assert differences(onym, tmp_path, {"w": one}, {"w": one}, code=0)["equal"]


def test_other_dtypes_and_values_that_are_no_tensors(onym: Run, tmp_path: Path) -> None:
    a: dict[str, Any] = {"w": torch.ones(2), "x._extra_state": {"n": 1, "t": torch.ones(3)}}
    assert differences(onym, tmp_path, a, a, code=0)["equal"]
    result = differences(onym, tmp_path, a, {**a, "w": torch.ones(2, dtype=torch.float64)})
    assert result["kinds"] == {"w": [["float32", [2]], ["float64", [2]]]}
    assert result["values"] == {}
    result = differences(onym, tmp_path, a, {**a, "x._extra_state": {"n": 1, "t": torch.zeros(3)}})
    assert result["other_values"] == ["x._extra_state"]
    assert "no distance" in onym("diff", "a.pth", "b.pth").stdout


def test_large_tensors_are_compared_in_chunks(onym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = {"w": torch.randn(7, 5)}, {"w": torch.randn(7, 5)}
    whole = differences(onym, tmp_path, a, b)["values"]["w"]
    sizes = []
    add = diff._add_chunk

    def watched(gap: diff._Gap, left: torch.Tensor, right: torch.Tensor) -> None:
        sizes.append(left.numel())
        add(gap, left, right)

    monkeypatch.setattr(diff, "_CHUNK", 8)
    monkeypatch.setattr(diff, "_add_chunk", watched)
    assert differences(onym, tmp_path, a, b)["values"]["w"] == pytest.approx(whole)
    assert sizes == [8, 8, 8, 8, 3]


def test_bad_input_is_a_sentence(onym: Run, run_folder: Path) -> None:
    for arguments, says in ((("run", "absent"), "nothing at 'absent'"), (("run", "run", "--step-b", "5"), "no step 5")):
        done = onym("diff", *arguments)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
