"""What PyTorch puts around a model to train it, in one process with its GPU: names stay clean, and so do files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import onym
from onym import GPT, GPTConfig
from onym.state.dtensor import full_tensor, local
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.parallel import Sharding
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.conftest import TINY
from tests.cuda.training import batch, changed, new_stepper, on

TIED = GPTConfig(**{**TINY.to_dict(), "tie_embeddings": True})


@pytest.fixture
def mesh(device: torch.device, tmp_path: Path) -> Iterator[Any]:
    """Of one process: NCCL where it has a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()


def full(model: nn.Module) -> dict[str, Tensor]:
    """By the names that are saved, in main memory."""
    return {name: full_tensor(value).detach().cpu().clone() for name, value in onym.state_dict(model).items()}


def in_ddp(model: GPT, mesh: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))  # type: ignore[arg-type]


def in_fsdp(model: GPT, mesh: Any) -> nn.Module:
    """Each block recomputed, compiled and sharded, in this order; and the whole compiled once more."""
    for number, block in enumerate(model.trf_blocks):
        model.trf_blocks[number] = wrapped = checkpoint_wrapper(block)
        wrapped.compile()
        fully_shard(wrapped, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", [in_ddp, in_fsdp])
def test_a_wrapped_model_trains_and_has_the_plain_ones_names(
    device: torch.device, mesh: Any, tmp_path: Path, wrap: Callable[..., nn.Module], quick_compiler: Any
) -> None:
    quick_compiler(device)
    torch.manual_seed(0)
    plain = GPT(TIED)
    model = wrap(copy.deepcopy(plain).to(device), mesh)
    if wrap is in_fsdp:
        assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert changed(full(model), dict(plain.state_dict())) == []
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    for number in range(2):
        losses = []
        for each, optimizer, where in zip((plain, model), optimizers, (torch.device("cpu"), device), strict=True):
            loss = each(*on(where, number))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    found = full(model)
    assert list(found) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=name)
    onym.save(model, tmp_path / "model.safetensors")
    opened = onym.load_model(tmp_path / "model.safetensors")
    assert changed(found, dict(opened.state_dict())) == []
    onym.load_state_dict(model, plain.state_dict())
    assert changed(full(model), dict(plain.state_dict())) == []


@pytest.mark.parametrize("offloads", [False, True])
def test_a_sharded_step_is_the_plain_one(device: torch.device, mesh: Any, tmp_path: Path, offloads: bool) -> None:
    """As ``--parallel fsdp`` takes it, and with ``--cpu-offload``, where weights and moments stay in main memory."""
    options, compute = OptimizationOptions(optimizer="adamw", ema=0.9), Compute(device, torch.float32)
    sharding = Sharding(mesh, offloads=offloads)
    torch.manual_seed(0)
    stepper = Stepper(sharding.make(TINY), options, compute, sharding=sharding)
    prepare(stepper, on(device, 0), [2], "off")
    plain = new_stepper(torch.device("cpu"), micro_batch=2, optimizer="adamw", ema=0.9)
    for number in range(3):
        found, expected = stepper(on(device, number), 1e-2, number), plain(batch(number), 1e-2, number)
        assert float(found.loss) == pytest.approx(float(expected.loss), abs=1e-4)
        assert float(found.norm) == pytest.approx(float(expected.norm), rel=1e-3)
    assert stepper.finite
    at_home = "cpu" if offloads else device.type
    kept = [value for state in stepper.optimizers[0].state.values() for name, value in state.items() if name != "step"]
    assert {local(each).device.type for each in (*stepper.model.parameters(), *kept)} == {at_home}
    found_weights = full(stepper.model)
    for name, value in plain.model.state_dict().items():
        assert (found_weights[name] - value).norm() < 0.02 * value.norm(), name
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, stepper.state)
    onym.Checkpointer(tmp_path).restore(plain.state)
    assert changed(full(stepper.model), dict(plain.model.state_dict())) == []
    found, expected = stepper(on(device, 3), 1e-2, 3), plain(batch(3), 1e-2, 3)
    assert float(found.loss) == pytest.approx(float(expected.loss), abs=1e-4)
