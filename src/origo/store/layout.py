"""The on-disk format: which files a model folder or checkpoint holds, and what its manifest says. See docs/format.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from blake3 import blake3

from origo.errors import CheckpointError

FORMAT = "origo-checkpoint"
VERSION = 1

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER_TENSORS = "trainer.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TRAINER = "trainer.json"

# A single .safetensors file says the same in its header, in one string under this key.
HEADER_KEY = "origo"


@dataclass(frozen=True)
class FileEntry:
    """One file beside the manifest."""

    bytes: int
    blake3: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: where it is, what it is, and what its bytes must hash to."""

    file: str
    dtype: str
    shape: list[int]
    blake3: str
    aliases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor of a single file; the format's own header says where it is."""

    dtype: str
    shape: list[int]
    blake3: str


def hash_of(values: Mapping[str, Any]) -> str:
    """BLAKE3 of JSON values, in hexadecimal: of their text with sorted keys and without white space."""
    return blake3(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _require_whole(values: dict[str, Any], what: str) -> None:
    """Check the version of some JSON values and take their hash out of them, checked."""
    if values["version"] > VERSION:
        raise CheckpointError(
            f"{what} has format version {values['version']}, this Origo reads up to {VERSION}: pip install --upgrade origo."
        )
    if values.pop("blake3") != hash_of(values):
        raise CheckpointError(f"{what} is damaged: its content is not what was written.")


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. A folder without one is not a checkpoint."""

    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]
    """By file, then by canonical name."""
    architecture: str | None = None
    """The name under which the model class is registered, where it is."""
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    """When, where and with which versions it was written."""

    def to_json(self) -> str:
        """The text of a ``manifest.json``."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**values, "blake3": hash_of(values)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: it is no manifest, or one of a later version.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise CheckpointError(f"'{source}' is not the manifest of an Origo checkpoint.")
            _require_whole(values, f"The manifest '{source}'")
            return cls(
                files={name: FileEntry(**entry) for name, entry in values["files"].items()},
                tensors={
                    file: {name: TensorEntry(**entry) for name, entry in tensors.items()}
                    for file, tensors in values["tensors"].items()
                },
                architecture=values["architecture"],
                step=values["step"],
                metrics=values["metrics"],
                provenance=values["provenance"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"The manifest '{source}' is damaged ({type(error).__name__}: {error}).") from error


@dataclass(frozen=True)
class Header:
    """What Origo writes into the header of a single .safetensors file, so that it is checked and describes itself."""

    tensors: dict[str, HeaderTensor]
    architecture: str | None = None
    config: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """The string under ``HEADER_KEY``."""
        values = {"version": VERSION, **asdict(self)}
        return json.dumps({**values, "blake3": hash_of(values)})

    @classmethod
    def from_json(cls, text: str, source: str) -> Header:
        """Read what :meth:`to_json` wrote."""
        try:
            values = json.loads(text)
            _require_whole(values, f"What Origo wrote into the header of '{source}'")
            tensors = {name: HeaderTensor(**entry) for name, entry in values["tensors"].items()}
            return cls(tensors, values["architecture"], values["config"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"The header that Origo wrote into '{source}' is damaged ({error}).") from error
