"""Adapters in a file and the base that they need -> one model.

A checkpoint of adapters records its base by path and identity; the base is opened from there, and has to be the same. What
comes of both is a checkpoint like any other, whose tensors are merged when they are asked for: ``load_model``, ``generate``,
``convert`` and the rest need to know nothing of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from onym.adapters import peft_files
from onym.adapters.layer import A, B, merged
from onym.adapters.lora import LoRA
from onym.adapters.opening import stored_adapter
from onym.adapters.stored import StoredAdapter, fitted, weights_of
from onym.convert.mapping import Change, Joined, Recipe, View
from onym.convert.opening import open_any
from onym.convert.registry import Origin, register_completion
from onym.convert.sources import Contents
from onym.errors import CheckpointError, OnymError
from onym.format.chunk_index import CHUNKS
from onym.format.manifest import ADAPTER, CONFIG, MODEL, TRAINER, TensorEntry, identity_of
from onym.format.reader import Checkpoint
from onym.format.stored import tensor_hash
from onym.format.tensors import Damage, TensorFile
from onym.storage.paths import as_path, is_local

_REMEDY = "onym convert ADAPTER DST --merge BASE takes it from elsewhere"
_TEXTS = (".json", ".jinja", ".txt", ".model")


class MergedCheckpoint(Checkpoint):
    """Adapters and their base as one model. Its path, step and texts are those of the adapters."""

    def __init__(self, adapter: StoredAdapter, base: Checkpoint) -> None:
        super().__init__(adapter.path, adapter.checkpoint.manifest, merged_tensors(adapter, base), texts=_texts(adapter, base))
        self.adapter, self.base = adapter, base
        self.architecture, self.config = base.architecture, base.config
        self.provenance = adapter.checkpoint.provenance
        before: Origin | None = base.origin
        contents = Contents(
            adapter.path,
            f"{adapter.said}, merged into '{base.path}'",
            self.model,
            texts=before.contents.texts if before is not None else {},
        )
        notes = [*adapter.notes, *(before.notes if before is not None else [])]
        format = before.format if before is not None else None
        self.origin = Origin(contents, self.model, format, notes=notes, config=base.config, completed=True)
        if before is not None:
            self.origin.problem, self.origin.not_ours = before.problem, before.not_ours

    @property
    def model(self) -> TensorFile:
        """The merged tensors."""
        return self._opened[MODEL]

    @property
    def holds(self) -> list[str]:
        """The files beside the weights."""
        return [file for file in super().holds if file not in (ADAPTER, peft_files.CONFIG_FILE, peft_files.OURS_FILE)]

    @property
    def identity(self) -> str | None:
        """None: no hash of the merged values is stored."""
        return None

    def damages(self, files: Iterable[str] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Damage]:
        """Of the adapters' files and of the base's weights."""
        yield from self.adapter.checkpoint.damages(files, rank, world_size)
        if self.adapter.base is None:
            yield from self.base.model.damages(rank, world_size)


def merged_tensors(adapter: StoredAdapter, base: Checkpoint) -> View:
    """The base's tensors, each adapted weight with its adapter's product added when it is asked for.

    Raises:
        CheckpointError: the adapters do not fit the base.
    """
    model, said = base.model, f"'{base.path}'"
    adapter = fitted(adapter, weights_of(base), said, base.architecture)
    recipes = {name: Recipe((name,)) for name in model.names}
    for layer in adapter.layers:
        name = f"{layer}.weight"
        stored = model.aliases.get(name, name)
        ties = [each for each in model.names if model.aliases.get(each, each) == stored]
        if others := [each for each in ties if each.removesuffix(".weight") not in adapter.layers]:
            raise CheckpointError(
                f"The weight of {layer} is {others[0]} too in {said}, and the adapter in '{adapter.path}' would change one of "
                "them: it cannot be merged into this base."
            )
        change = _merging(adapter.config.scaling_of(layer), layer in adapter.config.transposed)
        recipes[name] = Recipe((name, f"{layer}.{A}", f"{layer}.{B}"), change)
    return View(Joined(adapter.path, [model, adapter.tensors]), recipes, adapter.path)


@functools.cache
def _merging(scaling: float, transposed: bool) -> Change:
    return Change(
        "merged",
        lambda shapes: shapes[0],
        lambda tensors: merged(tensors[0], tensors[1], tensors[2], scaling, transposed=transposed),
    )


def merged_checkpoint(checkpoint: Checkpoint, base: Checkpoint | str | Path | None = None) -> Checkpoint:
    """The model that adapters make of their base.

    Args:
        checkpoint: of adapters alone: a step of a run, a file or folder of ``onym.save(lora, …)``, peft's, or the book's.
        base: by default the one that is recorded in it, or that is in the same file.

    Raises:
        CheckpointError: it holds no adapters; or the base is missing, has changed, or is another one.
    """
    adapter = stored_adapter(checkpoint)
    if adapter is None:
        raise CheckpointError(f"'{checkpoint.path}' holds no adapters: give what onym.save(lora, …), peft or onym train wrote.")
    return _merged(adapter, base)


def _merged(adapter: StoredAdapter, base: Checkpoint | str | Path | None = None) -> Checkpoint:
    return MergedCheckpoint(adapter, base_for(adapter, base))


def base_for(adapter: StoredAdapter, base: Checkpoint | str | Path | None = None) -> Checkpoint:
    """The base of an adapter; see :func:`merged_checkpoint`."""
    if base is not None and not isinstance(base, Checkpoint):
        base = open_any(base).checkpoint
    if adapter.base is not None:
        if base is not None:
            raise CheckpointError(f"'{adapter.path}' holds its base too: leave '{base.path}' out.")
        return adapter.base
    if adapter.config.base is not None:
        return open_base(adapter.config.base, adapter.path, base=base)
    if base is not None:
        return base
    if not adapter.base_name or not as_path(adapter.base_name).exists():
        named = f"names {adapter.base_name!r}, which is not here" if adapter.base_name else "does not say of which model"
        raise CheckpointError(
            f"'{adapter.path}' holds {adapter.said} alone, and {named}: give the model, by onym.LoRA.open(path, model) or "
            "onym convert ADAPTER DST --merge BASE."
        )
    return open_any(adapter.base_name).checkpoint


def base_of(checkpoint: Checkpoint, path: str | Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is recorded of a base, for :meth:`onym.LoRA.record_base`. Where no hash is stored, every byte is read for one.

    Args:
        checkpoint: the base, opened.
        path: where it was opened; of a run, the step's own folder is recorded, because its newest one changes.
        settings: what had to be given to open it, as ``{"n_heads": 12}``.
    """
    where = checkpoint.path if checkpoint.manifest is not None and checkpoint.manifest.step is not None else as_path(path)
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    return {
        "path": os.path.abspath(where) if is_local(where) else str(where),  # noqa: PTH100  # a link stays the name that the user gave
        "identity": identity(checkpoint),
        "architecture": checkpoint.architecture,
        "config": dict(checkpoint.config) if checkpoint.config is not None else None,
        **({"settings": given} if given else {}),
    }


def adapter_config(lora: LoRA, base: Checkpoint, base_path: str | Path) -> dict[str, Any]:
    """Record the base in the adapters, and return the ``config.json`` that their checkpoints have from now on."""
    lora.record_base(base_of(base, base_path))
    return lora.config.to_dict()


def identity(checkpoint: Checkpoint) -> str:
    """The identity of any checkpoint: the stored one, or else computed from every byte by the same rule.

    Raises:
        CheckpointError: it holds values that are no tensors.
    """
    if isinstance(checkpoint, MergedCheckpoint):
        parts = [
            identity(checkpoint.base),
            identity(checkpoint.adapter.checkpoint),
            str(checkpoint.adapter.config.without_base()),
        ]
        return blake3("\n".join(parts).encode()).hexdigest()
    if checkpoint.identity is not None:
        return checkpoint.identity
    model = checkpoint.model
    entries = {}
    for name, shape in model.shapes.items():
        found = tensor_hash(checkpoint.tensor(name))
        aliases = [alias for alias, stored in model.aliases.items() if stored == name]
        entries[name] = TensorEntry(model.dtypes[name], list(shape), found.blake3, aliases)
    return identity_of(entries)


def open_base(record: Mapping[str, Any], adapter: Path, *, base: Checkpoint | None = None) -> Checkpoint:
    """Open the base that adapters record, and check that it is the same.

    Args:
        record: what :func:`base_of` made.
        adapter: the adapters' path, for messages.
        base: one that was given instead; it has to be the same too.

    Raises:
        CheckpointError: it is missing, or it has changed.
    """
    path = str(record.get("path", ""))
    if base is None:
        if not path or not as_path(path).exists():
            raise CheckpointError(
                f"The base of '{adapter}' was at '{path}', and nothing is there now: move it back, or {_REMEDY}."
            )
        try:
            base = open_any(path, settings=record.get("settings")).checkpoint
        except OnymError as error:
            raise CheckpointError(f"The base of '{adapter}' cannot be opened: {error}") from error
    wanted = record.get("identity")
    if wanted and identity(base) != wanted:
        raise CheckpointError(
            f"'{adapter}' belongs to the model that was at '{path}' (identity {wanted[:12]}), and '{base.path}' holds other "
            f"weights (identity {identity(base)[:12]}): give the one that it was trained on."
        )
    return base


def complete(checkpoint: Checkpoint) -> Checkpoint | None:
    """For everything that opens models: adapters merged into their base; None of any other checkpoint."""
    if isinstance(checkpoint, MergedCheckpoint):
        return None
    adapter = stored_adapter(checkpoint)
    return _merged(adapter) if adapter is not None else None


def _texts(adapter: StoredAdapter, base: Checkpoint) -> dict[str, str]:
    """The tokenizer and what else is beside the base's weights; what the adapters' own folder holds comes first."""
    found: dict[str, str] = {}
    for checkpoint in (base, adapter.checkpoint):
        names = [*checkpoint._texts, *(checkpoint.manifest.files if checkpoint.manifest is not None else ())]
        for name in names:
            if name.endswith(_TEXTS) and name not in _OWN and (text := checkpoint.text(name)) is not None:
                found[name] = text
    return found


_OWN = (CONFIG, TRAINER, CHUNKS, peft_files.CONFIG_FILE, peft_files.OURS_FILE)

register_completion(complete)
