"""The lines in docs/integrations.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = (Path(__file__).parents[2] / "docs/integrations.md").read_text(encoding="utf-8")
BLOCKS = {
    section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for section in PAGE.split("\n## ")[1:]
}

pytestmark = pytest.mark.filterwarnings("ignore")


def names(section: str) -> dict[str, Any]:
    """What a reader of the section has already."""
    if section == "Lightning":
        from tests.integrations.test_lightning import Module, data

        return {"module": Module(True), "MyModule": Module, "data": data()}
    if section == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        from tests.integrations.test_transformers import Data

        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        return {"model": model, "data": Data()}
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    found: dict[str, Any] = {"model": model, "optimizer": optimizer, "torch": torch, "step": 3, "state": {"w": torch.ones(3)}}
    if section == "Accelerate":
        from accelerate import Accelerator

        found |= {"accelerator": Accelerator(cpu=True), "data": DataLoader(TensorDataset(torch.ones(4, 3)))}
    else:
        import onym

        found["onym"] = onym
    return found


@pytest.mark.parametrize("section", BLOCKS)
def test_the_lines_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert BLOCKS[section]
    for block in BLOCKS[section]:
        block = block.replace(
            "save_steps=500", "max_steps=4, save_steps=2, use_cpu=True, report_to=[], torch_compile_backend='eager'"
        )
        for _ in range(2):  # begun, and continued
            exec(compile(block, section, "exec"), names(section))
