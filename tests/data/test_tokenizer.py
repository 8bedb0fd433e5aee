"""Text <-> tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onym.data.tokenizer import END_OF_TEXT, TURN_TOKENS, Tokenizer
from onym.errors import TokenizerError

TRAINED = Tokenizer.train(["the cat sat on the mat, the cat sat\n" * 20, "def f(x):\n    return x\n" * 20], 320)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@pytest.mark.parametrize(
    "text", [END_OF_TEXT, f"a{END_OF_TEXT}b", "\r\n\t ", "🙂 é ß 漢字", "\x00\x7f", "  leading", "trailing  "]
)
def test_awkward_text_round_trips(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(st.text())
def test_text_never_becomes_the_end_of_text_token(text: str) -> None:
    assert TRAINED.end_of_text not in TRAINED.encode(text + END_OF_TEXT)


@given(st.text())
def test_streamed_text_is_the_text(text: str) -> None:
    assert "".join(TRAINED.decode_stream(TRAINED.encode(text))) == text


@given(st.lists(st.integers(0, TRAINED.vocab_size - 1)))
def test_streamed_text_of_any_tokens_is_what_decoding_gives(ids: list[int]) -> None:
    assert "".join(TRAINED.decode_stream(ids)) == TRAINED.decode(ids)


def test_a_hub_name_may_have_a_dot() -> None:
    with pytest.raises(TokenizerError, match="as a name on the Hugging Face hub it cannot be fetched"):
        Tokenizer.load("no such owner/opt-1.3b")


def test_a_stored_tokenizer_encodes_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TRAINED.to_json(), encoding="utf-8")
    for source in (path, tmp_path):
        loaded = Tokenizer.load(source)
        assert loaded.encode("the cat\n🙂") == TRAINED.encode("the cat\n🙂")
        assert loaded.to_json() == TRAINED.to_json()
        assert (loaded.end_of_text, loaded.vocab_size) == (TRAINED.end_of_text, TRAINED.vocab_size)


def test_a_tokenizer_without_an_end_of_text_token_gets_one() -> None:
    import tokenizers

    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    assert Tokenizer(bare).end_of_text == 2


def test_a_tokenizer_trained_here_reserves_the_tokens_of_turns() -> None:
    assert TRAINED.special_tokens == {
        END_OF_TEXT: 0,
        "<|im_start|>": TRAINED.vocab_size - 2,
        "<|im_end|>": TRAINED.vocab_size - 1,
    }
    assert Tokenizer.train(["many words of a text " * 99, "".join(map(chr, range(32, 999)))], 300).vocab_size == 300
    before = Tokenizer.train(["the cat sat on the mat, the cat sat\n" * 20], 274)
    assert before.special_tokens == {END_OF_TEXT: 0}
    assert not {320, 319} & set(TRAINED.encode("<|im_start|>user<|im_end|>"))


def test_special_tokens_are_added_at_the_end() -> None:
    assert TRAINED.with_special_tokens(["<|im_end|>", END_OF_TEXT]) is TRAINED
    small = Tokenizer.train(["the cat sat on the mat, the cat sat\n" * 20], 270)
    more = small.with_special_tokens(TURN_TOKENS)
    assert small.special_tokens == {END_OF_TEXT: 0}, "it is not changed"
    assert [more.special_tokens[token] for token in TURN_TOKENS] == [small.vocab_size, small.vocab_size + 1]
    assert Tokenizer.from_json(more.to_json()).special_tokens == more.special_tokens
    text = "the cat <|im_start|> mat"
    assert more.encode(text) == small.encode(text)


def test_a_token_that_texts_may_become_is_made_special() -> None:
    import tokenizers

    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<|im_end|>": 1}, merges=[]))
    known = Tokenizer(bare)
    assert "<|im_end|>" not in known.special_tokens
    assert known.with_special_tokens(["<|im_end|>"]).special_tokens["<|im_end|>"] == 1


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="at least 257"):
        Tokenizer.train(["text"], 256)


@pytest.mark.parametrize("content", ["", "not json", "{}", '{"model": 3}', "[]"])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*damaged"):
        Tokenizer.load(path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer file '.*gone\.json'"):
        Tokenizer.load(tmp_path / "gone.json")
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)
