"""What one pass over a corpus finds: its fingerprint, what is held out of it, and which of its files cannot be read.

Every document belongs to the training stream or to the held-out one as a whole: by a hash of its text, so that copies of a
document stay on one side and new documents do not move the old ones. A document that is longer than all that shall be held out
is split instead: its last part is held out.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from blake3 import blake3

from onym.data.corpus import Corpus, LongDocument, SourceFile, python_documentation
from onym.errors import DataError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of it are done, and how many there are (0 while that is unknown)."""

PIECE = 1 << 20
"""Characters encoded at a time, so that a long document does not need twenty times its size in memory."""
KEPT = 256 << 20
"""Bytes of text that stay in memory, so that a corpus of that size is read once."""
_MOST_HASHES = 4_000_000  # of new documents in memory, until those that are far from being held out are forgotten


class FileSummary(NamedTuple):
    """One file of a corpus."""

    name: str
    bytes: int
    """Of text."""
    documents: int


class _Long(NamedTuple):
    """A document that is not read as a whole."""

    hash: int
    characters: int
    bytes: int


class Piece(NamedTuple):
    """A part of a document, to be encoded by itself."""

    split: Split
    text: bytes
    """UTF-8, not empty."""
    ends: bool
    """Whether its document ends here, or the part of it that is in this split."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus found: enough to split it and to name its caches."""

    corpus: Corpus
    fingerprint: str
    documents: int
    text_bytes: int
    longest_whole: int
    """Bytes of the longest document that is held out or trained on as a whole; a longer one is split."""
    held_out_below: int
    """Documents whose hash is below this are held out."""
    train_share: float
    files: tuple[FileSummary, ...] = ()
    """In order; empty for Python's own documentation."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Files that were left out because they cannot be read, each with the reason."""
    _sources: tuple[SourceFile | None, ...] = field(default=(), repr=False)
    _digests: tuple[bytes, ...] = field(default=(), repr=False)
    """Of each file's documents but long ones."""
    _long: Mapping[str, _Long] = field(default_factory=dict, repr=False)
    _texts: tuple[tuple[bytes, ...], ...] | None = field(default=None, repr=False)
    """Of each file, where all of them are few enough to be kept in memory."""

    def pieces(self, number: int) -> Iterator[Piece]:
        """A file's text in pieces, in order; the files are those of :attr:`files`, Python's own documentation is one."""
        source, all_of_it = self._sources[number], blake3()
        for text in self._texts[number] if self._texts is not None else _texts_of(self.corpus, source):
            if isinstance(text, LongDocument):
                yield from self._pieces_of_long(text)
                continue
            digest = blake3(text).digest()
            all_of_it.update(digest)
            if len(text) <= self.longest_whole:
                split: Split = "held_out" if _hash(digest) < self.held_out_below else "train"
                if len(text) <= PIECE:
                    yield Piece(split, text, ends=True)
                else:
                    yield from _cut(split, iter([text.decode()]))
            else:
                whole = text.decode()
                cut = min(int(len(whole) * self.train_share), len(whole) - 1)
                cut = whole.rfind("\n", cut - len(whole) // 10, cut) + 1 or cut  # at the end of a line where one is near
                yield from _cut("train", iter([whole[:cut]]))
                yield from _cut("held_out", iter([whole[cut:]]))
        if all_of_it.digest() != self._digests[number]:
            raise changed(f"'{source.name}'" if source else self.corpus.description)

    def held_out_texts(self) -> Iterator[str]:
        """The documents that are held out, and the last part of one that is split, in order, each as a whole."""
        parts: list[bytes] = []
        for number in range(self.file_count):
            for piece in self.pieces(number):
                if piece.split == "held_out":
                    parts.append(piece.text)
                    if piece.ends:
                        yield b"".join(parts).decode()
                        parts = []

    @property
    def file_count(self) -> int:
        """Of the numbers that :meth:`pieces` takes."""
        return len(self._sources)

    def _pieces_of_long(self, document: LongDocument) -> Iterator[Piece]:
        known = self._long.get(document.source)
        if known is None:
            raise changed(f"'{document.source}'")
        if known.bytes <= self.longest_whole:
            split: Split = "held_out" if known.hash < self.held_out_below else "train"
            yield from _cut(split, _unchanged(document, known))
            return
        cut = min(int(known.characters * self.train_share), known.characters - 1)
        cut = _after_last_newline(document, cut - known.characters // 10, cut) or cut
        yield from _cut("train", _slice(document.blocks(), 0, cut))
        yield from _cut("held_out", _slice(_unchanged(document, known), cut, known.characters))


def survey(
    corpus: Corpus, held_out: float, progress: Progress | None = None, *, skip_bad_files: bool = False, kept: int = KEPT
) -> Survey:
    """Read the corpus once.

    Args:
        corpus: whose files.
        held_out: share of the text that is not trained on.
        progress: called with bytes of files.
        skip_bad_files: leave out a file that cannot be read, instead of raising.
        kept: bytes of text that may stay in memory.

    Raises:
        DataError: nothing is in it; or a file cannot be read.
    """
    sources: list[SourceFile | None] = [*corpus.files()] if corpus.data else [None]
    total = sum(source.size for source in sources if source)
    seen, done = _Seen(held_out), 0
    texts_of_files: list[tuple[bytes, ...]] | None = []
    read, digests = list[SourceFile | None](), list[bytes]()
    files, skipped = list[FileSummary](), list[tuple[str, str]]()
    for source in sources:
        seen.begin_file()
        documents, text_bytes, texts = seen.documents, seen.text_bytes, list[bytes]()
        size = source.size if source else 0
        try:
            for text in _texts_of(corpus, source):
                if isinstance(text, LongDocument):
                    seen.add_long(text, progress and partial(_tell, progress, done, total))
                    texts_of_files = None
                else:
                    seen.add(text)
                    if texts_of_files is not None:
                        texts.append(text)
                        texts_of_files = texts_of_files if seen.text_bytes <= kept else None
                if progress and not seen.documents % 1000:
                    _tell(progress, done, total, min(seen.text_bytes - text_bytes, size))
        except DataError as error:
            if source is None or len(sources) == 1:
                raise
            if not skip_bad_files:
                raise DataError(f"{error} To leave out what cannot be read: --on-bad-file skip.") from error
            seen.forget_file()
            skipped.append((source.name, str(error)))
        else:
            read.append(source)
            digests.append(seen.file_digest.digest())
            if texts_of_files is not None:
                texts_of_files.append(tuple(texts))
            if source is not None:
                files.append(FileSummary(source.name, seen.text_bytes - text_bytes, seen.documents - documents))
        done += size
    if not seen.documents:
        why = f" ({len(skipped)} of its files cannot be read; the first: {skipped[0][1]})" if skipped else ""
        raise DataError(f"There is no text in {corpus.description}: the corpus is empty{why}. Name other files with --data.")
    longest_whole, below = seen.threshold()
    return Survey(
        corpus, seen.fingerprint, seen.documents, seen.text_bytes, longest_whole, below, 1 - held_out, tuple(files),
        tuple(skipped), tuple(read), tuple(digests), seen.long,
        None if texts_of_files is None else tuple(texts_of_files),
    )  # fmt: skip


def _tell(progress: Progress, before: int, total: int, size: int) -> None:
    progress("Reading the text", before + size, total)


class _Seen:
    """The documents so far."""

    def __init__(self, held_out: float) -> None:
        self.documents = self.text_bytes = 0
        self.long: dict[str, _Long] = {}
        self._held_out = held_out
        self._digest = blake3()
        self._hashes, self._sizes = array("Q"), array("Q")
        self.begin_file()
        self._forgotten_from: int | None = None
        """Documents with this hash or a higher one may have been forgotten."""

    def begin_file(self) -> None:
        """What is added from here on is of a file that may turn out to be bad."""
        self._before = self.documents, self.text_bytes, self._digest.copy()
        self._file_starts, self._file_long = len(self._hashes), list[str]()
        self.file_digest = blake3()

    def forget_file(self) -> None:
        """It is bad: as if it had not been read."""
        self.documents, self.text_bytes, self._digest = self._before
        del self._hashes[self._file_starts :], self._sizes[self._file_starts :]
        for source in self._file_long:
            del self.long[source]

    @property
    def fingerprint(self) -> str:
        """Of all the text, in order."""
        return self._digest.hexdigest()

    def add(self, text: bytes) -> None:
        """A document, UTF-8."""
        digest = blake3(text).digest()
        self.file_digest.update(digest)
        self._add(digest, len(text))

    def add_long(self, document: LongDocument, tell: Callable[[int], None] | None) -> None:
        """A document that is read in blocks."""
        digest, characters, size = blake3(), 0, 0
        for block in document.blocks():
            raw = block.encode()
            digest.update(raw)
            characters, size = characters + len(block), size + len(raw)
            if tell:
                tell(size)
        self._add(digest.digest(), size)
        self._file_long.append(document.source)
        self.long[document.source] = _Long(_hash(digest.digest()), characters, size)

    def _add(self, digest: bytes, size: int) -> None:
        self._digest.update(digest)
        self._hashes.append(_hash(digest))
        self._sizes.append(size)
        self.documents += 1
        self.text_bytes += size
        if self.documents % _MOST_HASHES == 0:
            self._forget()

    def _forget(self) -> None:
        """Of millions of documents those to hold out are found among the ones with the lowest hashes."""
        bound = int(1.5 * self._held_out * 2**64)
        if bound < 1 << 64:
            self._forgotten_from = bound
            hashes, sizes = np.array(self._hashes), np.array(self._sizes)
            kept = (hashes < np.uint64(bound)) | (sizes > int(self._held_out * self.text_bytes))  # the longest may be split
            self._file_starts = int(kept[: self._file_starts].sum())
            self._hashes, self._sizes = array("Q", hashes[kept].tobytes()), array("Q", sizes[kept].tobytes())

    def threshold(self) -> tuple[int, int]:
        """Bytes of the longest document that is not split, and the hash below which a document is held out."""
        hashes, sizes = np.array(self._hashes), np.array(self._sizes)
        longest_whole = int(self._held_out * self.text_bytes)
        whole = sizes <= longest_whole
        wanted = self._held_out * (self.text_bytes - int(sizes[~whole].sum()))
        if self._forgotten_from is not None:
            whole &= hashes < np.uint64(self._forgotten_from)
        hashes, sizes = hashes[whole], sizes[whole]
        order = np.lexsort((sizes, hashes))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = hashes[order][before < wanted]
        return longest_whole, int(chosen[-1]) + 1 if len(chosen) else 0


def changed(source: str) -> DataError:
    """What to raise where a second reading finds other text than the first."""
    return DataError(f"{source} changed while the text was read: run the same command again when it is complete.")


def _unchanged(document: LongDocument, known: _Long) -> Iterator[str]:
    """A document's blocks.

    Raises:
        DataError: behind the last one: they are not those of the first reading.
    """
    digest = blake3()
    for block in document.blocks():
        digest.update(block.encode())
        yield block
    if _hash(digest.digest()) != known.hash:
        raise changed(f"'{document.source}'")


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _texts_of(corpus: Corpus, source: SourceFile | None) -> Iterator[bytes | LongDocument]:
    documents = python_documentation() if source is None else corpus.read(source)
    for document in documents:
        yield document if isinstance(document, LongDocument) else document.text.encode()


def _cut(split: Split, blocks: Iterator[str]) -> Iterator[Piece]:
    """A text in pieces, cut at the ends of lines, wherever its blocks end."""
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while len(text) - start > PIECE:
            cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
            yield Piece(split, text[start:cut].encode(), ends=False)
            start = cut
    if text[start:]:
        yield Piece(split, text[start:].encode(), ends=True)


def _slice(blocks: Iterator[str], start: int, stop: int) -> Iterator[str]:
    """The characters from ``start`` to ``stop``."""
    position = 0
    for block in blocks:
        part = block[max(0, start - position) : max(0, stop - position)]
        position += len(block)
        if part:
            yield part
        if position > stop:
            return


def _after_last_newline(document: LongDocument, start: int, stop: int) -> int:
    """Where the last line that ends between two characters ends; 0 where none does."""
    found = position = 0
    for block in _slice(document.blocks(), start, stop):
        if newline := block.rfind("\n") + 1:
            found = start + position + newline
        position += len(block)
    return found
