"""What docs/formats.md says of adding a format works, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import onym
from onym.convert import opening
from onym.convert.mapping import View, to_theirs
from tests.convert import peers
from tests.convert.test_writing import ours

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_the_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    made: dict[str, Any] = {}
    exec(program, made)
    monkeypatch.setattr(opening, "FORMATS", (made["SOMEBODY"], *opening.FORMATS))
    model = ours(tmp_path / "ours")
    kept = onym.open_checkpoint(tmp_path / "ours").model
    recipes, left = to_theirs(made["SOMEBODY"].rules, kept.names, 2)
    assert not left
    theirs = View(kept, recipes).state()
    assert theirs["layer.1.up.weight"].shape == (64, 256)
    torch.save({f"_orig_mod.{name}": value.clone() for name, value in theirs.items()}, tmp_path / "x.pth")
    loaded = onym.load_model(tmp_path / "x.pth", n_heads=4)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert onym.open_checkpoint(tmp_path / "x.pth").origin.why == "layer.N.qkv and layer.N.up"


def test_every_test_that_it_names_is_there() -> None:
    tests = "".join(
        path.read_text() for path in [*Path(peers.__file__).parent.glob("*.py"), ROOT / "tests/cli/test_convert.py"]
    )
    named = re.findall(r"\b(test_\w+)\b(?!\.py)", TEXT)
    assert len(named) > 25
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_format_has_its_row() -> None:
    for format in opening.FORMATS:
        word = {"huggingface": "transformers", "llama": "any other model", "litgpt": "LitGPT"}.get(
            format.name, format.name.split("-")[0]
        )
        assert word.lower() in TEXT.lower(), format.name
