"""The examples of docs/formats.md run, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import onym
from onym.convert import registry
from onym.convert.mapping import View, to_theirs
from onym.convert.write import convert
from onym.errors import CheckpointError
from onym.names.families import load_families
from onym.state import architectures
from tests.convert.test_writing import ours

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


OWN_FAMILY, OTHER_LAYOUT = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    load_families()
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))


def test_a_familys_own_formats_both_ways(tmp_path: Path) -> None:
    made: dict[str, Any] = {}
    exec(OWN_FAMILY, made)
    model = made["Mixer"](made["MixerConfig"](width=8, layers=3))
    onym.save(torch.compile(model), tmp_path / "mixer")
    convert(tmp_path / "mixer", tmp_path / "old.pth", to="old-mixer")
    old = torch.load(tmp_path / "old.pth", weights_only=True)
    assert old["mix.2.right.weight"].shape == (8, 8)
    torch.save({f"module._orig_mod.{name}": value for name, value in old.items()}, tmp_path / "polluted.pth")
    built = onym.load_model(tmp_path / "polluted.pth")
    assert built.config == model.config
    into = made["Mixer"](model.config)
    onym.load(tmp_path / "polluted.pth", into=into)
    back = made["Mixer"](model.config)
    onym.load(convert(tmp_path / "polluted.pth", tmp_path / "back", to="onym").destination, into=back)
    for other in (built, into, back):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_familys_file_that_is_incomplete_is_refused_with_its_own_names(tmp_path: Path) -> None:
    made: dict[str, Any] = {}
    exec(OWN_FAMILY, made)
    onym.save(made["Mixer"](made["MixerConfig"]()), tmp_path / "mixer")
    convert(tmp_path / "mixer", tmp_path / "old.pth", to="old-mixer")
    old = torch.load(tmp_path / "old.pth", weights_only=True)
    del old["out.bias"]
    torch.save(old, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"is incomplete: of 6 tensors 1 are missing, out\.bias"):
        onym.load_model(tmp_path / "old.pth")


def test_another_layout_of_gpt2(tmp_path: Path) -> None:
    made: dict[str, Any] = {}
    exec(OTHER_LAYOUT, made)
    onym.register_format(made["SOMEBODY"])
    model = ours(tmp_path / "ours")
    stored = onym.open_checkpoint(tmp_path / "ours").model
    recipes, left = to_theirs(made["SOMEBODY"].rules, stored.names)
    assert not left
    theirs = View(stored, recipes).state()
    assert theirs["layer.1.up.weight"].shape == (64, 256)
    torch.save({f"_orig_mod.{name}": value.clone() for name, value in theirs.items()}, tmp_path / "x.pth")
    loaded = onym.load_model(tmp_path / "x.pth", n_heads=4)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert onym.open_checkpoint(tmp_path / "x.pth").origin.why == "layer.N.qkv and layer.N.up"


def test_every_test_that_it_names_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"\b(test_\w+)\b(?!\.py)", TEXT)
    assert len(named) > 25
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_format_has_its_row() -> None:
    for format in registry.formats():
        word = {"huggingface": "transformers", "other-decoder": "of other families"}.get(format.name, format.name.split("-")[0])
        assert word.lower() in TEXT.lower(), format.name
