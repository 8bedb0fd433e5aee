"""Files in: the documents of one file, by what its name ends with.

A text file is one document; JSON lines are one a line; a table (tables.py) has one a row. Text and JSON lines may be
compressed. Memory does not grow with a file: lines and rows are read as they are asked for, and a text file of more than
``LONG_TEXT`` bytes is a document that is read in blocks. Whatever is wrong with a file is a DataError that names it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from onym.data.tables import TABLES, read_table
from onym.errors import DataError

TEXTS = (".txt", ".md", ".py", ".jsonl")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*TEXTS, *TABLES)  # what a folder is searched for, with those of TEXTS compressed too

LONG_TEXT = 64_000_000
"""Bytes from which on a text file is read in blocks."""
BLOCK = 8 << 20
"""Bytes of a block."""
MAX_LINE = 1 << 30
"""Bytes of the longest line of JSON lines: a line must be parsed as a whole."""


class Document(NamedTuple):
    """A piece of text that stands on its own, and where it came from."""

    source: str
    text: str


@dataclass(frozen=True)
class LongDocument:
    """A text file that is too long to be held in memory."""

    source: str
    path: Path

    def blocks(self) -> Iterator[str]:
        """The text in order, in blocks of ``BLOCK`` bytes or somewhat less; each call reads the file anew.

        Raises:
            DataError: the file cannot be read, or is no text. Blocks before the place where it is wrong were yielded by then.
        """
        with open_bytes(self.path, self.source) as file:
            yield from _decode_blocks(file, self.source)


def is_known(name: str, further: tuple[str, ...] = ()) -> bool:
    """Whether a folder is searched for files of this name; ``further``: suffixes of other text files."""
    if name.endswith(COMPRESSED):
        # .json too: many published data sets are JSON lines under that name. Without compression it is mostly something else.
        return name.rpartition(".")[0].endswith((*TEXTS, ".json", *further))
    return name.endswith((*SUFFIXES, *further))


def read_file(path: Path, source: str, text_field: str = "text") -> Iterator[Document | LongDocument]:
    """The documents of one file, those without text left out; a file whose suffix is not known is taken as plain text.

    Args:
        path: the file, on this machine.
        source: what messages and documents call it: its path, or the address that it was fetched from.
        text_field: the field of a JSON line, or the column of a table, that holds the text.

    Raises:
        DataError: it is not what its name says. Documents before the place where it is wrong were yielded by then.
    """
    name = path.stem if path.suffix in COMPRESSED else path.name
    documents: Iterator[Document]
    if path.suffix in TABLES:
        documents = (Document(f"{source}:{row}", text) for row, text in read_table(path, source, text_field))
    elif name.endswith(".jsonl") or (name.endswith(".json") and path.suffix in COMPRESSED):
        documents = _read_lines(path, source, text_field)
    else:
        yield from _read_text(path, source)
        return
    yield from (document for document in documents if not is_blank(document.text))


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text or text.isspace()


@contextmanager
def open_bytes(path: Path, source: str) -> Iterator[BinaryIO]:
    """A file to read from its beginning, decompressed.

    Raises:
        DataError: it cannot be read, or its compression is damaged.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".gz":
                # GzipFile's own lines are found by Python code, a BufferedReader's by C.
                yield io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file)), 1 << 18)
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdStream(file, source), 1 << 18)
            else:
                yield file
    except EOFError as error:
        raise DataError(f"'{source}' is truncated: its compressed data ends too soon. Copy or fetch it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(_damaged(source, ".gz", error)) from error
    except OSError as error:
        raise DataError(f"The file '{source}' cannot be read: {error.strerror or error}.") from error


def _damaged(source: str, suffix: str, error: Exception) -> str:
    return f"'{source}' is not a readable {suffix} file: {error}. Copy or fetch it again, or leave it out of --data."


class _ZstdStream(io.RawIOBase):
    """Decompressed frames of zstd, one after another. The package's own reader takes a truncated file for a complete one."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"Reading '{source}' needs zstandard: pip install 'onym[zstd]'.") from error
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as zstd --long=31 writes
        self._file, self._source = file, source
        self._frame: Any = None
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            # Little at a time: a byte of a frame may stand for 30,000 of the text.
            self._compressed = self._compressed or self._file.read(1 << 14)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._decompressed = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise DataError(_damaged(self._source, ".zst", error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count


def _read_text(path: Path, source: str) -> Iterator[Document | LongDocument]:
    with open_bytes(path, source) as file:
        raw: bytes | bytearray
        if path.suffix not in COMPRESSED:
            is_long = os.fstat(file.fileno()).st_size > LONG_TEXT
            raw = b"" if is_long else file.read()
        else:  # how long it is shows when it is read
            raw = bytearray()
            while len(raw) <= LONG_TEXT and (block := file.read(BLOCK)):
                raw += block
            is_long = len(raw) > LONG_TEXT
    if is_long:
        del raw
        document = LongDocument(source, path)
        if not all(is_blank(block) for block in document.blocks()):
            yield document
    elif not is_blank(text := decode(raw, source)):
        yield Document(source, text)


def decode(raw: bytes | bytearray, source: str) -> str:
    """UTF-8 text, its byte order mark left out.

    Raises:
        DataError: it is none.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(source, error) from error
    _require_no_nul(text, source)
    return text.removeprefix("\ufeff")


def _decode_blocks(file: BinaryIO, source: str) -> Iterator[str]:
    pending, offset = b"", 0  # bytes of a character that goes on in the next block; where they are in the file
    is_last = False
    while not is_last:
        block = file.read(BLOCK)
        is_last = not block
        raw = pending + block
        try:
            text, used = codecs.utf_8_decode(raw, "strict", is_last)
        except UnicodeDecodeError as error:
            raise _not_utf8(source, error, offset) from error
        _require_no_nul(text, source)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        pending, offset = raw[used:], offset + used
        if text:
            yield text


def _not_utf8(source: str, error: UnicodeDecodeError, offset: int = 0) -> DataError:
    return DataError(
        f"'{source}' is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {offset + error.start:,}. "
        "Leave it out of --data, or convert it, as with: iconv -f latin1 -t utf-8."
    )


def _require_no_nul(text: str, source: str) -> None:
    if "\0" in text:
        raise DataError(f"'{source}' looks like a binary file (it has a NUL byte): leave it out of --data.")


def _require_text(text: str, source: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"'{source}' has half of a surrogate pair at character {error.start:,}: that is no text.") from error


def _read_lines(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with open_bytes(path, name) as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            source = f"{name}:{number}"
            if len(raw) > MAX_LINE:
                raise DataError(f"'{source}' is a line of more than {MAX_LINE:,} bytes: '{name}' is not JSON lines.")
            if not (line := decode(raw, source).strip()):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"'{source}' is not a JSON object: {error}.") from error
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                fields = ", ".join(row) if isinstance(row, dict) else "none"
                raise DataError(
                    f"'{source}' has no text in a field {text_field!r} (its fields: {fields}): "
                    "name the field that holds the text with --text-field."
                )
            _require_text(row[text_field], source)
            yield Document(source, row[text_field])
