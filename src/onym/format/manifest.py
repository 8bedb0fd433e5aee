"""The on-disk format: the files of a model folder or checkpoint, and its manifest. See docs/format.md.

A manifest contains the hash of its own text, not of its values: programs in other languages print numbers and accents
differently. The text ends with the hash, which is computed with zeros in its place.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from onym.errors import CheckpointError
from onym.format.hashing import NO_HASH, TensorHash
from onym.storage.paths import storage_of

FORMAT = "onym-checkpoint"
VERSION = 1

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
"""What peft calls the file of adapters alone; in a folder of adapters it is in the place of ``MODEL``."""
OPTIMIZER = "optimizer.safetensors"
TRAINER_TENSORS = "trainer.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TRAINER = "trainer.json"

# A single .safetensors file has the same in its header, in one string under this key.
HEADER_KEY = "onym"

# Limits of a text that is parsed before anything in it can be checked. Half a million tensors need about 100 MB.
MOST_JSON_BYTES = 256 << 20
MOST_JSON_VALUES = 5_000_000

_SELF_HASH = re.compile(r'"blake3": ?"([0-9a-f]{64})"\s*\}\s*\Z')


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file beside the manifest.

    ``blake3`` is the hash of its first ``hashed`` bytes: of all bytes, or of the header of a tensor file, because each of its
    tensors has a hash of its own. So every byte is hashed once.
    """

    bytes: int
    blake3: str
    hashed: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor, and the expected hash of its bytes."""

    dtype: str
    shape: list[int]
    blake3: str
    aliases: list[str] = field(default_factory=list)
    blocks: str = ""
    """Of one that is larger than a block, the hashes of its blocks; see :mod:`onym.format.hashing`."""

    @property
    def hash(self) -> TensorHash:
        """The expected hash of its bytes."""
        return TensorHash(self.blake3, self.blocks)


def identity_of(tensors: Mapping[str, TensorEntry]) -> str:
    """Equal for equal names, dtypes, shapes and bytes, in any files and in any order.

    BLAKE3, in hexadecimal, of one line for each name, further names of tied tensors included, in the order of their UTF-8
    bytes: ``<bytes of the name> <name> <dtype> <shape, as 2,3> <blake3>\\n``.
    """
    lines = []
    for name, entry in tensors.items():
        facts = f"{entry.dtype} {','.join(map(str, entry.shape))} {entry.blake3}\n".encode(errors="surrogatepass")
        for each in (name, *entry.aliases):
            encoded = each.encode(errors="surrogatepass")
            lines.append((encoded, b"%d %b %b" % (len(encoded), encoded, facts)))
    return blake3(b"".join(line for _, line in sorted(lines))).hexdigest()


def main_file(files: Collection[str]) -> str:
    """Which of a folder's tensor files are the model's, or the adapters'."""
    return ADAPTER if ADAPTER in files and MODEL not in files else MODEL


@contextmanager
def gc_paused() -> Iterator[None]:
    """For making many long-lived objects: Python would search all of them for cycles, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def sealed(text: str) -> str:
    """A JSON text that ends in ``"blake3": "000…"}``, with its hash in place of the zeros."""
    before, zeros, after = text.rpartition(NO_HASH)
    assert zeros
    assert _SELF_HASH.search(text)
    return before + blake3(text.encode()).hexdigest() + after


def require_seal(text: str, what: str) -> None:
    """Check a text that :func:`sealed` made.

    Raises:
        CheckpointError: it is not as it was written.
    """
    seal = _SELF_HASH.search(text)
    if seal is None:
        raise CheckpointError(f"{what} is damaged: its end is missing.")
    start, end = seal.span(1)
    if blake3((text[:start] + NO_HASH + text[end:]).encode()).hexdigest() != seal.group(1):
        raise CheckpointError(f"{what} is damaged: its content is not what was written.")


def require_bounded_json(text: str | bytes, what: str, most: int | None = None) -> None:
    """Refuse a text that is too large to be parsed: when it is read, and when it is written.

    Raises:
        CheckpointError: it has too many bytes, or too many values.
    """
    if len(text) > MOST_JSON_BYTES:
        raise CheckpointError(f"{what} has {len(text):,} bytes; up to {MOST_JSON_BYTES:,} are read.")
    most = most or MOST_JSON_VALUES
    values = sum(map(text.count, (b",", b"[", b"{"))) if isinstance(text, bytes) else sum(map(text.count, ",[{"))
    if values > most:  # each value is one or more of these
        raise CheckpointError(f"{what} holds more than {most:,} values, which are not read.")


def parse_json(
    text: str | bytes, what: str, check: Callable[[dict[str, Any]], None] | None = None, most_values: int | None = None
) -> Any:
    """JSON from an untrusted file: bounded in size, without duplicate names.

    Args:
        text: the JSON.
        what: it is, for messages.
        check: called with each object, the inner ones first, to refuse it before all is parsed.
        most_values: another limit than ``MOST_JSON_VALUES``.

    Raises:
        CheckpointError: it is no JSON, too large, or names something twice.
    """
    try:
        decoded = text.decode() if isinstance(text, bytes) and len(text) <= MOST_JSON_BYTES else text
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is damaged: it is no UTF-8.") from error
    require_bounded_json(decoded, what, most_values)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise CheckpointError(f"{what} is damaged: it names something twice.")
        if check is not None:
            check(values)
        return values

    try:
        return json.loads(decoded, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is damaged: it is no JSON ({type(error).__name__}).") from error


@contextmanager
def malformed_is_damaged(what: str) -> Iterator[None]:
    """Raise CheckpointError for whatever JSON of another structure makes Python raise."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{what} is damaged ({type(error).__name__}: {error}).") from error


@dataclass(frozen=True)
class Manifest:
    """The content of a folder. A folder without a manifest is not a checkpoint."""

    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]
    """By file, then by canonical name."""
    architecture: str | None = None
    """The name that the model class is registered under, if it is."""
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    """When, where and with which versions it was written, and the checkpoint that it continues."""
    identity: str = ""
    """Of the model's tensors; see :func:`identity_of`."""

    def to_json(self) -> str:
        """The text of a ``manifest.json``, one tensor a line."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "identity": self.identity,
            "architecture": self.architecture,
            "metrics": {name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()},
            "provenance": self.provenance,
        }
        tensors = {
            file: _block((name, _values(entry)) for name, entry in entries.items()) for file, entries in self.tensors.items()
        }
        files = _block((name, asdict(entry)) for name, entry in self.files.items())
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
        lines += [f'"files": {files}', f'"tensors": {_block_of_texts(tensors)}', f'"blake3": "{NO_HASH}"']
        return sealed("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: there is none, or it is not as it was written.
        """
        path = folder / MANIFEST
        try:
            content = storage_of(path).read_all(path, MOST_JSON_BYTES)
        except OSError as error:
            raise CheckpointError(f"The manifest '{path}' cannot be read: {error}.") from error
        if content is None:
            raise CheckpointError(
                f"The folder '{folder}' holds no {MANIFEST}: it is no checkpoint, or its writing was never completed."
            )
        return cls.from_json(content.decode(errors="replace"), str(path))

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read what :meth:`to_json` wrote. Unknown fields are ignored.

        Raises:
            CheckpointError: it is no manifest, or one of a later version.
        """
        what = f"The manifest '{source}'"
        values = parse_json(text, what)
        with malformed_is_damaged(what):
            if values["format"] != FORMAT:
                raise CheckpointError(f"'{source}' is not the manifest of an Onym checkpoint.")
            _require_version(values["version"], what)
            require_seal(text, what)
            return cls(
                files={name: _file_entry(entry) for name, entry in values["files"].items()},
                tensors={
                    file: {name: _tensor_entry(entry) for name, entry in tensors.items()}
                    for file, tensors in values["tensors"].items()
                },
                architecture=_optional(values["architecture"], str),
                step=_optional(values["step"], int),
                metrics={str(name): float(value) for name, value in values["metrics"].items()},
                provenance=dict(values["provenance"]),
                identity=str(values["identity"]),
            )


@dataclass(frozen=True)
class Header:
    """What Onym writes into the header of a single .safetensors file, so that it is checked and describes itself."""

    tensors: dict[str, TensorEntry]
    architecture: str | None = None
    config: Mapping[str, Any] | None = None
    identity: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The string under ``HEADER_KEY``. Its length does not depend on the hashes in it."""
        values = {
            "version": VERSION,
            "identity": self.identity,
            "architecture": self.architecture,
            "config": self.config,
            "provenance": self.provenance,
            "tensors": {name: _values(entry) for name, entry in self.tensors.items()},
            "blake3": NO_HASH,
        }
        return sealed(json.dumps(values))

    @classmethod
    def from_json(cls, text: str, source: str) -> Header:
        """Read what :meth:`to_json` wrote."""
        what = f"What Onym wrote into the header of '{source}'"
        values = parse_json(text, what)
        with malformed_is_damaged(what):
            _require_version(values["version"], what)
            require_seal(text, what)
            tensors = {name: _tensor_entry(entry) for name, entry in values["tensors"].items()}
            architecture, config = _optional(values["architecture"], str), _optional(values["config"], dict)
            return cls(tensors, architecture, config, str(values["identity"]), dict(values["provenance"]))


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_file_name(name: Any) -> bool:
    """Whether it names a file in a folder, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0") and name.isprintable()


def _require_version(version: Any, what: str) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{what} is damaged: its version is {version!r}.")
    if version > VERSION:
        raise CheckpointError(
            f"{what} has format version {version}, this Onym reads up to {VERSION}: pip install --upgrade onym."
        )


def _file_entry(values: Mapping[str, Any]) -> FileEntry:
    entry = FileEntry(values["bytes"], values["blake3"], values["hashed"])
    if not (are_counts((entry.bytes, entry.hashed)) and entry.hashed <= entry.bytes and type(entry.blake3) is str):
        raise ValueError(f"a file entry says {dict(values)}")
    return entry


def _tensor_entry(values: Mapping[str, Any]) -> TensorEntry:
    entry = TensorEntry(values["dtype"], values["shape"], values["blake3"], values.get("aliases", []), values.get("blocks", ""))
    texts = type(entry.dtype) is str and type(entry.blake3) is str and type(entry.aliases) is list
    texts = texts and (not entry.aliases or all(type(alias) is str for alias in entry.aliases))
    if not (texts and type(entry.blocks) is str and type(entry.shape) is list and are_counts(entry.shape)):
        raise ValueError(f"a tensor entry says {str(dict(values))[:200]}")
    if entry.blocks and not entry.hash.agrees:
        raise ValueError("the hashes of a tensor's blocks have another hash")
    return entry


def are_counts(values: Iterable[Any]) -> bool:
    """Whether each is a whole number that a file's size or a shape can be."""
    for value in values:  # noqa: SIM110  # all() of a generator takes three times as long
        if type(value) is not int or not 0 <= value < 2**63:
            return False
    return True


def _optional(value: Any, kind: type) -> Any:
    if value is not None and type(value) is not kind:
        raise ValueError(f"a {kind.__name__} was expected, not {value!r}")
    return value


def _values(entry: TensorEntry) -> dict[str, Any]:
    values: dict[str, Any] = {"dtype": entry.dtype, "shape": entry.shape, "blake3": entry.blake3}
    if entry.blocks:
        values["blocks"] = entry.blocks
    return {**values, "aliases": entry.aliases} if entry.aliases else values


def _block(items: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    return _block_of_texts({name: json.dumps(values) for name, values in items})


def _block_of_texts(items: Mapping[str, str]) -> str:
    if not items:
        return "{}"
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in items.items()) + "\n}"
