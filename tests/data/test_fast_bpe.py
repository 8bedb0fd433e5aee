"""gigatoken against tokenizers: equal merges and equal ids, or tokenizers does the work."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from onym.data import fast_bpe, train_tokenizer
from onym.data.corpus import Corpus, python_documentation
from onym.data.fast_bpe import SEPARATOR, Encoder, train_merges
from onym.data.survey import Survey, survey
from onym.data.tokenizer import END_OF_TEXT, Tokenizer
from onym.data.train_tokenizer import cached_tokenizer

# What the tokenizer.json of these models have.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PROSE = [document.text for document in python_documentation()[:400]]
SOURCES = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
UNICODE = [
    "naïve café ÀÉÎ 漢字かな 한국어 עברית 🙂👩\u200d👩\u200d👧 a\u0301e\u0301 ½ ² ٣٤ \u200b\u2028\x85\xa0",
    "I'M we'LL they're 12345678 \t\r\n\r\n  x",
] * 20


def split_by(pattern: str, *, ignore_merges: bool, normalizer: normalizers.Normalizer | None) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(PROSE + SOURCES + UNICODE, trainer)
    return Tokenizer(inner)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: Tokenizer.train(PROSE + SOURCES + UNICODE, 1500),
    "llama3": lambda: split_by(LLAMA_3, ignore_merges=True, normalizer=None),
    "qwen": lambda: split_by(QWEN, ignore_merges=False, normalizer=normalizers.NFC()),
}
ENCODERS = {name: Encoder(make(), []) for name, make in KINDS.items()}

TEXT = st.lists(
    st.one_of(
        st.text(min_size=1),
        st.text("aeé'sSdDmMtTrReEvVlL 019½²\n\r\t\xa0\u3000\u0301_-", min_size=1),
        st.sampled_from([END_OF_TEXT, "<|im_start|>", "  ", "'LL", "\r\n\r\n", "👩‍👩‍👧", "\u1e9b\u0323", "Ω", "ﬁ", "\x00"]),
    ),
    min_size=1,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXT, min_size=1, max_size=5))
def test_any_text_has_equal_ids(kind: str, texts: list[str]) -> None:
    encoder = ENCODERS[kind]
    assert encoder.library == "gigatoken"
    raw = [text.encode() for text in texts]
    ids, stops = encoder(raw)
    right, right_stops = encoder._slow(raw)
    assert ids.tolist() == right.tolist()
    assert stops.tolist() == right_stops.tolist()
    assert encoder.library == "gigatoken", "it did not give up"


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_corpus_and_sources_have_equal_ids(kind: str) -> None:
    encoder = ENCODERS[kind]
    raw = [text.encode() for text in [d.text for d in python_documentation()] + SOURCES]
    assert all(np.array_equal(ours, right) for ours, right in zip(encoder(raw), encoder._slow(raw), strict=True))


@settings(max_examples=20)
@given(st.lists(TEXT, min_size=1, max_size=30), st.integers(258, 330))
def test_any_text_has_equal_merges_while_there_are_some(texts: list[str], vocab_size: int) -> None:
    right = Tokenizer.train(texts, vocab_size)
    merges = merges_of(texts, vocab_size)
    assert Tokenizer.of_merges(merges[: learned(right)], vocab_size).to_json() == right.to_json()


@pytest.mark.parametrize("vocab_size", [257, 300, 2000])
@pytest.mark.parametrize("texts", [PROSE, SOURCES, UNICODE], ids=["prose", "sources", "unicode"])
def test_equal_merges_give_an_equal_file(texts: list[str], vocab_size: int) -> None:
    right = Tokenizer.train(texts, vocab_size)
    ours = Tokenizer.of_merges(merges_of(texts, vocab_size)[: learned(right)], vocab_size)
    assert ours.to_json() == right.to_json()


def learned(tokenizer: Tokenizer) -> int:
    """How many merges it has."""
    return tokenizer.vocab_size - 256 - len(tokenizer.special_tokens)


def training_texts(found: Survey) -> list[str]:
    pieces = [piece for number in range(found.file_count) for piece in found.pieces(number)]
    return [piece.text.decode() for piece in pieces if piece.split == "train"]


def merges_of(texts: list[str], vocab_size: int) -> fast_bpe.Merges:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text")
        path.write_bytes(SEPARATOR.join(text.encode() for text in texts))
        merges = train_merges([([path], vocab_size - 1)])
    assert merges is not None
    return merges[0]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(train_tokenizer, "_SMALL", 0)
    for number, text in enumerate(SOURCES * 3):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n{text}")
    return Corpus((str(tmp_path / "*.py"),))


def test_a_corpus_is_trained_on_by_the_fast_library(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, warnings = survey(corpus, 0.1), list[str]()
    right = Tokenizer.train(
        [p.text.decode() for n in range(found.file_count) for p in found.pieces(n) if p.split == "train"], 700
    )
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: Tokenizer.of_merges(merges_of(list(texts), size), size))
    assert cached_tokenizer([found], 700, tmp_path, warn=warnings.append).to_json() == right.to_json()
    assert not warnings
    assert not list(tmp_path.glob(".tokenizer-*"))


def test_where_no_pair_is_left_the_vocabulary_is_as_tokenizers_makes_it(corpus: Corpus, tmp_path: Path) -> None:
    found = survey(corpus, 0.1)
    right = Tokenizer.train(training_texts(found), 20_000)
    assert right.vocab_size < 20_000
    assert cached_tokenizer([found], 20_000, tmp_path).to_json() == right.to_json()


@pytest.mark.parametrize("fault", ["other merges", "none"])
def test_a_library_that_trains_otherwise_is_not_used(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def reversed_merges(samples: list[tuple[list[Path], int]], meanwhile: Callable[[], None]) -> list[fast_bpe.Merges] | None:
        merges = train_merges(samples, meanwhile)
        assert merges is not None
        return None if fault == "none" else [each[::-1] for each in merges]

    found, warnings = survey(corpus, 0.1), list[str]()
    right = cached_tokenizer([found], 500, tmp_path / "a")
    monkeypatch.setattr(train_tokenizer, "train_merges", reversed_merges)
    assert cached_tokenizer([found], 500, tmp_path / "b", warn=warnings.append).to_json() == right.to_json()
    assert len(warnings) == 1
    assert "tokenizers does the work" in warnings[0]


def test_a_library_that_encodes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, other = KINDS["gpt2"](), Tokenizer.train(PROSE, 600)
    monkeypatch.setattr(fast_bpe, "_open", lambda text, plain=fast_bpe._open: plain(other.to_json()))
    warnings: list[str] = []
    encoder = Encoder(tokenizer, [b"some text to compare them on"], warnings.append)
    assert encoder.library == "tokenizers"
    assert len(warnings) == 1
    assert encoder([b"some text"])[0].tolist() == tokenizer.encode("some text")


def test_a_library_that_fails_in_the_middle_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panics(BaseException):
        """As pyo3's PanicException is."""

    def panic(*_: object) -> None:
        raise Panics

    warnings: list[str] = []
    encoder = Encoder(KINDS["gpt2"](), [b"text"], warnings.append)
    monkeypatch.setattr(encoder, "_fast", type("Broken", (), {"encode_batch": panic})())
    assert encoder([b"some text"])[0].tolist() == KINDS["gpt2"]().encode("some text")
    assert encoder.library == "tokenizers"
    assert warnings == ["gigatoken failed (Panics): tokenizers does the work, more slowly, with the right result."]


def test_a_kind_that_it_does_not_know_is_encoded_by_tokenizers() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"some": 0, "text": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    warnings: list[str] = []
    encoder = Encoder(Tokenizer(inner), [b"some text"], warnings.append)
    assert encoder([b"some text", b"else"])[0].tolist() == [0, 1, 2]
    assert (encoder.library, warnings) == ("tokenizers", [])


def test_tokens_that_are_added_and_not_special_are_found_in_text() -> None:
    inner = tokenizers.Tokenizer.from_str(KINDS["gpt2"]().to_json())
    inner.add_tokens(["functools"])
    encoder = Encoder(Tokenizer(inner), [])
    assert json.loads(inner.to_str())["added_tokens"][-1]["special"] is False
    text = [b"import functools, json"]
    assert encoder(text)[0].tolist() == encoder._slow(text)[0].tolist()


def test_a_sample_is_spread_over_the_whole_text_and_has_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one long document too, and whatever characters its parts are cut in."""
    text = "".join(f"wörd{n}é漢 of {n * n}\n" for n in range(60_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    for number in range(500):
        (tmp_path / f"{number}.txt").write_text(f"note {number}\n" * 100)
    seen: list[str] = []
    tokenizer = KINDS["gpt2"]()
    monkeypatch.setattr(train_tokenizer, "_SMALL", 10**9)
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: (seen.extend(texts), tokenizer)[1])
    found = survey(Corpus((str(tmp_path),)), 0.1)
    cached_tokenizer([found], 500, tmp_path / "cache", sample_bytes=300_000)
    assert 200_000 < sum(len(each.encode()) for each in seen) < 400_000
    places = sorted(text.find(each[:40]) / len(text) for each in seen if "wörd" in each)
    assert places[0] < 0.2
    assert places[-1] > 0.6
    assert any(each.startswith("note") for each in seen)
    before = list(seen)
    seen.clear()
    cached_tokenizer([found], 500, tmp_path / "again", sample_bytes=300_000)
    assert seen == before
    assert next((tmp_path / "cache/tokenizers").iterdir()).name.endswith("-500-300000-turns.json")
