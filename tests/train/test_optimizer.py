"""Which optimizer and learning rate a run uses where nobody says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onym import GPT, save
from onym.cli.parsing import parse_options
from onym.errors import ConfigError
from onym.gpt.config import GPTConfig, ModelConfig
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.kinds import Arch
from onym.gpt.models import make_model
from onym.train import optimizer
from onym.train.init_from import starting_point
from onym.train.optimizer import build_optimizers, resolved, set_rates, with_recipe
from onym.train.options import DataOptions, ModelOptions, OptimizationOptions, RunOptions, TrainOptions
from onym.train.run_folder import RunFolder
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
    rates = [group["lr"] for each in build_optimizers(tiny, OptimizationOptions()) for group in each.param_groups]  # type: ignore[arg-type]
    assert rates == [1e-2, 1e-2, 1e-2]


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


@pytest.mark.parametrize(
    ("arch", "given", "rates"),
    [
        ("gpt2", {}, (1e-2, 1e-2)),
        ("qwen3", {}, (1e-2, 5e-3)),
        (None, {}, (1e-2, 5e-3)),
        ("llama", {"learning_rate": 2e-2}, (2e-2, 1e-2)),
        ("llama", {"muon_learning_rate": 4e-3}, (1e-2, 4e-3)),
        ("llama", {"optimizer": "adamw"}, (3e-3, None)),
    ],
)
def test_muons_matrices_have_a_rate_of_their_own(
    arch: Arch | None, given: dict[str, object], rates: tuple[float, float | None]
) -> None:
    chosen = OptimizationOptions(**given)  # type: ignore[arg-type]
    recipe = with_recipe(TrainOptions(model=ModelOptions(arch=arch), optimization=chosen)).optimization
    assert recipe.muon_momentum_warmup == (0 if arch == "gpt2" else None if rates[1] is None else 200)
    assert (recipe.learning_rate, recipe.muon_learning_rate) == (pytest.approx(rates[0]), rates[1] and pytest.approx(rates[1]))


def test_rates_rise_and_fall_together_and_the_momentum_rises(tiny: GPT) -> None:
    options = resolved(OptimizationOptions(muon_momentum_warmup=10, muon_learning_rate=5e-3), "gpt2", 128, muon=True)
    optimizers = build_optimizers(tiny, options)
    for number, rate, momentum in ((0, 2e-4, 0.85), (5, 1e-2, 0.9), (10, 5e-3, 0.95), (99, 1e-3, 0.95)):
        set_rates(optimizers, options, rate, number)
        assert [group["lr"] for group in optimizers[0].param_groups] == [pytest.approx(rate / 2)]
        assert [group["momentum"] for group in optimizers[0].param_groups] == [pytest.approx(momentum)]
        assert {group["lr"] for group in optimizers[1].param_groups} == {rate}
    set_rates(optimizers, options, 1e-3, 3)
    set_rates(optimizers, replace(options, muon_momentum_warmup=0), 1e-3, 4)  # as a run that is resumed without a warm-up
    assert [group["momentum"] for group in optimizers[0].param_groups] == [0.95]


def test_a_run_of_before_goes_on_with_what_it_had() -> None:
    """Its kind of model and its one rate for all, which it did not store."""
    stored = {"model": {"preset": "nano"}, "optimization": {"optimizer": "muon", "learning_rate": 1e-2}}
    options = with_recipe(TrainOptions.from_dict(stored))
    assert options.model.kind == "gpt2"
    assert (options.optimization.muon_learning_rate, options.optimization.muon_momentum_warmup) == (1e-2, 0)
    adamw = TrainOptions.from_dict({"optimization": {"optimizer": "adamw", "learning_rate": 1e-3}})
    assert with_recipe(adamw).optimization.muon_learning_rate is None
    assert TrainOptions().model.kind == "qwen3"


def test_zeros_to_start_with(onym: Run, book: Path, tmp_path: Path) -> None:
    done = onym("train", "--data", book, *TINY_RUN, "--arch", "llama", "--zero-init", "--compile", "off", "--steps", 1)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "runs/book/run.json").read_text())
    assert stored["options"]["optimization"]["zero_init"] is True
    assert stored["options"]["model"]["arch"] == "llama"


def test_a_run_that_continues_with_another_rate_changes_both(onym: Run, book: Path, tmp_path: Path) -> None:
    run = ("train", "--data", book, *WITHOUT_RECIPE, "--arch", "llama", "--compile", "off", "--name", "rates")
    assert onym(*run, "--steps", 2).returncode == 0
    for given, rates in ((("--learning-rate", 5e-3), (5e-3, 2.5e-3)), (("--muon-learning-rate", 1e-3), (5e-3, 1e-3))):
        assert onym("train", "--name", "rates", "--steps", 4, *given).returncode == 0
        stored = json.loads((tmp_path / "runs/rates/run.json").read_text())["options"]["optimization"]
        assert (stored["learning_rate"], stored["muon_learning_rate"]) == pytest.approx(rates)


def test_the_same_rate_again_changes_no_bit_of_muons(tmp_path: Path) -> None:
    # 4e-4 * 8e-4 / 8e-4 is not 4e-4
    recipe = OptimizationOptions(optimizer="muon", learning_rate=8e-4, muon_learning_rate=4e-4)
    RunFolder(tmp_path / "book").describe(TrainOptions(optimization=recipe), "interrupted")
    again = parse_options(["--runs-dir", str(tmp_path), "--name", "book", "--learning-rate", "8e-4"])
    assert again.optimization.muon_learning_rate == 4e-4


def test_an_option_of_gpt2_continues_a_run_of_gpt2(tmp_path: Path) -> None:
    model = ModelOptions(arch="gpt2", drop_rate=0.1)
    RunFolder(tmp_path / "book").describe(TrainOptions(model=model), "interrupted")
    again = parse_options(["--runs-dir", str(tmp_path), "--name", "book", "--drop-rate", "0.1"])
    assert again.model == model
    with pytest.raises(ConfigError, match="--drop-rate is of --arch gpt2"):
        parse_options(["--runs-dir", str(tmp_path), "--name", "other", "--drop-rate", "0.1"])


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (DecoderConfig(vocab_size=300, context_length=32, emb_dim=32, n_heads=4, n_layers=1), {"preset": "llama3.2-1b"}),
        (GPTConfig(vocab_size=300, context_length=32, emb_dim=32, n_heads=4, n_layers=1), {"drop_rate": 0.2}),
    ],
)
def test_from_takes_the_files_shape_and_not_the_presets(config: ModelConfig, given: dict[str, Any], tmp_path: Path) -> None:
    save(make_model(config), tmp_path / "model.safetensors")
    options = TrainOptions(
        data=DataOptions(tokenizer="gpt2"), model=ModelOptions(start_from=str(tmp_path / "model.safetensors"), **given)
    )
    started, _ = starting_point(options)
    wanted = config.to_dict() | {name: value for name, value in given.items() if name != "preset"}
    assert started.model.config(vocab_size=300).to_dict() == wanted


def test_a_run_does_not_become_one_of_another_kind(onym: Run, book: Path, tmp_path: Path) -> None:
    run = ("train", "--data", book, *TINY_RUN, "--compile", "off", "--steps", 2)
    assert onym(*run).returncode == 0
    path = tmp_path / "runs/book/run.json"
    stored = json.loads(path.read_text())
    del stored["options"]["model"]["arch"], stored["options"]["optimization"]["zero_init"]  # as it was written before
    path.write_text(json.dumps(stored))
    for option in (("--arch", "llama"), ("--zero-init",)):
        refused = onym("train", "--name", "book", "--steps", 4, *option)
        assert refused.returncode == 2
        assert f"started with other options ({option[0]} was" in refused.stderr
    assert onym("train", "--name", "book", "--steps", 4).returncode == 0
