"""What other people's trainers return from their set-up, in a process each: Fabric replaces torch.compile at import."""

from __future__ import annotations

from collections.abc import Callable

import pytest

PROLOGUE = """
import torch, warnings
from torch import nn
import onym
from onym.state.optimizer import load_optimizer_state, optimizer_state
warnings.filterwarnings("ignore")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
plain = network()
def same(wrapped):
    state = onym.state_dict(wrapped)
    assert list(state) == list(plain.state_dict()), list(state)
    assert onym.load_state_dict(wrapped, {name: value + 1 for name, value in state.items()}).loaded == list(state)
    assert isinstance(onym.unwrap(wrapped), nn.Sequential)
def moments(model, optimizer):
    tensors, description = optimizer_state(model, optimizer)
    assert "state.exp_avg.1.1.weight" in tensors, list(tensors)
    again = network()
    bare = torch.optim.AdamW(again.parameters())
    load_optimizer_state(again, bare, tensors, description)
    assert torch.equal(bare.state[again[0].weight]["exp_avg"], tensors["state.exp_avg.0.weight"])
    load_optimizer_state(model, optimizer, *optimizer_state(again, bare))
"""

FABRIC = """
from lightning_fabric import Fabric
fabric = Fabric(accelerator="cpu", devices=1)
same(fabric.setup(network()))
same(fabric.setup(torch.compile(network())))
same(torch.compile(fabric.setup(network())))
model = network()
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
fabric.backward(model(torch.randn(3, 4)).sum())
optimizer.step()
moments(model, optimizer)
polluted = dict(model.named_parameters())
assert list(polluted)[0] == "_forward_module.0.weight"
torch.save(polluted, "model.pth")
assert onym.load("model.pth", into=network()).renamed["_forward_module.0.weight"] == "0.weight"
print("right")
"""

ACCELERATE = """
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, compile_regions
accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
model = network()
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
same(model)
accelerator.backward(model(torch.randn(3, 4)).sum())
optimizer.step()
moments(model, optimizer)
accelerator.save_state("state", safe_serialization=True)
assert onym.load("state/model.safetensors", into=network()).loaded == list(plain.state_dict())
class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(network() for _ in range(3))
regional = compile_regions(Layered(), backend="eager")
assert any("_orig_mod" in name for name in regional.state_dict())
assert list(onym.state_dict(regional)) == list(Layered().state_dict())
print("right")
"""


@pytest.mark.parametrize("program", [FABRIC, ACCELERATE], ids=["fabric", "accelerate"])
def test_what_a_trainer_wraps_keeps_its_names(program: str, in_fresh_process: Callable[[str], str]) -> None:
    assert in_fresh_process(PROLOGUE + program).strip().splitlines()[-1] == "right"
