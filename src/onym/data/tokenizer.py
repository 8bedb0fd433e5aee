"""Text <-> token ids: a byte-level BPE, trained on the corpus or taken from elsewhere.

The work is done by Hugging Face's ``tokenizers``, whose ``tokenizer.json`` every other tool reads. Any text round-trips
byte for byte through a tokenizer trained here, because its alphabet is the 256 bytes.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from onym.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
"""What begins and ends a turn of a conversation in ChatML."""
# What other tokenizers call the token that ends a document.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_SMALLEST_VOCABULARY = 257  # every byte, and the end of a document
_SMALLEST_WITH_TURNS = _SMALLEST_VOCABULARY + len(TURN_TOKENS) + 16  # a smaller one needs its few merges more


class Tokenizer:
    """A ``tokenizer.json``, with the special token that training needs: the end of a document."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not any(end in vocabulary for end in _KNOWN_ENDS):
            inner.add_special_tokens([END_OF_TEXT])
            vocabulary = inner.get_vocab(with_added_tokens=True)
        # Text that happens to contain "<|endoftext|>" is text: only we may write the token itself.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.end_of_text_token: str = next(end for end in _KNOWN_ENDS if end in vocabulary)
        self.end_of_text: int = vocabulary[self.end_of_text_token]
        self.vocab_size: int = max(vocabulary.values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn ``vocab_size`` tokens (fewer, if the text is too short for so many) from the texts.

        The end of a document is the first of them, and :func:`reserved_tokens` the last ones, so that the model can be taught
        to converse later.

        Raises:
            TokenizerError: the vocabulary could not hold every byte.
        """
        require_bytes(vocab_size)
        inner, reserved = _byte_level(), reserved_tokens(vocab_size)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(reserved),
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        inner.add_special_tokens(list(reserved))
        return cls(inner)

    @classmethod
    def of_merges(cls, merges: Iterable[tuple[bytes, bytes]], vocab_size: int) -> Tokenizer:
        """What :meth:`train` gives, from the merges that training finds, in order."""
        inner, reserved = _byte_level(), reserved_tokens(vocab_size)
        vocabulary = {END_OF_TEXT: 0}
        for character in sorted(_characters()):
            vocabulary[character] = len(vocabulary)
        pairs: list[tuple[str, str]] = []
        for left, right in merges:
            if len(vocabulary) >= vocab_size - len(reserved):
                break
            pairs.append((_as_text(left), _as_text(right)))
            vocabulary.setdefault("".join(pairs[-1]), len(vocabulary))
        inner.model = models.BPE(vocabulary, pairs)
        inner.add_special_tokens([END_OF_TEXT, *reserved])
        return cls(inner)

    @classmethod
    def load(cls, name: str | Path) -> Tokenizer:
        """Open a tokenizer.json, a folder that holds one, or a tokenizer of the Hugging Face hub by name (``gpt2``).

        Raises:
            TokenizerError: there is no such tokenizer, or it is damaged.
        """
        path = Path(name).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
            if not path.exists():
                raise TokenizerError(f"The folder '{name}' holds no tokenizer.json: name a folder that does, or the file.")
        if path.is_file():
            try:
                return cls.from_json(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, TokenizerError) as error:
                raise TokenizerError(f"The tokenizer '{path}' cannot be read, it may be damaged: {error}") from error
        if path.suffix == ".json" or len(path.parts) > 2 or str(name).startswith((".", "/", "~")):
            raise TokenizerError(f"There is no tokenizer file '{name}': check the path given to --tokenizer.")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news to the user
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(str(name)))
        except Exception as error:  # the hub's client raises its own types, and plain Exception
            raise TokenizerError(
                f"'{name}' is no file here, and as a name on the Hugging Face hub it cannot be fetched "
                f"({_first_line(error)}): check the name and the network, or give a tokenizer.json."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Read what :meth:`to_json` wrote."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"not a tokenizer.json ({_first_line(error)}).") from error

    def to_json(self) -> str:
        """The text of a ``tokenizer.json``, equal for equal tokenizers."""
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps(json.loads(self._inner.to_str()), ensure_ascii=False, indent=2, sort_keys=True) + "\n"

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that no text becomes, and their ids."""
        added = self._inner.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    @functools.cached_property
    def special_tokens_that_strip(self) -> dict[int, tuple[bool, bool]]:
        """The special tokens that take the white space before them, or after, into themselves; by id."""
        added = self._inner.get_added_tokens_decoder()
        return {number: (token.lstrip, token.rstrip) for number, token in added.items() if token.lstrip or token.rstrip}

    def with_special_tokens(self, names: Iterable[str]) -> Tokenizer:
        """The same tokenizer with these special tokens: new ids at the end for those that it lacks; itself if it has all."""
        if not (missing := [name for name in dict.fromkeys(names) if name not in self.special_tokens]):
            return self
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        inner.add_special_tokens(missing)
        return Tokenizer(inner)

    def id_of(self, token: str | None, default: int) -> int:
        """The id of a token by its text, special or not; ``default`` where there is none."""
        number = None if token is None else self._inner.token_to_id(token)
        return default if number is None else number

    def bytes_of(self, token: int) -> bytes:
        """What a token of a byte-level vocabulary stands for."""
        byte_of = {character: byte for byte, character in enumerate(_characters())}
        return bytes(byte_of[character] for character in self._inner.id_to_token(token) or "")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as its tokens come, held back only while a character is incomplete; together, what :meth:`decode` gives."""
        text = Decoding(self)
        for token in ids:
            if piece := text.add(token):
                yield piece
        if rest := text.rest():
            yield rest


class Decoding:
    """The text of tokens that come one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._seen: list[int] = []
        self._written = 0

    def add(self, token: int) -> str:
        """What is certain with one more token; nothing while a character is incomplete."""
        self._seen.append(token)
        piece: str = self._stream.step(self._tokenizer._inner, token) or ""
        self._written += len(piece)
        return piece

    def rest(self) -> str:
        """What was held back when no more tokens come: an end inside a character."""
        return self._tokenizer.decode(self._seen)[self._written :]


def reserved_tokens(vocab_size: int) -> tuple[str, ...]:
    """The special tokens that a vocabulary of this size, trained here, has besides the end of a document."""
    return TURN_TOKENS if vocab_size >= _SMALLEST_WITH_TURNS else ()


def require_bytes(vocab_size: int) -> None:
    """Raise a TokenizerError where a vocabulary could not hold every byte."""
    if vocab_size < _SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"A byte-level vocabulary needs at least {_SMALLEST_VOCABULARY} tokens, one a byte and one for the end of "
            f"a document: --vocab-size {vocab_size} is too small."
        )


def _byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


@functools.cache
def _characters() -> list[str]:
    """The character that stands for each byte in a tokenizer.json, as GPT-2 chose them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _as_text(token: bytes) -> str:
    return "".join(_characters()[byte] for byte in token)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
