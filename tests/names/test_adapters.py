"""An adapter that peft saved loads into its own PeftModel, whose names have the adapter's name in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onym
from onym import MismatchError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(target_modules=["0", "emb"], r=2, modules_to_save=["head"], init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(target_modules=["0"], r=2, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["0"], r=2),
}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layers, self.head = nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layers(self.emb(ids)))
        return out


def model_of(kind: str, name: str = "default") -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(Base(), KINDS[kind](), adapter_name=name)


def with_values(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_loads_into_its_model(tmp_path: Path, kind: str, name: str, compiled: bool) -> None:
    trained = with_values(model_of(kind, name))
    trained.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    model = model_of(kind, name)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    report = onym.load(folder, into=wrapped)
    assert not report.missing
    ids = torch.arange(5)
    assert torch.equal(model(ids), trained(ids))


def test_another_adapter_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with_values(model_of("DoRA")).save_pretrained(tmp_path)
    model = model_of("LoRA")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError):
        onym.load(tmp_path, into=model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_whole_model_is_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    trained = with_values(model_of("LoRA"))
    onym.save(trained, tmp_path / "x.safetensors")
    model = model_of("LoRA")
    assert not onym.load(tmp_path / "x.safetensors", into=model).missing
    assert torch.equal(model(torch.arange(5)), trained(torch.arange(5)))
