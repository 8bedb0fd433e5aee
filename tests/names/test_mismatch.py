"""Two sets of names, shapes and dtypes, and what a person is told of how they differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import onym
from onym import GPT, GPTConfig, MismatchError
from onym.errors import CheckpointError
from onym.format.writer import write_safetensors
from onym.names.diagnose import diagnose
from onym.names.mismatch import compare
from onym.state.optimizer import optimizer_state

State = dict[str, Any]
SIZES = {"vocab_size": 101, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 3}


def gpt(**changes: Any) -> GPT:
    return GPT(GPTConfig(**{**SIZES, **changes}))


def state(**changes: Any) -> State:
    return dict(gpt(**changes).state_dict())


def renamed(change: Callable[[str], str], **changes: Any) -> State:
    return {change(name): value for name, value in state(**changes).items()}


def without(part: str, given: State) -> State:
    return {name: value for name, value in given.items() if part not in name}


def split_attention(given: State) -> State:
    """As the book's first GPTModel has it."""
    out: State = {}
    for name, value in given.items():
        if ".qkv." in name:
            for part, piece in zip(("W_query", "W_key", "W_value"), value.chunk(3), strict=True):
                out[name.replace("qkv", part)] = piece
        else:
            out[name] = value
    return out


def scale_and_shift(name: str) -> str:
    if "norm" in name:
        return name.replace("weight", "scale").replace("bias", "shift")
    return name


def with_masks(given: State) -> State:
    return {**given, **{f"trf_blocks.{block}.att.mask": torch.ones(16, 16) for block in range(3)}}


def variant_a() -> State:
    """The book's first model: three matrices, scale and shift, stored masks."""
    return with_masks({scale_and_shift(name): value for name, value in split_attention(state()).items()})


def optimizer_file() -> State:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    return dict(optimizer_state(model, optimizer)[0])


def gpt2_names() -> State:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=101, n_positions=16, n_embd=32, n_head=4, n_layer=3)
    return dict(GPT2LMHeadModel(config).state_dict())


def transposed(given: State) -> State:
    return {name: value.T if "ff.layers" in name and value.dim() == 2 else value for name, value in given.items()}


def book_model(n_layers: int = 3) -> nn.Module:
    from llms_from_scratch.ch04 import GPTModel

    names = {"drop_rate": 0.0, "qkv_bias": False, "n_layers": n_layers}
    return GPTModel({**SIZES, **names})  # type: ignore[no-any-return]


def lora_model() -> nn.Module:
    from llms_from_scratch.appendix_e import replace_linear_with_lora

    model = book_model()
    replace_linear_with_lora(model, rank=2, alpha=2)
    return model


def classifier(classes: int) -> nn.Module:
    model = gpt()
    model.out_head = nn.Linear(32, classes)  # type: ignore[assignment]
    return model


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = gpt()
        self.classifier = nn.Linear(32, 2)


class Untied(nn.Module):
    """An embedding and perhaps a head, with the names that transformers uses."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(101, 32)
        if head:
            self.lm_head = nn.Linear(32, 101, bias=False)


# What is stored, the model, and the first cause that a person reads; more of them where the file has several.
CASES: dict[str, tuple[Callable[[], State], Callable[[], nn.Module], list[str]]] = {
    "compiled": (lambda: renamed("_orig_mod.{}".format), gpt, [r"contain `_orig_mod\.`.*\(torch\.compile\)"]),
    "compiled ddp": (
        lambda: renamed("_orig_mod.module.{}".format),
        gpt,
        [r"`_orig_mod\.` and `module\.`.*\(torch\.compile and DataParallel or"],
    ),
    "compiled blocks": (
        lambda: renamed(lambda name: name.replace("trf_blocks.1.", "trf_blocks.1._orig_mod.")),
        gpt,
        [r"contain `_orig_mod\.`"],
    ),
    "task prefix": (lambda: renamed("model.{}".format), gpt, [r"begin with `model\.`, which this model's do not"]),
    "two prefixes": (lambda: renamed("base.model.{}".format), gpt, [r"begin with `base\.model\.`"]),
    "prefix of the model": (state, Backbone, [r"model's names begin with `transformer\.`.*model\.transformer"]),
    "prefix and layers": (
        lambda: renamed("_orig_mod.{}".format, n_layers=2),
        gpt,
        [r"contain `_orig_mod\.`", r"Stored with 2 blocks, this model has 3"],
    ),
    "padded vocabulary": (
        lambda: state(vocab_size=104),
        gpt,
        [r"vocabulary of 104, .* 101: the stored one is padded to a multiple of 8"],
    ),
    "GPT-2's vocabulary": (
        lambda: {"wte.weight": torch.empty(50304, 4), "lm_head.weight": torch.empty(50304, 4)},
        lambda: nn.ModuleDict({"wte": nn.Embedding(50257, 4), "lm_head": nn.Linear(4, 50257, bias=False)}),
        [r"50304, .* 50257: the stored one is padded to a multiple of 128.*drop the last rows"],
    ),
    "other vocabulary": (
        lambda: state(vocab_size=300),
        gpt,
        [r"vocabulary of 300, this model has 101: build it with vocab_size=300"],
    ),
    "fewer layers": (lambda: state(n_layers=2), gpt, [r"Stored with 2 blocks, this model has 3"]),
    "more layers": (lambda: state(n_layers=12), gpt, [r"Stored with 12 blocks, this model has 3: build it with n_layers=12"]),
    "width": (lambda: state(emb_dim=64), gpt, [r"Stored with a width of 64, this model has 32: build it with emb_dim=64"]),
    "context": (lambda: state(context_length=64), gpt, [r"Stored for a context of 64 tokens, this model has 16"]),
    "biases": (lambda: state(qkv_bias=True), gpt, [r"biases that this model does not have.*qkv_bias=True"]),
    "no biases": (state, lambda: gpt(qkv_bias=True), [r"without biases that this model has.*qkv_bias=False"]),
    "split attention": (
        lambda: split_attention(state()),
        gpt,
        [r"queries, keys and values apart \(W_query.*in one matrix \(qkv\)"],
    ),
    "norms": (lambda: renamed(scale_and_shift), gpt, [r"`scale` and `shift` where this model's have `weight`"]),
    "masks": (lambda: with_masks(state()), gpt, [r"3 stored tensors are causal masks \(trf_blocks\.0\.att\.mask\)"]),
    "variant A": (variant_a, gpt, [r"`scale` and `shift`", r"W_query", r"causal masks"]),
    "variant A, compiled": (
        lambda: {f"_orig_mod.{name}": value for name, value in variant_a().items()},
        gpt,
        [r"contain `_orig_mod\.`", r"scale", r"W_query", r"causal masks"],
    ),
    "transposed": (lambda: transposed(state()), gpt, [r"6 matrices are transposed .*Conv1D: load value\.T"]),
    "no head": (
        lambda: without("lm_head", dict(Untied().state_dict())),
        Untied,
        [r"without an output head \(lm_head\.weight\)"],
    ),
    "a head too many": (
        lambda: dict(Untied().state_dict()),
        lambda: Untied(head=False),
        [r"with an output head \(lm_head\.weight\)"],
    ),
    "lora": (
        lambda: {**state(), "trf_blocks.0.att.qkv.lora_A.weight": torch.empty(4, 32)},
        gpt,
        [r"LoRA or adapter .*merge_and_unload"],
    ),
    "quantised": (
        lambda: {**without("qkv.weight", state()), "trf_blocks.0.att.qkv.qweight": torch.empty(4, 96, dtype=torch.int32)},
        gpt,
        [r"quantised \(trf_blocks\.0\.att\.qkv\.qweight\).*dequantise"],
    ),
    "int8": (
        lambda: {name: value.to(torch.int8) if "qkv" in name else value for name, value in state().items()},
        gpt,
        [r"Stored as int8 .*quantised"],
    ),
    "near miss": (
        lambda: renamed(lambda n: n.replace("tok_emb", "token_emb")),
        gpt,
        [r"`token_emb` where this model has `tok_emb`"],
    ),
    "another word, everywhere": (
        lambda: renamed(lambda name: name.replace("trf_blocks", "h")),
        gpt,
        [r"`h` where this model has `trf_blocks` .*and \d+ more like it"],
    ),
    "dtype": (
        lambda: dict(gpt().to(torch.bfloat16).state_dict()),
        gpt,
        [r'Only dtypes differ: stored as bfloat16.*dtype="cast"'],
    ),
    "empty": (dict, gpt, [r"Nothing is stored"]),
    "numpy": (lambda: {name: value.numpy() for name, value in state().items()}, gpt, [r"are no tensors .*torch\.from_numpy"]),
    "a shard of the book's": (
        lambda: dict(list(book_model().state_dict().items())[:15]),
        book_model,
        [r"What is stored fits, but is 15 of the \d+ tensors: one shard|Stored with \d blocks"],
    ),
    "fewer layers of the book's": (
        lambda: book_model(2).state_dict(),
        book_model,
        [r"Stored with 2 blocks, this model has 3"],
    ),
    "the book's LoRA": (lambda: lora_model().state_dict(), book_model, [r"Stored with LoRA"]),
    "into the book's LoRA": (lambda: book_model().state_dict(), lora_model, [r"This model with LoRA"]),
    "classes": (
        lambda: classifier(2).state_dict(),
        lambda: classifier(64),
        [r"Stored with 2 outputs .* another number of classes"],
    ),
    "a block missing": (
        lambda: without("trf_blocks.1.", state()),
        gpt,
        [r"Of the blocks in trf_blocks, the file lacks 1"],
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).state_dict(),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        [r"Stored with BatchNorm"],
    ),
    "a root's bias": (lambda: nn.Linear(4, 4, bias=False).state_dict(), lambda: nn.Linear(4, 4), [r"Stored without biases"]),
    "sizes": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).state_dict(),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 5)),
        [r"sizes are 3 in the file and 5 in this model"],
    ),
    "optimizer": (optimizer_file, gpt, [r"the state of an optimizer, not of a model"]),
    "torch's optimizer": (
        lambda: torch.optim.AdamW(gpt().parameters()).state_dict(),
        gpt,
        [r"the state of an optimizer, not of a model"],
    ),
    "nested": (lambda: {"epoch": 3, "model_state": state()}, gpt, [r"no tensors at its top level .*state\['model_state'\]"]),
    "average": (
        lambda: dict(onym.state_dict(AveragedModel(gpt()))),
        gpt,
        [r"counter of an AveragedModel.*onym\.unwrap\(averaged\)"],
    ),
    "into an average": (state, lambda: AveragedModel(gpt()), [r"This model is an AveragedModel"]),
    "GPT-2's names": (gpt2_names, gpt, [r"Not one stored name.*transformers' GPT-2"]),
    "nothing in common": (lambda: {"a.b": torch.empty(2)}, gpt, [r"Not one stored name is one of this model's"]),
    "a shard": (
        lambda: dict(list(state().items())[:20]),
        gpt,
        [r"Stored with|What is stored fits, but is 20 of the \d+ tensors"],
    ),
    "a larger model": (
        lambda: {**state(), "value_head.first.weight": torch.empty(3)},
        gpt,
        [r"All of this model's tensors are stored, and 1 more"],
    ),
}


@pytest.mark.parametrize(("stored", "model", "told"), CASES.values(), ids=CASES)
def test_the_cause_is_told(stored: Callable[[], State], model: Callable[[], nn.Module], told: list[str]) -> None:
    target, given = model(), stored()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        onym.load_state_dict(target, given)
    message = str(caught.value)
    lines = message.splitlines()
    assert len(lines) <= 20, message
    assert max(map(len, lines)) < 700, message
    causes = "\n".join(cause.text for cause in caught.value.causes)
    positions = [re.search(sign, causes) for sign in told]
    assert all(positions), f"{told} not all in:\n{message}"
    first = re.search(told[0], caught.value.causes[0].text)
    assert first is not None, message
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_file_says_how_its_model_was_built(tmp_path: Path) -> None:
    onym.save(gpt(n_layers=2, emb_dim=64), tmp_path / "m.safetensors")
    with pytest.raises(
        MismatchError, match=r"Saved with emb_dim=64, n_layers=2; this model has emb_dim=32, n_layers=3"
    ) as caught:
        onym.load(tmp_path / "m.safetensors", into=gpt())
    assert len(caught.value.causes) == 1, "the same is not told twice"
    assert len(caught.value.differences.missing) == 11


def test_a_polluted_file_of_another_model_is_told_of_under_its_own_names(tmp_path: Path) -> None:
    torch.save(torch.compile(book_model(2)).state_dict(), tmp_path / "model.pth")  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="Stored with 2 blocks, this model has 3: build it with n_layers=2") as caught:
        onym.load(tmp_path / "model.pth", into=gpt())
    assert len(caught.value.causes) == 1, "what the book's layout has otherwise is no difference: it is translated"
    of_a_block = sum(name.startswith("trf_blocks.2.") for name in gpt().state_dict())
    assert len(caught.value.differences.missing) == of_a_block, "zeros stand for no bias of a block that is not there"
    assert "_orig_mod" not in str(caught.value)
    with pytest.raises(MismatchError, match="Stored with 2 blocks, this model has 3"):  # whose masks are not made either
        onym.load(tmp_path / "model.pth", into=book_model(3))
    onym.save(gpt(n_layers=2), tmp_path / "ours.safetensors")
    with pytest.raises(MismatchError, match=r"Saved with n_layers=2; this model has n_layers=3|Stored with 2 blocks"):
        onym.load(tmp_path / "ours.safetensors", into=book_model(3))


def test_a_load_that_would_leave_everything_as_it_was_is_refused_even_when_not_strict() -> None:
    with pytest.raises(MismatchError, match=r"_orig_mod"):
        onym.load_state_dict(gpt(), renamed("_orig_mod.{}".format), strict=False)


def test_a_model_of_a_hundred_thousand_tensors_is_told_of_in_twenty_lines() -> None:
    model = {f"stack.{n}.part.{p}.weight": ((4, 4), "float32") for n in range(20_000) for p in range(5)}
    other = {f"stack.{n}.piece.{p}.kernel": ((4, 5), "int64") for n in range(20_001) for p in range(5)}
    other |= {f"{'very' * 500}.{n}": ((1,), "int64") for n in range(3)}
    error = MismatchError(compare(other, model), diagnose(compare(other, model), other, model))
    assert len(str(error).splitlines()) <= 20
    assert len(str(error)) < 4000
    assert len(error.differences.missing) == 100_000


def test_an_optimizers_file_is_told_from_a_models(tmp_path: Path) -> None:
    model = gpt()
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), tmp_path / "optimizer.pth")
    with pytest.raises(CheckpointError, match="state of an optimizer"):
        onym.load(tmp_path / "optimizer.pth", into=model)
    write_safetensors(tmp_path / "optimizer.safetensors", optimizer_file())
    with pytest.raises(CheckpointError, match="state of an optimizer"):
        onym.load(tmp_path / "optimizer.safetensors", into=model)
