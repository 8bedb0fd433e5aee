"""Token files of others, and token folders of our own, as they are: mapped where they lie.

Read are folders that :mod:`.tokenise` wrote; nanoGPT's ``train.bin`` and ``val.bin`` (uint16, no header); and llm.c's shards,
which modded-nanogpt has too (a header of 1,024 bytes, then uint16, or uint32 for Llama 3). A tokens.json in the cache lists the
files and makes a token folder of them, so that whatever opens one opens these.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from onym.data.readers import is_known
from onym.data.remote import local_path
from onym.data.survey import SPLITS, Split
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TOKENIZER, TokenData, new_folder, open_tokens, shards_of, write_description
from onym.errors import DataError

_HEADER_BYTES = 1024
# How llm.c's files begin, with GPT-2's tokens and with Llama 3's.
_MAGIC: dict[int, np.dtype[Any]] = {20240520: np.dtype(np.uint16), 20240801: np.dtype(np.uint32)}
_PROBES, _PROBED = 256, 1 << 14  # blocks of a file by which it is recognised, and bytes of each
_HELD_OUT = re.compile(r"(?<![a-z])(val|valid|validation|held_out)(?![a-z])")


def is_token_data(data: Sequence[str]) -> bool:
    """Whether these paths are token files or folders of them.

    Raises:
        DataError: some are, and some are text.
    """
    are = [bool(_own(entry) or _foreign(entry)) for entry in data]
    for entry in data:
        if not _own(entry) and (files := _foreign(entry)) and (among := _text_among(entry)):
            raise DataError(
                f"'{entry}' holds token files ('{files[0].name}') and text ('{among.name}'): name the ones to train on, as in "
                f"'{files[0].parent / ('*' + among.suffix)}'."
            )
    if any(are) and not all(are):
        text = next(entry for entry, is_tokens in zip(data, are, strict=True) if not is_tokens)
        raise DataError(f"--data names token files, and '{text}', which is text: give them as two sources, with --mix.")
    return bool(are) and all(are)


def tokenizer_of(data: Sequence[str]) -> Tokenizer:
    """The tokenizer that is stored with token files.

    Raises:
        DataError: there is none, or there are two.
    """
    found = _stored_tokenizers(data)
    if not found:
        raise DataError(f"'{data[0]}' holds tokens, and no {TOKENIZER} says of which tokenizer: name it with --tokenizer.")
    if len(found) > 1:
        first, second, *_ = found.values()
        raise DataError(f"'{first}' and '{second}' differ: tokens of two tokenizers cannot be trained on together.")
    return Tokenizer.from_json(next(iter(found)))


def link_tokens(data: Sequence[str], tokenizer: Tokenizer, held_out: float, cache: Path) -> TokenData:
    """Token files as token streams, without a copy.

    Args:
        data: token folders, ``.bin`` files, folders or globs of them.
        tokenizer: that made them.
        held_out: share of the tokens to hold out, at their end, where no file is named as such (``val``).
        cache: where the folder that names them is put.

    Raises:
        DataError: a file is damaged, or its tokens are not this tokenizer's.
    """
    for stored, file in _stored_tokenizers(data).items():
        if stored != tokenizer.to_json():
            raise DataError(
                f"'{file}' made these tokens, and it is not the tokenizer that they would be trained with: leave --tokenizer "
                "and --from away, or tokenise the text itself with that one."
            )
    if len(data) == 1 and _own(data[0]):
        folder = Path(local_path(data[0])).expanduser().resolve()
        if folder.parent == (cache / "tokens").resolve():  # in the cache its name says what is in it
            if (tokens := open_tokens(folder)) is None:
                raise _incomplete(folder)
            return tokens
    shards: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    dtypes = set[str]()
    seen = set[tuple[str, int]]()
    for entry in data:
        for split, shard, dtype in _entries(entry):
            if (place := (str(Path(shard["file"]).resolve()), shard["offset"])) not in seen:  # however often it is named
                seen.add(place)
                shards[split].append(shard)
                dtypes.add(dtype.name)
    if len(dtypes) > 1:
        raise DataError(f"{_named(data)} hold tokens of {' and '.join(sorted(dtypes))}: they are not of one tokenizer.")
    if not shards["held_out"]:
        shards["train"], shards["held_out"] = _cut(shards["train"], held_out, np.dtype(next(iter(dtypes))))
    description = {
        "dtype": next(iter(dtypes)),
        "shards": shards,
        "tokens": {split: sum(shard["tokens"] for shard in shards[split]) for split in SPLITS},
        "documents": 0,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "corpus": _named(data),
    }
    what = [[Path(s["file"]).name, s["offset"], s["tokens"], _probe(s["file"])] for split in SPLITS for s in shards[split]]
    key = blake3(json.dumps([what, tokenizer.to_json()]).encode()).hexdigest()[:32]
    folder = cache / "tokens" / key
    if (tokens := open_tokens(folder)) is None or tokens.description["shards"] != shards:  # or equal files lie elsewhere now
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as temporary:
            (temporary / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
            write_description(temporary, description)
            tokens = open_tokens(temporary)
            assert tokens is not None, "the token folder just written does not open"
            _require_vocabulary(tokens, tokenizer, _named(data))
        tokens = open_tokens(folder)
        assert tokens is not None, "the token folder just written does not open"
    return tokens


def _stored_tokenizers(data: Sequence[str]) -> dict[str, Path]:
    """The tokenizers that lie beside token files, each once, and a file that has it."""
    found: dict[str, Path] = {}
    for entry in data:
        path = Path(local_path(entry)).expanduser()
        file = (path if path.is_dir() else path.parent) / TOKENIZER
        if file.is_file():
            found.setdefault(Tokenizer.load(file).to_json(), file)
    return found


def _own(entry: str) -> bool:
    with suppress(OSError, RuntimeError, ValueError):  # a path that cannot be followed is text's to complain of
        return (Path(local_path(entry)).expanduser() / "tokens.json").is_file()
    return False


def _foreign(entry: str) -> list[Path]:
    return [path for path in _files(entry) if path.suffix == ".bin"]


def _text_among(entry: str) -> Path | None:
    """A file of text that is named together with token files."""
    return next((path for path in _files(entry) if is_known(path.name)), None)


def _files(entry: str) -> list[Path]:
    """The files that a path or a pattern names; of a folder those in it, not below it."""
    with suppress(OSError, RuntimeError, ValueError):
        path = Path(local_path(entry)).expanduser()
        if path.is_dir():
            return sorted(path.iterdir())
        if path.is_file():
            return [path]
        if has_magic(entry):
            return sorted(Path(match) for match in glob(str(path), recursive=True))  # noqa: PTH207
    return []


def _entries(entry: str) -> Iterator[tuple[Split, dict[str, Any], np.dtype[Any]]]:
    """The shards that a path leads to, as tokens.json names them."""
    if not _own(entry):
        for path in _foreign(entry):
            yield "held_out" if _HELD_OUT.search(path.stem) else "train", *_foreign_shard(path.absolute())
        return
    folder = Path(local_path(entry)).expanduser().absolute()
    tokens = open_tokens(folder)
    if tokens is None:
        raise _incomplete(folder)
    for split in SPLITS:
        for shard in shards_of(folder, tokens.description, split):
            starts = str(shard.starts) if shard.starts else None
            about = {"file": str(shard.file), "offset": shard.offset, "tokens": shard.tokens, "starts": starts}
            yield split, about, tokens.train.dtype


def _foreign_shard(path: Path) -> tuple[dict[str, Any], np.dtype[Any]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(12), dtype="<i4") if size >= _HEADER_BYTES else np.zeros(3, dtype="<i4")
    except OSError as error:
        raise DataError(f"The token file '{path}' cannot be read: {error.strerror}.") from error
    dtype: np.dtype[Any] = np.dtype(np.uint16)
    offset, count = 0, size // 2
    if int(header[0]) in _MAGIC:
        dtype, offset, count = _MAGIC[int(header[0])], _HEADER_BYTES, int(header[2])
        if size != offset + count * dtype.itemsize:
            raise DataError(f"The token file '{path}' is cut off: it states {count:,} tokens and has {size - offset:,} bytes.")
    if size % 2 or not count:
        raise DataError(f"The token file '{path}' has {size:,} bytes, which are no 16-bit tokens: it is empty or cut off.")
    return {"file": str(path), "offset": offset, "tokens": count, "starts": None}, dtype


def _cut(
    shards: list[dict[str, Any]], held_out: float, dtype: np.dtype[Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shards to train on, and the last tokens of them to hold out."""
    left = sum(shard["tokens"] for shard in shards)
    left -= min(max(1, int(left * held_out)), left - 1)
    train, rest = [], []
    for shard in shards:
        taken = min(left, shard["tokens"])
        left -= taken
        if taken:
            train.append({**shard, "tokens": taken})
        if taken < shard["tokens"]:
            skipped = {"offset": shard["offset"] + taken * dtype.itemsize, "tokens": shard["tokens"] - taken}
            rest.append({**shard, **skipped})
    return train, rest


def _probe(name: str) -> str:
    """A hash of blocks from all over a file."""
    digest = blake3()
    with Path(name).open("rb") as file:
        size = file.seek(0, 2)
        for start in range(0, size, max(_PROBED, size // _PROBES)):
            file.seek(start)
            digest.update(file.read(_PROBED))
        file.seek(max(0, size - _PROBED))
        digest.update(file.read(_PROBED))
    return digest.hexdigest()[:32]


def _require_vocabulary(tokens: TokenData, tokenizer: Tokenizer, name: str) -> None:
    """Raise a DataError where tokens from all over the streams are not of this tokenizer."""
    for stream in (tokens.train, tokens.held_out):
        for start in range(0, len(stream), max(1 << 12, len(stream) // 256)):
            if len(part := stream.read(start, start + (1 << 12))) and int(part.max()) >= tokenizer.vocab_size:
                raise DataError(
                    f"{name} has the token {int(part.max())}, and the tokenizer has {tokenizer.vocab_size:,}: name with "
                    "--tokenizer the one that made these files."
                )


def _incomplete(folder: Path) -> DataError:
    return DataError(f"The token folder '{folder}' is not complete: name the text itself, and it is tokenised anew.")


def _named(data: Sequence[str]) -> str:
    return ", ".join(f"'{entry}'" for entry in data[:3]) + (", …" if len(data) > 3 else "")
