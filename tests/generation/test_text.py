"""Text from tokens: equal to decoding all of them, cut before the first stop string, and nothing that has to be taken back."""

from __future__ import annotations

import functools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.generation.text import MOST_STOPS, Text


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, and the lamp was lit. ü 東京 🙂 " * 4], 320)


STOPS = st.lists(st.text("aet .ü🙂", min_size=1, max_size=4), max_size=3)
IDS = st.lists(st.integers(1, 300), max_size=30)


@example([14, 65, 65], ["a", ".aa"])
@given(st.one_of(IDS, st.text("the cat sat ü🙂東. ", max_size=30).map(lambda text: tokenizer().encode(text))), STOPS)
def test_pieces_are_the_text_before_the_first_stop(ids: list[int], stops: list[str]) -> None:
    text, pieces = Text(tokenizer(), stops), []
    whole = tokenizer().decode(ids)
    complete = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(complete)[1]] if complete else whole
    for token in ids:
        pieces.append(text.add(token))
        so_far = "".join(pieces)
        assert expected.startswith(so_far), "nothing of a stop string leaks"
        if text.stopped:
            break
    pieces.append(text.rest())
    assert "".join(pieces) == expected
    assert text.stopped == bool(complete)


def test_a_stop_across_tokens_is_held_back_and_found() -> None:
    ids = tokenizer().encode("the cat sat")
    text = Text(tokenizer(), ["cat sat"])
    assert "".join(text.add(token) for token in ids) == "the "
    assert text.stopped
    assert text.rest() == ""


def test_an_incomplete_character_is_held_back() -> None:
    first, *others = tokenizer().encode("\N{SNOWMAN}")  # not in what it was trained on: single bytes
    text = Text(tokenizer())
    assert others
    assert text.add(first) == ""
    assert "".join(text.add(token) for token in others) == "\N{SNOWMAN}"


@pytest.mark.parametrize(("stops", "message"), [([""], "is empty"), (["x"] * 10_000, f"at most {MOST_STOPS}")])
def test_stops_that_cannot_be_looked_for(stops: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Text(tokenizer(), stops)
