"""Text -> token files, from the cache or new.

A folder of tokens is named by a hash of the text, the tokenizer and the way they were split, so it is right whenever it is
found: a changed corpus or tokenizer looks elsewhere. Until it is complete its name is ``.writing-<key>``, and it grows shard by
shard, with ``progress.json`` saying how far it is: whoever was interrupted goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from onym.data.ahead import ahead
from onym.data.fast_bpe import Encoder, Warn, some_of
from onym.data.survey import SPLITS, Piece, Progress, Split, Survey, changed
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TOKENIZER, TokenData, Tokens, open_tokens, put_in_place, shard_name, write_description, write_shard
from onym.errors import DataError, storage_error
from onym.storage.lock import NoLocks, lock
from onym.storage.paths import replace_file

_PROGRESS = "progress.json"
_RECIPE = 1  # how text becomes tokens: in the key, so another way looks elsewhere
_BATCH_BYTES = 16 << 20  # of text that is encoded in one call
_SHARD_BYTES = 128 << 20  # of text in a shard, which is what an interruption costs at most


def tokenise(
    found: Survey, tokenizer: Tokenizer, cache: Path, progress: Progress | None = None, warn: Warn | None = None
) -> TokenData:
    """The corpus as two token streams, from the cache or new.

    Every document ends with the end-of-text token.

    Args:
        found: the corpus.
        tokenizer: whose tokens.
        cache: where they are kept.
        progress: called with bytes.
        warn: called where the fast library cannot be used.

    Raises:
        DataError: a file changed since the survey.
        StorageError: the cache cannot be written; the shards that are complete stay, to go on from.
    """
    tokenizer_json = tokenizer.to_json()
    folder = cache / "tokens" / key_of_tokens(found, tokenizer)
    if (data := open_tokens(folder)) is not None:
        return data
    try:
        with _alone(folder, progress) as temporary:
            if (data := open_tokens(folder)) is not None:  # another process was at it
                return data
            try:
                _Writer(temporary, found, tokenizer, progress, warn).write(tokenizer_json)
            except BaseException as error:
                # Shards may have text that changed; or there are none.
                if isinstance(error, DataError) or not (temporary / _PROGRESS).exists():
                    shutil.rmtree(temporary, ignore_errors=True)
                raise
            put_in_place(temporary, folder)
    except OSError as error:
        raise storage_error("write the token cache", folder, error) from error
    written = open_tokens(folder)
    assert written is not None, "the tokens just written do not open"
    return written


def key_of_tokens(found: Survey, tokenizer: Tokenizer) -> str:
    """The name of a folder of tokens: a hash of the text, the tokenizer and the way they are split."""
    recipe = [_RECIPE, found.fingerprint, found.longest_whole, found.held_out_below, found.train_share, tokenizer.to_json()]
    return blake3(json.dumps(recipe).encode()).hexdigest()[:32]


@contextmanager
def _alone(folder: Path, progress: Progress | None) -> Iterator[Path]:
    """The folder to write in, for one process at a time; where there are no locks, one of this process's own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".writing-{folder.name}")
    place = folder.with_name(f".lock-{folder.name}")
    try:
        while (descriptor := lock(place, os.O_RDWR | os.O_CREAT)) is None:
            if progress:
                progress("Another process writes these tokens", 0, 0)
            time.sleep(0.2)
    except NoLocks:
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as name:
            yield Path(name, folder.name)
        return
    try:
        yield temporary
        place.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@dataclass
class _State:
    """What progress.json says: how much of the corpus is in shards that are complete."""

    shards: dict[Split, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    """Tokens of each."""
    in_document: dict[Split, bool] = field(default_factory=lambda: dict.fromkeys(SPLITS, False))
    """Whether a document of that split is under way."""
    file_tokens: list[int] = field(default_factory=list)
    """Of each file that was begun."""
    pieces: int = 0
    """Of the last of them."""
    text_bytes: int = 0


class _Writer:
    """Writes the shards of one folder."""

    def __init__(self, folder: Path, found: Survey, tokenizer: Tokenizer, progress: Progress | None, warn: Warn | None) -> None:
        self._folder, self._found, self._tokenizer = folder, found, tokenizer
        self._progress, self._warn = progress, warn
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def write(self, tokenizer_json: str) -> None:
        """All that is missing."""
        found, state = self._found, self._earlier()
        encode: Encoder | None = None
        parts: list[dict[Split, _Part]] = []
        size = 0
        for batch in ahead(self._batches(state)):
            if encode is None:
                encode = Encoder(self._tokenizer, some_of([piece.text for _, piece in batch]), self._warn)
            parts.append(self._encoded(batch, encode, state))
            size += sum(len(piece.text) for _, piece in batch)
            if self._progress:
                self._progress("Tokenising", state.text_bytes + size, found.text_bytes)
            if size >= _SHARD_BYTES:
                self._commit(parts, state, size)
                parts, size = [], 0
        self._commit(parts, state, size)
        if state.text_bytes != found.text_bytes:
            raise changed(found.corpus.description)
        names = found.files or (("Python's own documentation", found.text_bytes, found.documents),)
        with (self._folder / "files.jsonl").open("w", encoding="utf-8") as files:
            # Files without documents have no tokens; the last ones are not in the list.
            for (name, text_bytes, documents), tokens in zip_longest(names, state.file_tokens, fillvalue=0):  # type: ignore[misc]
                about = {"name": name, "bytes": text_bytes, "documents": documents, "tokens": tokens}
                files.write(json.dumps(about, ensure_ascii=False) + "\n")
        (self._folder / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        (self._folder / _PROGRESS).unlink()
        write_description(
            self._folder,
            {
                "dtype": self._dtype.name,
                "shards": state.shards,
                "tokens": {split: sum(counts) for split, counts in state.shards.items()},
                "documents": found.documents,
                "bytes": found.text_bytes,
                "files": len(found.files),
                "skipped": [{"name": name, "reason": reason} for name, reason in found.skipped],
                "vocab_size": self._tokenizer.vocab_size,
                "tokenizer": blake3(tokenizer_json.encode()).hexdigest()[:32],
                "corpus": found.corpus.description,
                "corpus_fingerprint": found.fingerprint,
            },
        )

    def _earlier(self) -> _State:
        """What an interrupted process has left, if it can be used; else an empty folder."""
        with suppress(OSError, EOFError, ValueError, TypeError, KeyError):
            state = _State(**json.loads((self._folder / _PROGRESS).read_text()))
            shards = [(shard_name(split, n), count) for split in SPLITS for n, count in enumerate(state.shards[split])]
            for name, _ in shards:
                np.load(self._folder / f"{name}.documents.npy", mmap_mode="r")
            sizes = [(self._folder / f"{name}.bin").stat().st_size // self._dtype.itemsize for name, _ in shards]
            if sizes == [count for _, count in shards]:
                return state
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        return _State()

    def _batches(self, state: _State) -> Iterator[list[tuple[int, Piece]]]:
        """Pieces with the numbers of their files, from where the shards end."""
        batch, size = list[tuple[int, Piece]](), 0
        first, done = max(0, len(state.file_tokens) - 1), state.pieces
        for number in range(first, self._found.file_count):
            for count, piece in enumerate(self._found.pieces(number)):
                if number == first and count < done:
                    continue
                batch.append((number, piece))
                size += len(piece.text)
                if size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _encoded(self, batch: list[tuple[int, Piece]], encode: Encoder, state: _State) -> dict[Split, _Part]:
        """The tokens of pieces, by split; counts them for their files."""
        pieces = [piece for _, piece in batch]
        ids, stops = encode([piece.text for piece in pieces])
        ends = np.array([piece.ends for piece in pieces])
        ids = np.insert(ids.astype(self._dtype), stops[ends], self._tokenizer.end_of_text)
        lengths = np.diff(stops, prepend=0) + ends
        for number, piece_tokens in zip((number for number, _ in batch), lengths.tolist(), strict=True):
            while len(state.file_tokens) <= number:
                state.file_tokens.append(0)
                state.pieces = 0
            state.file_tokens[number] += piece_tokens
            state.pieces += 1
        is_train = np.array([piece.split == "train" for piece in pieces])
        result: dict[Split, _Part] = {}
        for split in SPLITS:
            chosen = is_train if split == "train" else ~is_train
            before = np.concatenate([[not state.in_document[split]], ends[chosen][:-1]])[: chosen.sum()]
            starts = (np.cumsum(lengths[chosen]) - lengths[chosen])[before]
            result[split] = _Part(ids if chosen.all() else ids[np.repeat(chosen, lengths)], starts.astype(np.uint64))
            if chosen.any():
                state.in_document[split] = not ends[chosen][-1]
        return result

    def _commit(self, parts: Sequence[dict[Split, _Part]], state: _State, text_bytes: int) -> None:
        """Put what was encoded into a shard of each split; from here on, an interrupted process goes on."""
        for split in SPLITS:
            tokens = np.concatenate([np.empty(0, self._dtype), *(part[split].tokens for part in parts)])
            if not len(tokens):
                continue
            bounds = np.cumsum([0, *(len(part[split].tokens) for part in parts)], dtype=np.uint64)
            starts = [part[split].starts + bound for part, bound in zip(parts, bounds[:-1], strict=True)]
            name = shard_name(split, len(state.shards[split]))
            try:
                write_shard(self._folder, name, tokens, np.concatenate(starts))
            except OSError:  # on a full disk it would only take space
                for file in self._folder.glob(f"{name}.*"):
                    file.unlink()
                raise
            state.shards[split].append(len(tokens))
        state.text_bytes += text_bytes
        replace_file(self._folder / _PROGRESS, json.dumps(asdict(state)))


@dataclass(frozen=True)
class _Part:
    """Tokens of one split."""

    tokens: Tokens
    starts: NDArray[np.uint64]
    """Of documents."""
