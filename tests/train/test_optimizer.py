"""Which optimizer and learning rate a run uses where nobody says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onym.train import optimizer
from onym.train.optimizer import build_optimizers, with_recipe
from onym.train.options import ModelOptions, OptimizationOptions, RunOptions, TrainOptions
from tests.conftest import TINY_RUN, Run

WITHOUT_RECIPE = TINY_RUN[: TINY_RUN.index("--optimizer")]


@pytest.mark.parametrize(
    ("preset", "given", "kind", "rate"),
    [
        ("nano", {}, "muon", 1e-2),
        ("micro", {}, "muon", 5e-3),
        ("micro", {"optimizer": "adamw"}, "adamw", 1.5e-3),
        ("gpt2-small", {"optimizer": "adamw"}, "adamw", 5e-4),
        ("gpt2-small", {"learning_rate": 7e-4}, "muon", 7e-4),
    ],
)
def test_the_rate_falls_with_the_width(preset: str, given: dict[str, object], kind: str, rate: float) -> None:
    options = TrainOptions(model=ModelOptions(preset=preset), optimization=OptimizationOptions(**given))  # type: ignore[arg-type]
    recipe = with_recipe(options).optimization
    assert (recipe.optimizer, recipe.learning_rate) == (kind, pytest.approx(rate))
    assert with_recipe(with_recipe(options)) == with_recipe(options)


def test_what_muon_cannot_do_is_adamws(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (
        TrainOptions(run=RunOptions(parallel="fsdp")),
        TrainOptions(model=ModelOptions(start_from="runs/other")),
    ):
        assert with_recipe(options).optimization.optimizer == "adamw"
    monkeypatch.delattr(torch.optim, "Muon")
    assert with_recipe(TrainOptions()).optimization.optimizer == "adamw"


def test_a_model_by_itself_gets_the_same(tiny: object) -> None:
    kinds = [type(each).__name__ for each in build_optimizers(tiny, OptimizationOptions())]  # type: ignore[arg-type]
    assert kinds == ["Muon", "AdamW"]
    assert {group["lr"] for each in build_optimizers(tiny, OptimizationOptions()) for group in each.param_groups} == {1e-2}  # type: ignore[arg-type]


def test_a_run_stores_its_recipe_and_resumes_with_it(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onym("train", "--data", book, *WITHOUT_RECIPE, "--compile", "off", "--steps", 4).returncode == 0
    stored = json.loads((tmp_path / "runs/book/run.json").read_text())["options"]["optimization"]
    assert (stored["optimizer"], stored["learning_rate"]) == ("muon", 1e-2)
    monkeypatch.setattr(optimizer, "_PEAK_RATES", {"muon": 1.0, "adamw": 1.0})  # another version's idea
    done = onym("train", "--name", "book", "--steps", 6)
    assert done.returncode == 0, done.stderr
    assert "bitwise identical" in done.stdout
    again = json.loads((tmp_path / "runs/book/run.json").read_text())["options"]["optimization"]
    assert again["learning_rate"] == 1e-2
