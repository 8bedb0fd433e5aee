"""Text tokenised once, into memory-mapped files.

    <cache>/tokens/<key>/train.bin  held_out.bin    token ids, uint16 or uint32, one stream each
                         train.documents.npy  …     uint64, where each document starts in its stream
                         tokens.json                what made them; written last

The key is a hash of the text, the tokenizer and the way they were split, so a cache is right whenever it is found: a changed
corpus or tokenizer looks elsewhere. The folder is written beside its place and renamed into it, so it is there as a whole
or not at all. Deleting it costs the time to tokenise again and nothing else.

Every document ends with the end-of-text token, and belongs to the training stream or to the held-out one as a whole: by a
hash of its text, so that copies of a document stay on one side and new documents do not move the old ones. A document that is
longer than all that shall be held out is split instead: its last part is held out.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from onym.data.corpus import Corpus
from onym.data.tokenizer import Tokenizer
from onym.errors import DataError, TokenizerError, storage_error
from onym.storage.local import can_be_mapped
from onym.storage.paths import replace_file

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 while that is unknown)."""

_FORMAT = 1
_CHUNK_CHARACTERS = 1 << 20  # encoded at a time, so that a long document does not need twenty times its size in memory


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus found: enough to split it and to name its caches."""

    fingerprint: str
    documents: int
    text_bytes: int
    longest_whole: int
    """Bytes of the longest document that is held out or trained on as a whole; a longer one is split."""
    held_out_below: int
    """Documents whose hash is below this are held out."""
    train_share: float

    def split(self, text: str) -> Iterator[tuple[Split, str]]:
        """A document, or its two parts, each with the stream that it belongs to."""
        raw = text.encode()
        if len(raw) <= self.longest_whole:
            yield ("held_out" if _document_hash(raw) < self.held_out_below else "train"), text
            return
        cut = min(int(len(text) * self.train_share), len(text) - 1)
        cut = text.rfind("\n", cut - len(text) // 10, cut) + 1 or cut  # at the end of a line where one is near
        for split, part in (("train", text[:cut]), ("held_out", text[cut:])):
            if part:
                yield split, part  # type: ignore[misc]


def survey(corpus: Corpus, held_out: float, progress: Progress | None = None) -> Survey:
    """Read the corpus once.

    Raises:
        DataError: nothing is in it.
    """
    digest = blake3()
    sizes: list[tuple[int, int]] = []  # hash and bytes of each document
    text_bytes = 0
    for document in corpus.documents():
        raw = document.text.encode()
        digest.update(blake3(raw).digest())
        sizes.append((_document_hash(raw), len(raw)))
        text_bytes += len(raw)
        if progress and len(sizes) % 100 == 0:
            progress("Reading the text", len(sizes), 0)
    if not sizes:
        raise DataError(f"There is no text in {corpus.description}: the corpus is empty. Name other files with --data.")
    longest_whole = int(held_out * text_bytes)
    whole = sorted((document_hash, size) for document_hash, size in sizes if size <= longest_whole)
    wanted = held_out * sum(size for _, size in whole)
    below, seen = 0, 0
    for document_hash, size in whole:
        if seen >= wanted:
            break
        below, seen = document_hash + 1, seen + size
    return Survey(digest.hexdigest(), len(sizes), text_bytes, longest_whole, below, 1 - held_out)


def _document_hash(raw: bytes) -> int:
    return int.from_bytes(blake3(raw).digest()[:8], "big")


@dataclass(frozen=True)
class TokenStream:
    """One split: token ids on disk, mapped."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    document_starts: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus, and the folder it is in."""

    path: Path
    train: TokenStream
    held_out: TokenStream
    documents: int
    description: Mapping[str, Any] = field(default_factory=dict)
    """What tokens.json says."""


def cached_tokenizer(
    corpus: Corpus, found: Survey, vocab_size: int, cache: Path, progress: Progress | None = None
) -> Tokenizer:
    """The tokenizer trained on this corpus, from the cache or new."""
    path = cache / "tokenizers" / f"{found.fingerprint[:32]}-{found.train_share:g}-{vocab_size}.json"
    with suppress(TokenizerError):  # a damaged one is made again
        if path.exists():
            return Tokenizer.load(path)

    def training_texts() -> Iterator[str]:
        for number, document in enumerate(corpus.documents()):
            yield from (text for split, text in found.split(document.text) if split == "train")
            if progress:
                progress("Training the tokenizer", number + 1, found.documents)

    tokenizer = Tokenizer.train(training_texts(), vocab_size)
    replace_file(path, tokenizer.to_json())
    return tokenizer


def tokenise(corpus: Corpus, found: Survey, tokenizer: Tokenizer, cache: Path, progress: Progress | None = None) -> TokenData:
    """The corpus as two token streams, from the cache or new.

    Raises:
        StorageError: the cache cannot be written; nothing half-written stays.
    """
    recipe = [_FORMAT, found.fingerprint, found.longest_whole, found.held_out_below, found.train_share, tokenizer.to_json()]
    key = blake3(json.dumps(recipe).encode()).hexdigest()[:32]
    folder = cache / "tokens" / key
    if (data := open_tokens(folder)) is not None:
        return data
    with _new_cache(folder) as temporary:
        _write(temporary, corpus, found, tokenizer, progress)
    written = open_tokens(folder)
    assert written is not None, "the token cache just written does not open"
    return written


def relink_cache(data: TokenData) -> None:
    """Write a cache again that was deleted while it is mapped.

    Raises:
        StorageError: it cannot be written.
    """
    if open_tokens(data.path) is not None:
        return
    with _new_cache(data.path) as temporary:
        for split, stream in (("train", data.train), ("held_out", data.held_out)):
            stream.tokens.tofile(temporary / f"{split}.bin")
            np.save(temporary / f"{split}.documents.npy", stream.document_starts)
        (temporary / "tokens.json").write_text(json.dumps(data.description, indent=2) + "\n")


@contextmanager
def _new_cache(folder: Path) -> Iterator[Path]:
    """A temporary folder to write a cache into; renamed to its name after the block.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as name:
            temporary = Path(name, folder.name)
            temporary.mkdir()
            yield temporary
            try:
                os.replace(temporary, folder)
            except OSError:  # something is there: another process was faster, or the cache is incomplete
                if open_tokens(folder) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(temporary, folder)
    except OSError as error:
        raise storage_error("write the token cache", folder, error) from error


def _write(folder: Path, corpus: Corpus, found: Survey, tokenizer: Tokenizer, progress: Progress | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    starts: dict[Split, list[int]] = {split: [] for split in SPLITS}
    counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    pending: list[tuple[Split, str, bool]] = []  # a split, a piece of text, and whether its document ends there
    pending_characters = 0

    def flush(files: dict[Split, BinaryIO]) -> None:
        encoded = tokenizer.encode_batch([text for _, text, _ in pending])
        for (split, _, ends), ids in zip(pending, encoded, strict=True):
            ids = [*ids, tokenizer.end_of_text] if ends else ids
            files[split].write(np.array(ids, dtype=dtype).tobytes())
            counts[split] += len(ids)
            if ends:
                starts[split].append(counts[split])
        pending.clear()

    with (folder / "train.bin").open("wb") as train, (folder / "held_out.bin").open("wb") as held_out:
        files: dict[Split, BinaryIO] = {"train": train, "held_out": held_out}
        for number, document in enumerate(corpus.documents()):
            for split, text in found.split(document.text):
                pieces = list(_pieces(text))
                for index, piece in enumerate(pieces):
                    pending.append((split, piece, index == len(pieces) - 1))
                    pending_characters += len(piece)
                    if pending_characters >= _CHUNK_CHARACTERS:
                        flush(files)
                        pending_characters = 0
            if progress:
                progress("Tokenising", number + 1, found.documents)
        flush(files)
    for split in SPLITS:
        np.save(folder / f"{split}.documents.npy", np.array([0, *starts[split][:-1]], dtype=np.uint64))
    description = {
        "format": _FORMAT,
        "dtype": dtype.name,
        "tokens": counts,
        "documents": found.documents,
        "vocab_size": tokenizer.vocab_size,
        "corpus": corpus.description,
        "corpus_fingerprint": found.fingerprint,
    }
    (folder / "tokens.json").write_text(json.dumps(description, indent=2) + "\n")


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces, cut at the ends of lines."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        cut = text.rfind("\n", start, start + _CHUNK_CHARACTERS) + 1 or start + _CHUNK_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def open_tokens(folder: Path) -> TokenData | None:
    """The cache in this folder, or None where there is none or it is not whole."""
    try:
        description = json.loads((folder / "tokens.json").read_text())
        streams: dict[Split, TokenStream] = {}
        for split in SPLITS:
            path, count = folder / f"{split}.bin", description["tokens"][split]
            dtype = np.dtype(description["dtype"])
            if path.stat().st_size != count * dtype.itemsize:
                return None
            is_mapped = can_be_mapped(path)
            tokens = np.memmap(path, dtype=dtype, mode="r") if is_mapped else np.fromfile(path, dtype=dtype)
            documents = np.load(folder / f"{split}.documents.npy", mmap_mode="r" if is_mapped else None)
            streams[split] = TokenStream(tokens, documents)
        return TokenData(folder, streams["train"], streams["held_out"], description["documents"], description)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
