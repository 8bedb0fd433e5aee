"""A model and its tokenizer: which one is taken, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import onym
from onym import GPT
from onym.convert.write import convert
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, TokenizerError
from onym.generation.opening import find_model, open_model
from tests.conftest import TINY
from tests.convert import peers


@pytest.fixture
def own() -> Tokenizer:
    return Tokenizer.train(["the lamp and the river, "] * 20, 270)


@pytest.fixture
def folder(tmp_path: Path, own: Tokenizer) -> Path:
    """A folder of transformers with its tokenizer."""
    onym.save(GPT(dataclasses.replace(TINY, vocab_size=290)), tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "hf", to="huggingface", tokenizer=own.to_json())
    return tmp_path / "hf"


def test_the_folders_own_tokenizer_or_the_one_that_is_given(folder: Path, own: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.train(["something else, "] * 20, 280)
    model, tokenizer, checkpoint = open_model(folder)
    assert isinstance(model, GPT)
    assert not model.training
    assert (tokenizer.to_json(), checkpoint.path) == (own.to_json(), folder)
    assert find_model(folder, tokenizer=other).tokenizer is other
    assert find_model(folder, tokenizer=other, only_missing=True).tokenizer.to_json() == own.to_json()
    alone = tmp_path / "m.safetensors"
    assert find_model(alone, tokenizer=other, only_missing=True).tokenizer is other
    with pytest.raises(TokenizerError, match=r"m\.safetensors' holds no tokenizer: .* with --tokenizer"):
        find_model(alone)


def test_what_had_to_be_assumed_is_noted(tmp_path: Path, own: Tokenizer) -> None:
    torch.save(peers.book(vocab_size=280).state_dict(), tmp_path / "book.pth")
    notes: list[str] = []
    find_model(tmp_path / "book.pth", tokenizer=own, note=notes.append)
    assert ["attention heads were assumed" in note for note in notes] == [True]


def test_only_a_gpt_is_opened(tmp_path: Path, own: Tokenizer) -> None:
    @dataclass(frozen=True)
    class Width:
        width: int = 2

    class Other(nn.Module):
        def __init__(self, config: Width) -> None:
            super().__init__()
            self.config, self.layer = config, nn.Linear(config.width, 1)

    onym.register_architecture("test-other", Other, Width)
    onym.save(Other(Width()), tmp_path / "other")
    with pytest.raises(CheckpointError, match="is a Other; only a GPT"):
        open_model(tmp_path / "other", tokenizer=own)
