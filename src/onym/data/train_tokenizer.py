"""A tokenizer trained on a corpus, from the cache or new."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from onym.data.fast_bpe import SEPARATOR, Encoder, Warn, some_of, train_merges
from onym.data.survey import Progress, Survey
from onym.data.tokenizer import Tokenizer, require_bytes, reserved_tokens
from onym.errors import TokenizerError, storage_error
from onym.storage.paths import replace_file

_FILE_BYTES = 32 << 20  # of the text that gigatoken trains on, which it maps
_SMALL = 4 << 20  # bytes of text that `tokenizers` trains on in a second, and from which it knows best when no merge is left
_COMPARED_VOCABULARY = 1000
_DRAWN = 1 << 14  # bytes of a part that is in the sample or not
_BEGINNINGS, _BEGINNING = 1000, 8192  # of texts, to compare two libraries on


def cached_tokenizer(
    surveys: Sequence[Survey],
    vocab_size: int,
    cache: Path,
    progress: Progress | None = None,
    *,
    sample_bytes: int = 1 << 30,
    warn: Warn | None = None,
) -> Tokenizer:
    """The tokenizer trained on the training part of this text, from the cache or new.

    Args:
        surveys: of the corpora.
        vocab_size: tokens, fewer where the text is too short for so many.
        cache: where it is kept.
        progress: called with bytes.
        sample_bytes: of the text that it is trained on, spread over all of it.
        warn: called where the fast library cannot be used.

    Raises:
        TokenizerError: the vocabulary could not hold every byte.
        StorageError: the cache cannot be written.
    """
    require_bytes(vocab_size)
    total = sum(found.text_bytes for found in surveys)
    sampled = f"-{sample_bytes}" if sample_bytes < total else ""
    fingerprint = surveys[0].fingerprint
    if len(surveys) > 1:
        fingerprint = blake3("".join(found.fingerprint for found in surveys).encode()).hexdigest()
    turns = "-turns" if reserved_tokens(vocab_size) else ""  # another name than in older caches, which lack them
    path = cache / "tokenizers" / f"{fingerprint[:32]}-{surveys[0].train_share:g}-{vocab_size}{sampled}{turns}.json"
    with suppress(TokenizerError):  # a damaged one is made again
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # says when it was last used
            return Tokenizer.load(path)

    def training_text() -> Iterator[bytes]:
        share, done = min(1.0, sample_bytes / total), 0
        for found in surveys:
            for number in range(found.file_count):
                for piece in found.pieces(number):
                    done += len(piece.text)
                    if piece.split == "train":
                        yield from [piece.text] if share == 1 else _drawn(piece.text, share)
                if progress:
                    progress("Reading text for the tokenizer", done, total)

    if total <= _SMALL:
        tokenizer = Tokenizer.train((text.decode() for text in training_text()), vocab_size)
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=cache) as folder:
                tokenizer = _train(Path(folder), training_text(), vocab_size, progress, warn)
        except OSError as error:
            raise storage_error("write text for the tokenizer", cache, error) from error
    replace_file(path, tokenizer.to_json())
    return tokenizer


def _drawn(text: bytes, share: float) -> Iterator[bytes]:
    """Parts of a text that have this share of all text; which they are depends on them alone."""
    for start in range(0, len(text), _DRAWN):
        part = text[start : start + _DRAWN]
        # Other bits than those that say what is held out.
        if int.from_bytes(blake3(part).digest()[8:16], "big") < share * 2**64 and (whole := part.decode(errors="ignore")):
            yield whole.encode()


def _train(folder: Path, texts: Iterator[bytes], vocab_size: int, progress: Progress | None, warn: Warn | None) -> Tokenizer:
    part = folder / "part"
    sample, beginnings = list[Path](), list[bytes]()
    for number, some in enumerate(_batches(texts, _FILE_BYTES)):
        sample.append(folder / f"text-{number:05}")
        sample[-1].write_bytes(SEPARATOR.join(some))
        beginnings.extend(text[:_BEGINNING] for text in some)
        while len(beginnings) > 2 * _BEGINNINGS:  # every second one: they stay spread over the text
            beginnings = beginnings[::2]
    compared = some_of(beginnings)
    part.write_bytes(SEPARATOR.join(compared))
    if progress:
        progress("Training the tokenizer", 0, 0)
    small, right = min(vocab_size, _COMPARED_VOCABULARY), list[Tokenizer]()
    merges = train_merges(
        [([part], _learned(small)), (sample, _learned(vocab_size))],
        meanwhile=lambda: right.append(Tokenizer.train((text.decode() for text in compared), small)),
    )
    if merges is None:
        why = "could not train"
    elif Tokenizer.of_merges(merges[0], small).to_json() != right[0].to_json():
        why = "finds other merges than tokenizers in this text"
    else:
        tokenizer = Tokenizer.of_merges(merges[1], vocab_size)
        if _uses_last_token(tokenizer, tokenizer.vocab_size - 1 - len(reserved_tokens(vocab_size)), sample):
            return tokenizer
        why = ""  # where no pair is left it goes on to merge what never occurs; tokenizers stops
    if warn and why:
        warn(f"gigatoken {why}: tokenizers does the work, more slowly, with the right result.")
    return Tokenizer.train((text.decode() for text in _separated(sample)), vocab_size)


def _learned(vocab_size: int) -> int:
    """The bytes and merges of a vocabulary: all but its special tokens."""
    return vocab_size - 1 - len(reserved_tokens(vocab_size))


def _uses_last_token(tokenizer: Tokenizer, last: int, sample: Sequence[Path]) -> bool:
    """Whether the last merge occurs in the text: then so do all before it."""
    encode = Encoder(tokenizer, [])
    token = tokenizer.bytes_of(last)
    return any(last in encode([text])[0] for text in _separated(sample) if token in text)


def _separated(sample: Sequence[Path]) -> Iterator[bytes]:
    """The texts of files, :data:`SEPARATOR` between two."""
    return (text for path in sample for text in path.read_bytes().split(SEPARATOR))


def _batches(texts: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    """The texts in lists of that many bytes or a little more."""
    batch, left = list[bytes](), size
    for text in texts:
        batch.append(text)
        left -= len(text)
        if left <= 0:
            yield batch
            batch, left = [], size
    if batch:
        yield batch
