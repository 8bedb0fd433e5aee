"""Log-likelihoods: those of a plain loop, whatever the stride, the batch and the padding."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import onym
from onym import GPT, Decoder, DecoderConfig
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError, OnymError, TokenizerError
from onym.generation import scoring
from onym.generation.scoring import Score, log_likelihoods, score, windows
from onym.gpt.causal_lm import CausalLM
from tests.conftest import TINY
from tests.convert import peers

END = 0
MODELS: dict[str, CausalLM] = {}


def model_of(kind: str) -> CausalLM:
    """A model whose logits are far apart, made once."""
    if kind not in MODELS:
        torch.manual_seed(1)
        shape = {"vocab_size": 50, "context_length": 8, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
        model = GPT(dataclasses.replace(TINY, **shape)) if kind == "gpt2" else Decoder(DecoderConfig(**shape))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6.0 if parameter.dim() == 2 else 1.0)
        MODELS[kind] = model.eval()
    return MODELS[kind]


def plain_loop(model: CausalLM, tokens: list[int], stride: int) -> float:
    """Each token by itself, in the window that it is new in, which runs alone and unpadded."""
    context, sequence, total = model.config.context_length, [END, *tokens], 0.0
    for index in range(1, len(sequence)):
        # The first window predicts as many tokens as fit, each further one ``stride`` more; none ends behind the sequence.
        further = max(0, math.ceil((index - context) / stride))
        end = min(context + further * stride, len(sequence) - 1)
        start = max(0, end - context)
        total += float(log_probabilities(model, tuple(sequence[start:end]))[index - 1 - start, sequence[index]])
    return total


@functools.lru_cache(maxsize=2)
def log_probabilities(model: CausalLM, read: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return F.log_softmax(model(torch.tensor([read]))[0].double(), dim=-1)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    stride=st.integers(1, 8),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 100),
    kind=st.sampled_from(["gpt2", "decoder"]),
)
def test_a_document_of_any_length_scores_as_in_a_plain_loop(
    lengths: list[int], stride: int, batch_size: int, seed: int, kind: str
) -> None:
    model, generator = model_of(kind), torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in lengths]
    found = log_likelihoods(model, [([END], tokens) for tokens in documents], stride=stride, batch_size=batch_size)
    assert [each.tokens for each in found] == lengths
    for each, tokens in zip(found, documents, strict=True):
        assert each.log_likelihood == pytest.approx(plain_loop(model, tokens, stride), abs=1e-4)


@given(length=st.integers(1, 60), first=st.integers(1, 20), context=st.integers(1, 12), data=st.data())
def test_windows_predict_each_token_once_with_what_the_stride_leaves_them(
    length: int, first: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    found = list(windows(length, first, context, stride))
    assert [index for _, start, end in found for index in range(start, end)] == list(range(first, length))
    for number, (start, predicted, end) in enumerate(found):
        assert 0 <= start < predicted
        assert end - 1 - start <= context
        if number:
            assert predicted - start >= context - stride + 1


def test_a_continuation_depends_on_its_context_alone() -> None:
    model = model_of("gpt2")
    pairs = [([3, 4, 5], [6]), ([7], [1, 2, 3, 4]), ([9, 9], []), (list(range(1, 30)), [5, 6, 7])]
    together = log_likelihoods(model, pairs, stride=8, batch_size=4)
    for pair, each in zip(pairs, together, strict=True):
        (alone,) = log_likelihoods(model, [pair], stride=8)
        assert each.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5)
        assert each.greedy == alone.greedy
    assert together[2] == (0.0, True, 0)
    logits = model(torch.tensor([[*range(24, 30), 5, 6]]))[0]  # the last 8 before the last one
    expected = F.log_softmax(logits[-3:], dim=-1).gather(1, torch.tensor([[5], [6], [7]])).sum()
    assert together[3].log_likelihood == pytest.approx(float(expected), abs=1e-4)


def test_greedy_is_what_the_model_would_write() -> None:
    model = model_of("gpt2")
    prompt = [1, 2, 3]
    written = list(onym.generation.engine.generate(model, prompt, 4, onym.generation.sampling.Sampling(temperature=0)))
    other = [*written[:-1], (written[-1] + 1) % 50]
    assert [each.greedy for each in log_likelihoods(model, [(prompt, written), (prompt, other)])] == [True, False]


def test_the_logits_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = peers.huggingface(vocab_size=300).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = onym.load_model(tmp_path / "hf")
    assert isinstance(ours, CausalLM)
    tokens = torch.randint(1, 300, (ours.config.context_length,))
    with torch.no_grad():
        logits = theirs(torch.cat([torch.tensor([END]), tokens[:-1]])[None]).logits[0]
    expected = F.log_softmax(logits.double(), dim=-1).gather(1, tokens[:, None]).sum()
    (found,) = log_likelihoods(ours, [([END], tokens.tolist())])
    assert found.log_likelihood == pytest.approx(float(expected), abs=1e-3)


def test_logits_exist_for_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of("gpt2"), list[int]()
    pairs = [([END], list(range(1, 30)))] * 5
    expected = log_likelihoods(model, pairs)
    monkeypatch.setattr(scoring, "chunk_rows", lambda *_: 3)
    hook = model.out_head.register_forward_hook(lambda *given: seen.append(given[2].shape[0]))
    found = log_likelihoods(model, pairs)
    hook.remove()
    assert max(seen) == 3
    assert sum(seen) == 5 * 29, "the head computes for predicted tokens alone"
    assert [each.log_likelihood for each in found] == pytest.approx([each.log_likelihood for each in expected], abs=1e-4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the lamp and the river and the stone, "] * 20, 280)


def test_bits_per_byte_by_hand(tokenizer: Tokenizer) -> None:
    """A model that knows nothing gives each token 1 in its vocabulary."""
    model = GPT(dataclasses.replace(TINY, vocab_size=280))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    text = "the lamp – and the river " * 9  # longer than the context; the dash has three bytes
    (found,) = score(model.train(), [text], tokenizer=tokenizer, stride=5)
    tokens = len(tokenizer.encode(text))
    assert (found.tokens, found.bytes) == (tokens, 9 * 27)
    assert tokens > model.config.context_length
    assert found.loss == pytest.approx(math.log(280))
    assert found.perplexity == pytest.approx(280, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(280) / (9 * 27))
    assert model.training, "as it was before"
    both = Score.total([found, Score(-1.0, 2, 3)])
    assert (both.tokens, both.bytes) == (tokens + 2, 9 * 27 + 3)
    assert Score(-1e6, 1, 1).perplexity == math.inf
    assert math.isnan(Score(math.nan, 1, 1).perplexity)


def test_a_path_and_a_model_score_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, vocab_size=280)).eval()
    onym.save(model, tmp_path / "m.safetensors")
    (tmp_path / "t.json").write_text(tokenizer.to_json())
    texts = ["the lamp", "and the river " * 30, "x"]
    expected = score(model, texts, tokenizer=tokenizer)
    for batch_size in (1, 3):
        found = onym.score(tmp_path / "m.safetensors", texts, tokenizer=tmp_path / "t.json", batch_size=batch_size)
        for one, other in zip(found, expected, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
    model.compile()
    assert score(model, texts, tokenizer=tokenizer) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "one"}, "a list of texts"),
        ({"texts": ["a", ""]}, "Text 2 of 2 is empty"),
        ({"texts": ["\ud800"]}, "not valid UTF-8"),
        ({"stride": 0}, "--stride must be from 1 to the model's context of 32, not 0"),
        ({"stride": 33}, "--stride must be from 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"tokenizer": None}, "give its tokenizer too"),
        ({"tokenizer": "gone.json"}, "There is no tokenizer file 'gone.json'"),
    ],
)
def test_what_cannot_work_is_refused(tokenizer: Tokenizer, arguments: dict[str, object], message: str) -> None:
    model = GPT(dataclasses.replace(TINY, vocab_size=280))
    with pytest.raises(OnymError, match=message):
        score(model, **{"texts": ["one"], "tokenizer": tokenizer, **arguments})  # type: ignore[arg-type]


def test_a_tokenizer_that_does_not_fit_is_refused(tiny: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"The tokenizer has \d+ tokens and the model 101"):
        score(tiny, ["one"], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="has token 101, the model knows 101"):
        log_likelihoods(tiny, [([1], [101])])
    with pytest.raises(ConfigError, match="A context has no tokens"):
        log_likelihoods(tiny, [([], [1])])


def test_a_long_text_is_encoded_in_pieces_that_end_with_lines(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the lamp\nand the river\n\nand the stone, " * 9 + "x" * 90
    whole = tokenizer.encode(text)
    monkeypatch.setattr(scoring, "PIECE", 50)
    in_pieces = scoring._encoded(tokenizer, text)
    assert tokenizer.decode(in_pieces) == text
    assert len(whole) <= len(in_pieces) < len(whole) + 9
