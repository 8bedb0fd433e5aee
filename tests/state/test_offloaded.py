"""Models that accelerate has offloaded are saved with their values; loading into one is refused, as it would change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

import onym
from onym.errors import ConfigError

Offload = Callable[[nn.Module, Path], object]

WAYS: dict[str, Offload] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "cpu_offload with buffers": lambda model, folder: accelerate.cpu_offload(
        model, execution_device="cpu", offload_buffers=True
    ),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder / "disk"), execution_device="cpu"),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "disk", "2": "cpu"}, main_device="cpu", offload_dir=str(folder / "disk")
    ),
}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize("way", WAYS)
def test_its_values_are_saved(way: str, tmp_path: Path) -> None:
    trained, batch = model(), torch.randn(5, 3)
    expected, outputs = {name: value.clone() for name, value in trained.state_dict().items()}, trained(batch)
    WAYS[way](trained, tmp_path)
    assert any(value.is_meta for value in trained.state_dict().values())
    state = onym.state_dict(trained)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    for name in ("m.pth", "m.safetensors", "m"):
        onym.save(trained, tmp_path / name)
        fresh = model()
        onym.load(tmp_path / name, into=fresh)
        assert torch.equal(fresh(batch), outputs)
    with onym.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": trained})
        fresh = model()
        checkpointer.restore({"model": fresh})
    assert torch.equal(fresh(batch), outputs)
    assert torch.equal(trained(batch), outputs)


@pytest.mark.parametrize("way", WAYS)
def test_loading_into_it_is_refused(way: str, tmp_path: Path) -> None:
    other, offloaded, batch = model(), model(), torch.randn(5, 3)
    onym.save(other, tmp_path / "m.safetensors")
    WAYS[way](offloaded, tmp_path)
    before = offloaded(batch)
    with onym.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": other})
        for load in (
            lambda: onym.load(tmp_path / "m.safetensors", into=offloaded),
            lambda: onym.load_state_dict(offloaded, onym.state_dict(other)),
            lambda: checkpointer.restore({"model": offloaded}),
        ):
            with pytest.raises(ConfigError, match=r"0\.weight is offloaded|1\.weight is offloaded"):
                load()
    assert torch.equal(offloaded(batch), before)
    accelerate.hooks.remove_hook_from_submodules(offloaded)
    onym.load(tmp_path / "m.safetensors", into=offloaded)
    assert torch.equal(offloaded(batch), other(batch))


def test_parameters_that_deepspeed_has_partitioned_are_not_saved_as_empty_ones(tmp_path: Path) -> None:
    """As zero.Init leaves them between two passes; by hand, with the attributes that it sets."""
    model = nn.Linear(3, 2)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_numel, parameter.ds_shape = number, parameter.numel(), parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    for place in ("m.pth", "m.safetensors", "m"):
        with pytest.raises(ConfigError, match=r"weight is empty here: DeepSpeed's ZeRO-3.*GatheredParameters"):
            onym.save(model, tmp_path / place)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        onym.load_state_dict(model, nn.Linear(3, 2).state_dict())
    assert list(tmp_path.iterdir()) == []
