"""Where torch loads, Onym does: a model's own loading code is asked before a shape or a name is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.ao import quantization
from torch.nn.parameter import UninitializedParameter

import onym
from onym import MismatchError, OnymError
from onym.errors import CheckpointError


class LazyAtHand(nn.Module):
    """As torch_geometric.nn.Linear(-1, 2): lazy without torch's LazyModuleMixin, by a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: nn.Parameter = UninitializedParameter()
        self._register_load_state_dict_pre_hook(self._take_shape)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = (
            self.weight if keep_vars or torch.nn.parameter.is_lazy(self.weight) else self.weight.detach()
        )

    def _take_shape(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        weight = state.get(prefix + "weight")
        if isinstance(weight, torch.Tensor) and isinstance(self.weight, UninitializedParameter):
            self.weight.materialize(weight.shape)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, UninitializedParameter):
            self.weight.materialize((2, values.shape[-1]))
            nn.init.normal_(self.weight)
        return values @ self.weight.T


class Grows(nn.Module):
    """Its own ``_load_from_state_dict`` makes a buffer as large as the stored one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(0))
        self.line = nn.Linear(3, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, values.detach().flatten()])
        return self.line(values)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "seen" in state:
            self.seen = torch.zeros_like(state[prefix + "seen"])
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[no-untyped-call]


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(2))


def lazy_compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.LazyLinear(4)), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(2))  # type: ignore[arg-type]


def quantisation_aware() -> nn.Module:
    """Observers per channel begin with empty ranges, and have one a channel after the first batch."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
        return quantization.prepare_qat(model.train())  # type: ignore[no-any-return]


MODELS = [lazy, lazy_compiled, LazyAtHand, Grows, quantisation_aware]


def by_dict(trained: nn.Module, fresh: nn.Module, folder: Path) -> None:
    onym.load_state_dict(fresh, onym.state_dict(trained))


def by_checkpointer(trained: nn.Module, fresh: nn.Module, folder: Path) -> None:
    with onym.Checkpointer(folder / "run") as checkpointer:
        checkpointer.save(1, {"model": trained})
        checkpointer.restore({"model": fresh})


def by_file(name: str) -> Callable[[nn.Module, nn.Module, Path], None]:
    def load(trained: nn.Module, fresh: nn.Module, folder: Path) -> None:
        onym.save(trained, folder / name)
        onym.load(folder / name, into=fresh)

    return load


WAYS = {"dict": by_dict, "checkpointer": by_checkpointer, "pth": by_file("m.pth"), "safetensors": by_file("m.safetensors")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", MODELS)
def test_what_a_model_makes_room_for_is_loaded(make: Callable[[], nn.Module], way: str, tmp_path: Path) -> None:
    batch = torch.randn(8, 3)
    trained, fresh = make(), make()
    trained(batch)
    WAYS[way](trained, fresh, tmp_path)
    state, expected = onym.state_dict(fresh), onym.state_dict(trained)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(fresh.eval()(batch), trained.eval()(batch))


@pytest.mark.parametrize("make", [lazy, lazy_compiled, LazyAtHand, Grows, quantisation_aware])
def test_what_it_does_not_take_is_undone(make: Callable[[], nn.Module]) -> None:
    trained, fresh = make(), make()
    trained(torch.randn(8, 3))
    before = {
        name: (type(value), None if torch.nn.parameter.is_lazy(value) else value.clone()) for name, value in entries(fresh)
    }
    with pytest.raises(MismatchError, match="nothing was changed"):
        onym.load_state_dict(fresh, {**onym.state_dict(trained), "of_another": torch.zeros(1)})
    for name, value in entries(fresh):
        kind, values = before[name]
        assert type(value) is kind
        assert values is None or torch.equal(value, values)
    fresh(torch.randn(8, 5 if make in (lazy, LazyAtHand) else 3))  # a lazy layer is still free to choose


@pytest.mark.parametrize("make", [lazy, LazyAtHand, Grows, quantisation_aware])
@pytest.mark.parametrize("fails", ["a model", "an optimizer"])
def test_of_several_models_none_is_changed_where_a_later_one_does_not_fit(
    make: Callable[[], nn.Module], fails: str, tmp_path: Path
) -> None:
    trained, line = make(), nn.Linear(3, 2)
    trained(torch.randn(8, 3))
    optimizer = torch.optim.AdamW(line.parameters())
    line(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with onym.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": trained, "other": line, "optimizer": optimizer})
        fresh, other = make(), nn.Linear(3, 4 if fails == "a model" else 2)
        given: dict[str, Any] = {"model": fresh, "other": other}
        if fails == "an optimizer":
            given["optimizer"] = torch.optim.AdamW([other.weight])
        before = {
            name: (type(value), None if torch.nn.parameter.is_lazy(value) else value.clone()) for name, value in entries(fresh)
        }
        with pytest.raises(OnymError, match="nothing was changed"):
            checkpointer.restore(given)
        for name, value in entries(fresh):
            kind, values = before[name]
            assert type(value) is kind
            assert values is None or torch.equal(value, values)


def entries(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize("kind", ["dict", "safetensors", "pth"])
def test_a_batch_norm_without_its_counter_loads_as_in_torch(kind: str, tmp_path: Path) -> None:
    """Files that were written before torch 0.4.1, and by programs of other kinds."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    trained, fresh, torchs = model(), model(), model()
    trained(torch.randn(2, 1, 8, 8))
    state = {name: value for name, value in trained.state_dict().items() if "num_batches_tracked" not in name}
    torchs.load_state_dict(state)
    if kind == "dict":
        onym.load_state_dict(fresh, state)
    elif kind == "safetensors":
        save_file(state, tmp_path / "m.safetensors")
        onym.load(tmp_path / "m.safetensors", into=fresh)
    else:
        torch.save(state, tmp_path / "m.pth")
        onym.load(tmp_path / "m.pth", into=fresh)
    assert all(torch.equal(value, torchs.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_a_file_that_states_its_versions_is_taken_at_its_word() -> None:
    """As in torch: a BatchNorm of a version that had the counter is incomplete without it."""
    state = nn.BatchNorm1d(2).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        nn.BatchNorm1d(2).load_state_dict(state)
    with pytest.raises(MismatchError, match="num_batches_tracked"):
        onym.load_state_dict(nn.BatchNorm1d(2), state)


def test_what_overflows_in_a_model_that_makes_room_is_reported() -> None:
    fresh = Grows().half()
    state = {**Grows().state_dict(), "seen": torch.full((4,), 1e6)}
    with pytest.warns(UserWarning, match="became infinite in 1 tensors"):
        assert onym.load_state_dict(fresh, state, dtype="cast").overflowed == ["seen"]


def test_without_strict_a_model_that_makes_room_is_asked_too() -> None:
    trained, fresh = Grows(), Grows()
    trained(torch.randn(8, 3))
    state = {name: value for name, value in trained.state_dict().items() if name != "line.bias"}
    report = onym.load_state_dict(fresh, {**state, "more": torch.zeros(1)}, strict=False)
    assert (report.missing, report.unexpected) == (["line.bias"], ["more"])
    assert report.loaded == ["seen", "line.weight"]
    assert torch.equal(fresh.seen, trained.seen)


def test_a_dtype_is_refused_whatever_the_model_would_do() -> None:
    trained, fresh = Grows(), Grows()
    trained(torch.randn(8, 3))
    with pytest.raises(MismatchError, match="dtype"):
        onym.load_state_dict(fresh, {name: value.double() for name, value in trained.state_dict().items()})
    with pytest.raises(CheckpointError):
        onym.load_state_dict(fresh, {**trained.state_dict(), "seen": torch.zeros(4, device="meta")})
    assert fresh.seen.numel() == 0
