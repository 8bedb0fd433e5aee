"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from onym.data.tokenizer import Decoding, Tokenizer
from onym.errors import ConfigError

MOST_STOPS = 64


class Text:
    """The text of one request. What may be the beginning of a stop string, or of a character, is held back.

    Args:
        tokenizer: of the model.
        stops: the text ends before that of these which is complete first; at most :data:`MOST_STOPS`.

    Raises:
        ConfigError: a stop string is empty, or there are too many.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        check_stops(stops)
        self._decoding, self._stops, self._held = Decoding(tokenizer), tuple(stops), ""
        self.stopped = False
        """Whether a stop string was found; there is no more text then."""

    def add(self, token: int) -> str:
        """What is certain with one more token."""
        return self._certain(self._decoding.add(token))

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        piece = self._certain(self._decoding.rest())
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _certain(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text is cut into tokens
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def check_stops(stops: Sequence[str]) -> None:
    """Raise a ConfigError for stop strings that cannot be looked for."""
    if len(stops) > MOST_STOPS:
        raise ConfigError(f"There are {len(stops):,} stop strings: give at most {MOST_STOPS}.")
    if not all(stops):
        raise ConfigError("A stop string is empty, so every text would end at once: leave it out.")


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that a stop string begins with, and is longer than."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
