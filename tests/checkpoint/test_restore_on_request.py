"""Differences that are refused, and gone on with on request, in a restore: by the options that its messages name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onym
from onym.errors import CheckpointError, ConfigError
from onym.names.mismatch import MismatchError


class Classifier(nn.Module):
    """A backbone, and a head for some classes."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.head = nn.Linear(4, classes)

    @property
    def first(self) -> nn.Linear:
        layer = self.backbone[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.backbone(x))
        return result


def stepped(model: nn.Module, parameters: object = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters or model.parameters())  # type: ignore[arg-type]
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


def saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> onym.Checkpointer:
    with onym.Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
    return onym.Checkpointer(folder)


def test_what_was_frozen_is_unfrozen_and_the_optimizer_goes_on(tmp_path: Path) -> None:
    """As in detectron2 #2465."""
    trained = Classifier()
    trained.backbone.requires_grad_(False)
    former = stepped(trained, list(trained.head.parameters()))
    checkpointer = saved(tmp_path, trained, former)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [each.clone() for each in model.parameters()]
    with pytest.raises(CheckpointError, match=r'accept=\["added"\]'):
        checkpointer.restore({"model": model, "optimizer": optimizer})
    assert all(map(torch.equal, before, model.parameters()))
    restored = checkpointer.restore({"model": model, "optimizer": optimizer}, accept=["added"])
    report = restored.reports["optimizer"]
    assert isinstance(report, onym.OptimizerReport)
    assert report.restored == ["head.weight", "head.bias"]
    assert len(report.fresh) == 4
    was = former.state[trained.head.weight]["exp_avg"]
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], was)
    assert torch.equal(model.head.weight, trained.head.weight)

    tensors, description = onym.stored_optimizer_state(tmp_path)
    assert torch.equal(tensors["state.exp_avg.head.weight"], was)
    assert set(description["parameters"]) == {"head.weight", "head.bias"}
    assert tensors.keys() == onym.optimizer_state(trained, former)[0].keys()
    with pytest.raises(CheckpointError, match="no optimizer called 'adam'; its optimizers: optimizer"):
        onym.stored_optimizer_state(tmp_path, name="adam")


def test_a_head_of_another_size_keeps_its_values_and_starts_its_moments_anew(tmp_path: Path) -> None:
    trained = Classifier()
    checkpointer = saved(tmp_path, trained, former := stepped(trained))
    model = Classifier(5)
    optimizer = stepped(model)
    head = model.head.weight.clone()
    with pytest.raises(MismatchError, match=r'skip_mismatched=\["head\.\*"\]'):
        checkpointer.restore({"model": model, "optimizer": optimizer})
    restored = checkpointer.restore({"model": model, "optimizer": optimizer}, skip_mismatched=["head.*"])
    report = restored.reports["model"]
    assert isinstance(report, onym.LoadReport)
    assert report.skipped == {"head.weight": ((3, 4), (5, 4)), "head.bias": ((3,), (5,))}
    assert "2 of another shape, left as they were (head.weight, head.bias)" in str(report)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.first.weight, trained.first.weight)
    first, theirs = model.first.weight, trained.first.weight
    assert torch.equal(optimizer.state[first]["exp_avg"], former.state[theirs]["exp_avg"])
    assert model.head.weight not in optimizer.state
    stepped(model)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"'haed\.\*', which is no name of the model's \(did you mean 'head'\?\)"):
        checkpointer.restore({"model": model}, skip_mismatched=["haed.*"])


def test_names_and_dtypes_may_differ_on_request(tmp_path: Path) -> None:
    trained = Classifier()
    checkpointer = saved(tmp_path, trained, stepped(trained))
    model = nn.ModuleDict({"backbone": Classifier().backbone, "other": nn.Linear(1, 1)}).double()
    differing: tuple[dict[str, Any], ...] = ({}, {"strict": False}, {"dtype": "cast"})
    for options in differing:
        with pytest.raises(MismatchError):
            checkpointer.restore({"model": model}, **options)
    report = checkpointer.restore({"model": model}, strict=False, dtype="cast").reports["model"]
    assert isinstance(report, onym.LoadReport)
    assert (report.missing, report.unexpected) == (["other.weight", "other.bias"], ["head.weight", "head.bias"])
    assert torch.equal(model.state_dict()["backbone.0.weight"], trained.first.weight.double())


def test_an_optimizer_that_does_not_fit_leaves_a_model_that_was_to_differ(tmp_path: Path) -> None:
    trained = Classifier()
    checkpointer = saved(tmp_path, trained, stepped(trained))
    model = nn.ModuleDict({"backbone": Classifier().backbone})
    before = [each.clone() for each in model.parameters()]
    live = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with pytest.raises(CheckpointError, match=r'accept=\["removed"\]'):
        checkpointer.restore(live, strict=False)
    assert all(map(torch.equal, before, model.parameters()))
    assert checkpointer.restore(live, strict=False, accept="removed").step == 1


def test_of_several_optimizers_none_is_changed_where_one_does_not_fit(tmp_path: Path) -> None:
    trained = Classifier()
    optimizers = {"first": stepped(trained, list(trained.backbone.parameters())), "second": stepped(trained)}
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": trained, **optimizers})
    model = Classifier()
    first, second = torch.optim.AdamW(model.backbone.parameters()), torch.optim.SGD(model.parameters())
    with pytest.raises(CheckpointError, match="stored by AdamW, this is SGD"):
        onym.Checkpointer(tmp_path).restore({"model": model, "first": first, "second": second})
    assert not first.state


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile])
def test_load_skips_too(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    trained = Classifier()
    for place in ("m.safetensors", "m.pth", "m"):
        onym.save(trained, tmp_path / place)
        model = Classifier(5)
        head = model.head.weight.clone()
        with pytest.raises(MismatchError, match=r'skip_mismatched=\["head\.\*"\]'):
            onym.load(tmp_path / place, into=wrap(model), strict=False)
        report = onym.load(tmp_path / place, into=wrap(model), skip_mismatched="head")
        assert list(report.skipped) == ["head.weight", "head.bias"]
        assert len(report.loaded) == 4
        assert torch.equal(model.head.weight, head)
        assert torch.equal(model.state_dict()["backbone.1.weight"], trained.state_dict()["backbone.1.weight"])
    with torch.device("meta"):
        empty = Classifier(5)
    with pytest.raises(ConfigError, match=r"head\.weight is on the meta device"):
        onym.load(tmp_path / "m", into=empty, skip_mismatched=["head.*"])
    assert empty.head.weight.is_meta


def test_a_model_with_loading_code_of_its_own_skips_too() -> None:
    class Own(Classifier):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            if (old := state.pop(f"{prefix}head.old", None)) is not None:
                state[f"{prefix}head.bias"] = old
            super()._load_from_state_dict(state, prefix, *rest)

    state = dict(Classifier().state_dict())
    model = Own(3)
    state["head.weight"], state["head.old"] = torch.zeros(7, 4), state.pop("head.bias")
    head = model.head.weight.clone()
    report = onym.load_state_dict(model, state, skip_mismatched=["head.*"])
    assert list(report.skipped) == ["head.weight"]
    assert "head.weight" not in report.loaded
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.head.bias, state["head.old"])
