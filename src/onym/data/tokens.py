"""Tokenised text on disk, mapped into memory.

    <cache>/tokens/<key>/train-00000.bin  held_out-00000.bin …    token ids, uint16 or uint32, in shards
                         train-00000.documents.npy …              uint64, where in the shard documents start
                         files.jsonl                              a line a file: its name, bytes, documents, tokens
                         tokenizer.json                           whose tokens they are
                         tokens.json                              what made them, and how many there are; written last

A folder is there as a whole or not at all: :mod:`.tokenise` writes it beside its place and renames it. Deleting it costs the
time to tokenise again and nothing else. Folders of format 1, where a stream is one file (``train.bin``), are read as well.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onym.data.survey import SPLITS, Split
from onym.errors import storage_error
from onym.storage.local import can_be_mapped
from onym.storage.lock import lock

Tokens = NDArray[np.unsignedinteger[Any]]
"""Token ids, uint16 or uint32."""

TOKENIZER = "tokenizer.json"
USED = ".used"
"""Its time says when a folder was last opened; it is locked, shared, while a process has the folder open."""
FORMAT = 2


@dataclass(frozen=True)
class TokenStream:
    """One split: token ids on disk, mapped.

    Args:
        shards: in order, uint16 or uint32.
        document_shards: of each shard, uint64: where in it the documents start that start there; None where it is not known.
        end_of_text: the token that ends a document, for those that are not known.
    """

    shards: tuple[Tokens, ...]
    document_shards: tuple[NDArray[np.uint64] | None, ...]
    end_of_text: int | None = None

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, start: int, stop: int) -> Tokens:
        """The tokens from ``start`` to ``stop``, fewer where the stream ends before.

        Returns:
            uint16 or uint32 [tokens], a view where one shard has all of them.
        """
        stop = min(stop, len(self))
        shard = int(np.searchsorted(self._bounds, start, side="right")) - 1
        parts = []
        while start < stop:
            first, end = int(self._bounds[shard]), int(self._bounds[shard + 1])
            parts.append(self.shards[shard][start - first : min(stop, end) - first])
            start, shard = min(stop, end), shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 or uint32."""
        return self.shards[0].dtype if self.shards else np.dtype(np.uint16)

    @cached_property
    def document_starts(self) -> NDArray[np.uint64]:
        """Where in the stream each document starts, uint64 [documents]."""
        known = zip(self.shards, self.document_shards, self._bounds[:-1], strict=True)
        parts = [(self._found(shard) if starts is None else starts) + bound for shard, starts, bound in known]
        starts = np.concatenate([np.zeros(1 if len(self) else 0, dtype=np.uint64), *parts])
        return np.unique(starts[starts < len(self)])

    def _found(self, shard: Tokens) -> NDArray[np.uint64]:
        """Where documents start in a file of somebody else's: at its beginning, and behind each end of one."""
        ends = np.flatnonzero(shard == self.end_of_text).astype(np.uint64) + np.uint64(1)
        return np.concatenate([np.zeros(1, dtype=np.uint64), ends])

    @cached_property
    def _bounds(self) -> NDArray[np.uint64]:
        return np.cumsum([0, *(len(shard) for shard in self.shards)], dtype=np.uint64)


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus, and the folder it is in."""

    path: Path
    train: TokenStream
    held_out: TokenStream
    documents: int
    description: Mapping[str, Any] = field(default_factory=dict)
    """What tokens.json says."""


def open_tokens(folder: Path) -> TokenData | None:
    """The tokens in this folder, or None where there are none or they are not whole.

    They are in use, and :mod:`.cache` does not delete them, as long as what is returned lives.
    """
    try:
        description = json.loads((folder / "tokens.json").read_text())
        streams: dict[Split, TokenStream] = {}
        folders = {folder}
        for split in SPLITS:
            shards: list[Tokens] = []
            starts: list[NDArray[np.uint64] | None] = []
            dtype = np.dtype(description["dtype"])
            for shard in shards_of(folder, description, split):
                size, end = shard.file.stat().st_size, shard.offset + shard.tokens * dtype.itemsize
                if size < end or (size != end and shard.file.parent == folder):
                    return None
                folders.add(shard.file.parent)
                if is_mapped := can_be_mapped(shard.file):
                    shards.append(np.memmap(shard.file, dtype, "r", shard.offset, (shard.tokens,)))
                else:
                    shards.append(np.fromfile(shard.file, dtype, shard.tokens, offset=shard.offset))
                starts.append(np.load(shard.starts, mmap_mode="r" if is_mapped else None) if shard.starts else None)
            streams[split] = TokenStream(tuple(shards), tuple(starts), description.get("end_of_text"))
        data = TokenData(folder, streams["train"], streams["held_out"], description["documents"], description)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for used in folders:
        with suppress(OSError):  # a folder of somebody else's, or a file system without locks
            if used == folder or (used / "tokens.json").exists():
                (used / USED).touch()
                if (descriptor := lock(used / USED, os.O_RDWR, shared=True)) is not None:
                    weakref.finalize(data, os.close, descriptor)
    return data


class Shard(NamedTuple):
    """A part of a stream, in a file."""

    file: Path
    offset: int
    """Bytes before the first token."""
    tokens: int
    starts: Path | None
    """The file that says where documents start."""


def shards_of(folder: Path, description: Mapping[str, Any], split: Split) -> list[Shard]:
    """A stream's shards; those that lie elsewhere are named in tokens.json with their files."""
    if description["format"] == 1:
        return [Shard(folder / f"{split}.bin", 0, description["tokens"][split], folder / f"{split}.documents.npy")]
    shards = []
    for number, shard in enumerate(description["shards"][split]):
        if isinstance(shard, int):
            name = shard_name(split, number)
            shards.append(Shard(folder / f"{name}.bin", 0, shard, folder / f"{name}.documents.npy"))
        else:
            starts = Path(shard["starts"]) if shard["starts"] else None
            shards.append(Shard(Path(shard["file"]), shard["offset"], shard["tokens"], starts))
    return shards


def shard_name(split: Split, number: int) -> str:
    """Of its files, without their suffixes."""
    return f"{split}-{number:05}"


def write_shard(folder: Path, name: str, tokens: Tokens, document_starts: NDArray[np.uint64]) -> None:
    """Write a shard's two files."""
    starts = io.BytesIO()
    np.save(starts, document_starts)
    for suffix, content in (("documents.npy", starts.getbuffer()), ("bin", np.ascontiguousarray(tokens).data)):
        with (folder / f"{name}.{suffix}").open("wb") as file:
            file.write(content)  # NumPy's own writing does not say why it failed
            file.flush()
            os.fsync(file.fileno())  # a file of the right size is taken to be right


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write tokens.json, the last file."""
    (folder / "tokens.json").write_text(json.dumps({"format": FORMAT, **description}, indent=2) + "\n")


def relink_cache(data: TokenData, tokenizer_json: str) -> None:
    """Write tokens again that were deleted while they are mapped.

    Raises:
        StorageError: they cannot be written.
    """
    if open_tokens(data.path) is not None:
        return
    with new_folder(data.path) as temporary:
        for split, stream in (("train", data.train), ("held_out", data.held_out)):
            shards = shards_of(data.path, data.description, split)  # type: ignore[arg-type]
            for shard, tokens, starts in zip(shards, stream.shards, stream.document_shards, strict=True):
                if starts is not None and shard.file.parent == data.path:
                    write_shard(temporary, shard.file.stem, tokens, starts)
        (temporary / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        write_description(temporary, data.description)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write tokens into; renamed to its name after the block.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as name:
            temporary = Path(name, folder.name)
            temporary.mkdir()
            yield temporary
            put_in_place(temporary, folder)
    except OSError as error:
        raise storage_error("write the token cache", folder, error) from error


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a folder that is complete to its name, where another process may have put the same."""
    try:
        os.replace(temporary, folder)
    except OSError:  # something is there: another process was faster, or what is there is incomplete
        if open_tokens(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
