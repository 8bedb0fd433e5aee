"""The book's appendix E: its file is split into base and adapters, and written again; logits are the book's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onym
from onym import GPT, GPTConfig, LoRA
from onym.adapters.conversion import BOOK, PEFT, AdapterSource, write_adapter
from onym.adapters.merging import adapter_config
from onym.api import load_checkpoint
from onym.convert.opening import open_any
from onym.errors import CheckpointError, ConfigError
from tests.adapters.test_lora import drawn

pytest.importorskip("llms_from_scratch")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {"vocab_size": 101, "context_length": 32, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "qkv_bias": True}
HEADS = {"n_heads": 4}
TOKENS = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(5))


def the_book_s(rank: int, alpha: float, path: Path | None = None) -> Any:
    """Its model with its adapters, as appendix E makes it."""
    from llms_from_scratch.appendix_e import replace_linear_with_lora
    from llms_from_scratch.ch04 import GPTModel

    torch.manual_seed(0)
    model = GPTModel({**SIZES, "drop_rate": 0.0})
    replace_linear_with_lora(model, rank=rank, alpha=alpha)
    if path is not None:
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
        return model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = the_book_s(4, 3)
    path = tmp_path_factory.mktemp("book") / "lora.pth"
    torch.save(model.state_dict(), path)
    with torch.no_grad():
        return path, model(TOKENS)


def test_it_is_split_into_base_and_adapters_whose_sum_computes_the_same(book: tuple[Path, Any]) -> None:
    path, logits = book
    source = AdapterSource.open(path, alpha=3, settings=HEADS)
    assert source.base is not None
    assert isinstance(load_checkpoint(source.base), GPT)
    found = source.fitted()
    assert found.config.rank_of("trf_blocks.0.att.qkv") == 12, "three adapters of rank 4 are one"
    assert torch.allclose(load_checkpoint(source.merged())(TOKENS), logits, atol=1e-5)
    model: Any = load_checkpoint(source.base)
    live = LoRA.apply_to(model, found.layers, found.config)
    onym.load_state_dict(live, found.tensors.state())
    assert torch.allclose(model(TOKENS), logits, atol=1e-5)


def test_alpha_is_assumed_and_said_where_nobody_gives_it(tmp_path: Path) -> None:
    model = the_book_s(4, 4)  # as in the book: alpha is the rank
    torch.save(model.state_dict(), tmp_path / "lora.pth")
    with pytest.warns(UserWarning, match="alpha=4 was assumed, the rank, as in the book"):
        opened: Any = onym.load_model(tmp_path / "lora.pth", n_heads=4)
    with torch.no_grad():
        assert torch.allclose(opened(TOKENS), model(TOKENS), atol=1e-5)


def test_it_comes_back_bitwise_identical(book: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = book
    source = AdapterSource.open(path, alpha=3, settings=HEADS)
    report = write_adapter(source, tmp_path / "again.pth", BOOK)
    assert any("alpha=3" in note for note in report.notes)
    one, other = (torch.load(each, weights_only=True) for each in (path, tmp_path / "again.pth"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_by_way_of_peft_s_folder(book: tuple[Path, Any], tmp_path: Path) -> None:
    path, logits = book
    source = AdapterSource.open(path, alpha=3, settings=HEADS)
    assert source.base is not None
    write_adapter(source, tmp_path / "peft", PEFT)
    model: Any = load_checkpoint(source.base)
    LoRA.open(tmp_path / "peft", model)
    assert torch.allclose(model(TOKENS), logits, atol=1e-5)


@pytest.mark.parametrize("alpha", [8, 6])
def test_the_book_opens_ours(tmp_path: Path, alpha: float) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES)).eval()
    onym.save(model, tmp_path / "base")
    lora = drawn(LoRA.apply(model, rank=4, alpha=alpha, targets="att,out_head", alpha_pattern={"out_head": 3}))
    adapter_config(lora, onym.open_checkpoint(tmp_path / "base"), tmp_path / "base")
    onym.save(lora, tmp_path / "lora.safetensors")
    report = write_adapter(AdapterSource.open(tmp_path / "lora.safetensors"), tmp_path / "ours.pth", BOOK)
    assert "rank=4, alpha=" in report.notes[0]
    opened = the_book_s(4, alpha / 4, tmp_path / "ours.pth")
    with torch.no_grad():
        assert torch.allclose(opened(TOKENS), model(TOKENS), atol=1e-5)
    again: Any = load_checkpoint(AdapterSource.open(tmp_path / "ours.pth", alpha=alpha / 4, settings=HEADS).merged())
    assert torch.allclose(again(TOKENS), model(TOKENS), atol=1e-5)


def test_what_is_missing_or_contradicts_is_named(book: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = book
    state = torch.load(path, weights_only=True)
    del state["trf_blocks.0.att.W_key.lora.A"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"is incomplete: trf_blocks.0.att.W_key.lora_A.weight is missing"):
        open_any(tmp_path / "cut.pth", settings=HEADS)
    with pytest.raises(CheckpointError, match="holds its base too"):
        AdapterSource.open(path, path, settings=HEADS)
    onym.save(GPT(GPTConfig(**SIZES)), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds no adapters alone"):
        AdapterSource.open(tmp_path / "plain", alpha=3)
    lora = LoRA.apply(GPT(GPTConfig(**SIZES)))
    onym.save(lora, tmp_path / "peft")
    with pytest.raises(ConfigError, match="states its alpha itself"):
        AdapterSource.open(tmp_path / "peft", tmp_path / "plain", alpha=3)
