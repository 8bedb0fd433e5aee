"""Classifiers in transformers' and the book's files: the same logits at each text's last token, the same labels, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import onym as library
from onym.convert.opening import open_any
from onym.convert.write import convert
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, ConfigError
from onym.gpt.config import GPTConfig
from onym.gpt.models import make_model
from tests.conftest import Run
from tests.convert import decoder_peers, peers
from tests.convert.decoder_peers import config_of, drawn

CLOSE = 1e-5
LABELS = ("ham", "spam", "a third, with a comma")
TEXTS = ("win a prize now", "lunch", "some words, and some more words, all of them short", "a")
GPT2 = {"context_length": 24, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "qkv_bias": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words and a prize for lunch, all of them short " * 20], 280)


@pytest.fixture
def tokenizer_file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    return path


def gpt2(vocab_size: int, **changes: Any) -> GPTConfig:
    return GPTConfig(**{**GPT2, "vocab_size": vocab_size, "labels": LABELS, **changes})


def saved(config: Any, path: Path) -> Any:
    """A classifier with values everywhere, and its folder."""
    model: Any = drawn(make_model(config))
    library.save(model, path)
    return model


def padded(tokenizer: Tokenizer, pad: int) -> tuple[Tensor, Tensor]:
    """The texts on the right of which is padding, and the mask of what is not."""
    encoded = [tokenizer.encode(text)[:24] for text in TEXTS]
    ids = torch.full((len(encoded), max(map(len, encoded))), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    assert len({*map(len, encoded)}) > 2
    return ids, mask


@torch.no_grad()
def at_the_end(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Our logits at the last real token of each row."""
    return model(ids)[torch.arange(len(ids)), mask.sum(1) - 1]  # type: ignore[no-any-return]


CLASSES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "GPT-2": ("GPT2ForSequenceClassification", gpt2),
    "GPT-2, exact GELU, no biases": (
        "GPT2ForSequenceClassification", lambda size: gpt2(size, gelu="erf", bias=False, qkv_bias=False),
    ),
    "GPT-2, a bias in the head": ("GPT2ForSequenceClassification", lambda size: gpt2(size, head_bias=True)),
    "GPT-2, a bias in the head alone": ("GPT2ForSequenceClassification", lambda size: gpt2(size, head_bias=True, bias=False)),
    **{
        kind: (
            f"{name}ForSequenceClassification",
            lambda size, kind=kind: config_of(kind, vocab_size=size, labels=LABELS),
        )
        for kind, name in {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
def test_transformers_opens_a_classifier(case: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name, of_size = CLASSES[case]
    model = saved(of_size(tokenizer.vocab_size), tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "hf", to="huggingface", tokenizer=tokenizer.to_json())
    assert report.logits is not None
    assert report.logits < CLOSE
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == name
    assert theirs.config.pad_token_id == tokenizer.end_of_text
    assert [theirs.config.id2label[number] for number in range(3)] == list(LABELS)
    assert theirs.config.num_labels == 3
    ids, mask = padded(tokenizer, theirs.config.pad_token_id)
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf")([*TEXTS], padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], ids), "padded by the tokenizer's own files"
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
    assert logits.std() > 0.1, "a lost part would show"
    assert (logits - at_the_end(model, ids, mask)).abs().max() < CLOSE
    for path in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):
        again = library.load_model(path)
        assert again.config.labels == LABELS
        assert not again.config.head_bias
        assert (at_the_end(again, ids, mask) - logits).abs().max() < CLOSE
        if not model.config.head_bias:
            assert again.config == model.config
            assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    fresh = type(theirs)(theirs.config)
    library.load(tmp_path / "hf", into=fresh)
    if not model.config.head_bias and case != "GPT-2, exact GELU, no biases":
        library.load(tmp_path / "ours", into=fresh)  # by the same table
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize("labels", [None, {0: "no", 1: "yes", 2: "perhaps"}])
def test_classifiers_of_transformers_are_read(
    kind: str, labels: dict[int, str] | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import transformers

    base: Any = peers.huggingface(vocab_size=280, n_layer=1)
    if kind != "gpt2":
        base = decoder_peers.transformers_model(kind, config_of(kind, vocab_size=280, n_layers=1))
    settings = base.config
    settings.pad_token_id = 1
    settings.id2label = labels or {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    theirs: Any = drawn(getattr(transformers, type(base).__name__.replace("LMHeadModel", "For").replace("ForCausalLM", "For")
                                + "SequenceClassification")(settings))  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf")
    if labels is None:
        decoder_peers.edited(tmp_path / "hf", id2label=..., label2id=...)
    model = library.load_model(tmp_path / "hf")
    assert model.config.labels == tuple(settings.id2label.values())
    assert not model.config.tie_embeddings
    ids, mask = padded(tokenizer, 1)
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
    assert (at_the_end(model, ids, mask) - logits).abs().max() < CLOSE
    if kind != "mistral":
        convert(tmp_path / "hf", tmp_path / "back", to="huggingface")
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, back[name]) for name, value in theirs.state_dict().items())
        assert json.loads((tmp_path / "back" / "config.json").read_text())["pad_token_id"] == 1


def test_names_without_the_prefix_of_transformers(tmp_path: Path) -> None:
    saved(gpt2(97), tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    assert any("No token is known that could pad" in note for note in report.notes), "it has no tokenizer"
    state = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({name.removeprefix("transformer."): value for name, value in state.items()}, tmp_path / "plain.safetensors")
    model = library.load_model(tmp_path / "plain.safetensors", n_heads=4)
    assert model.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("target", ["huggingface", "book", "onym"])
def test_the_command_gives_the_same_labels_and_probabilities(
    target: str, onym: Run, tokenizer_file: Path, tmp_path: Path
) -> None:
    labels = ("no", "yes")
    saved(gpt2(280, labels=labels, head_bias=True), tmp_path / "ours")
    path = "there.pth" if target == "book" else "there"
    more = () if target == "book" else ("--tokenizer", tokenizer_file)
    done = onym("convert", "ours", path, "--to", target, *more)
    assert done.returncode == 0, done.stderr
    assert ("AutoModelForSequenceClassification" in done.stdout) == (target == "huggingface")
    more = ("--tokenizer", tokenizer_file, "--labels", "no,yes", "--n-heads", 4) if target == "book" else ()
    before = onym("classify", "ours", *TEXTS, "--tokenizer", tokenizer_file)
    after = onym("classify", path, *TEXTS, *more)
    assert before.returncode == after.returncode == 0, after.stderr
    assert after.stdout == before.stdout
    assert {line.split("\t")[0] for line in after.stdout.splitlines()} == set(labels), "both occur"
    shown = onym("inspect", path).stdout
    assert [line.split("labels")[1].strip() for line in shown.splitlines() if line.startswith("  labels")] == [
        "0, 1" if target == "book" else "no, yes"
    ]
    differ = onym("diff", "ours", path)
    if target == "huggingface":  # its bias is in the final norm
        assert differ.returncode == 1
        assert "final_norm.bias" in differ.stdout
    else:
        assert differ.returncode == 0, differ.stdout


def review_classifier(**changes: Any) -> nn.Module:
    """The book's model as its chapter 6 makes it, with values everywhere."""
    model = peers.book(**changes)
    model.out_head = nn.Linear(64, 2)
    return peers.scattered(model)


def test_the_books_classifier_is_read(tmp_path: Path) -> None:
    theirs = review_classifier()
    torch.save(theirs.state_dict(), tmp_path / "review_classifier.pth")
    with pytest.warns(UserWarning, match="Its 2 labels are called 0 to 1 here: .* give them") as warned:
        model = library.load_model(tmp_path / "review_classifier.pth")
    assert any("reads the last place of a row, padding or not" in str(each.message) for each in warned)
    assert model.config.labels == ("0", "1")
    assert model.config.head_bias
    ids = peers.tokens()
    assert (peers.logits(theirs, ids) - peers.logits(model, ids)).abs().max() < CLOSE
    named = library.load_model(tmp_path / "review_classifier.pth", labels=["not spam", "spam"])
    assert named.config.labels == ("not spam", "spam")
    convert(tmp_path / "review_classifier.pth", tmp_path / "back.pth", to="book")
    state, back = theirs.state_dict(), torch.load(tmp_path / "back.pth", weights_only=True)
    assert state.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in state.items())
    other = review_classifier()
    library.load(tmp_path / "review_classifier.pth", into=other)
    assert torch.equal(other.out_head.weight, theirs.out_head.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("head_bias", [False, True])
def test_the_book_opens_a_classifier_of_ours(head_bias: bool, tmp_path: Path) -> None:
    config = gpt2(97, labels=("ham", "spam"), head_bias=head_bias, n_heads=1, n_layers=3, qkv_bias=False)
    model = saved(config, tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "review_classifier.pth", to="book")
    assert "labels=['ham', 'spam']" in " ".join(report.notes)
    theirs = review_classifier()
    theirs.load_state_dict(torch.load(tmp_path / "review_classifier.pth", weights_only=True))
    ids = peers.tokens()
    assert (peers.logits(theirs, ids) - peers.logits(model, ids)).abs().max() < CLOSE
    convert(
        tmp_path / "review_classifier.pth", tmp_path / "back", to="onym", settings={"labels": ["ham", "spam"], "n_heads": 1}
    )
    back = library.load_model(tmp_path / "back")
    assert back.config.labels == config.labels
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_books_decoders_with_a_head_of_labels(tmp_path: Path) -> None:
    config = config_of("qwen3", labels=("ham", "spam"))
    saved(config, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "classifier.pth", to="book")
    theirs = decoder_peers.book_model("Qwen3Model", config)
    theirs.out_head = nn.Linear(config.emb_dim, 2)
    theirs.load_state_dict(torch.load(tmp_path / "classifier.pth", weights_only=True))
    assert decoder_peers.apart(theirs, library.load_model(tmp_path / "ours"), config) < CLOSE


@pytest.mark.parametrize("path", ["plain.safetensors", "plain.pth", "onym"])
@pytest.mark.parametrize("kind", ["gpt", "decoder"])
def test_plain_files_keep_a_classifier(kind: str, path: str, tmp_path: Path) -> None:
    config = gpt2(97, head_bias=True) if kind == "gpt" else config_of("qwen3", labels=LABELS, head_bias=True)
    model = saved(config, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / path)
    settings = {"labels": [*LABELS], "n_heads": 4} if path.endswith(".pth") else {}  # others hold the configuration
    again = open_any(tmp_path / path, settings=settings).checkpoint
    assert again.config is not None
    assert list(again.config["labels"]) == list(LABELS)
    assert all(torch.equal(value, again.model.tensor(name)) for name, value in model.state_dict().items())


def test_a_cropped_vocabulary_leaves_the_labels(tmp_path: Path) -> None:
    model = saved(gpt2(97), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface", vocab_size=90)
    again = library.load_model(tmp_path / "hf")
    assert again.config.vocab_size == 90
    assert torch.equal(again.out_head.weight, model.out_head.weight)


def test_what_has_no_place_for_labels_says_so(tmp_path: Path) -> None:
    saved(gpt2(97), tmp_path / "gpt")
    saved(config_of("llama", labels=LABELS, head_bias=True), tmp_path / "llama")
    for source, target, words in [
        ("gpt", "nanogpt", "nanoGPT's model predicts tokens, and this one tells labels apart; --to huggingface"),
        ("gpt", "gguf", "a GGUF file's model predicts tokens"),
        ("llama", "gguf", "a GGUF file's model predicts tokens"),
        ("llama", "huggingface", "no bias in their head, and RMSNorm has none .* --to book and onym keep it"),
        ("llama", "llama", "no bias in their head"),
    ]:
        path = tmp_path / f"there{ {'nanogpt': '.pt', 'gguf': '.gguf'}.get(target, '') }"
        with pytest.raises(CheckpointError, match=words) as error:
            convert(tmp_path / source, path, to=target)
        assert "\n" not in str(error.value)
        assert not path.exists()


def test_a_bias_that_the_norm_cannot_take_up_is_refused(tmp_path: Path) -> None:
    model: Any = drawn(make_model(gpt2(97, labels=("a", "b"), head_bias=True)))
    with torch.no_grad():
        model.out_head.weight[1] = -model.out_head.weight[0]
        model.out_head.bias.fill_(1.0)
    library.save(model, tmp_path / "dependent")
    with pytest.raises(CheckpointError, match=r"would change logits by 1\. --to book and onym keep it"):
        convert(tmp_path / "dependent", tmp_path / "hf", to="huggingface")
    library.save(drawn(make_model(gpt2(97, head_bias=True))).bfloat16(), tmp_path / "bf16")
    with pytest.raises(CheckpointError, match="would change logits by 0"):
        convert(tmp_path / "bf16", tmp_path / "hf", to="huggingface")
    assert not (tmp_path / "hf").exists()


def _score(rows: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, "score.weight": state["score.weight"][:rows].clone()}


BAD: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "fewer names": ({"id2label": {"0": "a", "1": "b"}}, _score(3), "3 rows, and id2label .* does not name the labels 0 to 2"),
    "names that are none": ({"id2label": ["a", "b", "c"]}, _score(3), "does not name the labels 0 to 2"),
    "a name twice": ({"id2label": {"0": "a", "1": "a", "2": "c"}}, _score(3), "labels must be two different names"),
    "one number": ({"id2label": {"0": "reward"}}, _score(1), "its head gives one number"),
    "several labels": ({"problem_type": "multi_label_classification"}, _score(3), "'multi_label_classification', and a"),
    "labels of tokens": ({}, lambda state: {**state, "score.bias": torch.zeros(3)}, r"it has score\.bias"),
    "two heads": ({}, lambda state: {**state, "lm_head.weight": torch.zeros(97, 64)}, "it has two heads"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_heads_of_transformers_are_one_sentence(case: str, tmp_path: Path) -> None:
    settings, change, words = BAD[case]
    saved(gpt2(97), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    file = tmp_path / "hf" / "model.safetensors"
    save_file(change(load_file(file)), file)
    decoder_peers.edited(tmp_path / "hf", **settings)
    with pytest.raises(CheckpointError, match=words) as error:
        library.load_model(tmp_path / "hf")
    assert "\n" not in str(error.value)


def test_labels_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    torch.save(review_classifier().state_dict(), tmp_path / "classifier.pth")
    torch.save(peers.book().state_dict(), tmp_path / "model.pth")
    saved(gpt2(97), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    for path, words in {
        "classifier.pth": "tells 2 labels apart, and 3 were given",
        "model.pth": "predicts tokens: leave them out",
        "hf": "says that the labels are ham, spam, .* leave them out",
        "ours": "leave it out",
    }.items():
        with pytest.raises(ConfigError, match=words):
            library.load_model(tmp_path / path, labels=["a", "b", "c"])


@pytest.mark.parametrize(("rows", "bias"), [(60, False), (97, True), (1, True)])
def test_a_head_of_the_books_that_is_neither(rows: int, bias: bool, tmp_path: Path) -> None:
    model = peers.book()
    model.out_head = nn.Linear(64, rows, bias=bias)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    words = "its head gives one number" if rows == 1 else f"its head has {rows} rows.* for a vocabulary of 97"
    with pytest.raises(CheckpointError, match=words):
        library.load_model(tmp_path / "model.pth")
