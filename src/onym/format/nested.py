"""Any nested state in one file: a .safetensors file whose only value is the structure, with the tensors in it beside it.

The same place for the structure as that of a module's extra state, under the name ``state``: other readers see the tensors as
``state.model.first.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onym.errors import CheckpointError
from onym.format.extra_state import WithValues, extra_metadata
from onym.format.reader import Checkpoint, read_checkpoint
from onym.format.stored import gather
from onym.format.writer import write_stored
from onym.state.tree import flatten

_STATE = "state"


def write_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays and plain values, durably.

    Raises:
        CheckpointError: something else is in it; says where and what.
    """
    tensors, structure = flatten(state, _STATE if isinstance(state, Mapping | list | tuple) else f"{_STATE}.value")
    stored = gather(tensors)
    write_stored(path, replace(stored, metadata=extra_metadata({_STATE: structure}, tensors)))


def read_state(path: Path, *, verify: bool = True) -> Any:
    """What :func:`write_state` was given.

    Raises:
        CheckpointError: it is another file, or damaged.
    """
    checkpoint = read_checkpoint(path)
    if not is_state(checkpoint):
        raise CheckpointError(f"'{path}' is no file of onym.save_state: onym.load(path, into=model) loads a model from others.")
    return checkpoint.model.tensor(_STATE, verify=verify)


def is_state(checkpoint: Checkpoint) -> bool:
    """Whether :func:`write_state` wrote it."""
    return isinstance(checkpoint.model, WithValues) and list(checkpoint.model.names) == [_STATE]


def structure_of(checkpoint: Checkpoint) -> Any:
    """The structure of a state as JSON values."""
    assert isinstance(checkpoint.model, WithValues)
    return checkpoint.model.structures[_STATE]
