"""Adapters -> files that other programs open: peft's folder, the book's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onym.adapters import book, peft_files
from onym.adapters.layer import linear_places
from onym.adapters.lora import LoRA, LoRAConfig
from onym.adapters.renaming import renaming_of
from onym.adapters.stored import StoredAdapter, ends_of, layers_of, with_values
from onym.convert.lazy import lazily
from onym.convert.mapping import Shape
from onym.convert.registry import family_of
from onym.errors import CheckpointError
from onym.format.reader import Checkpoint
from onym.format.tensor_writing import Progress
from onym.names.wrappers import unwrap
from onym.state.architectures import build_model, describe_model

_TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}
"""How the names of transformers' classes end, and what peft calls the task."""


def save_folder(lora: LoRA, path: Path, state: Mapping[str, Any]) -> None:
    """Write live adapters as peft's folder.

    Args:
        lora: the adapters.
        path: where to.
        state: their full tensors by name.
    """
    model = unwrap(lora.model)
    architecture, config = describe_model(model)
    name = str((lora.config.base or {}).get("path") or getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    linear = [path for place in linear_places(model) for path in place.paths]
    _write_peft(path, state, lora.config, (architecture, config), linear, name, task)


def write_peft(
    adapter: StoredAdapter, base: Checkpoint | None, path: Path, *, base_name: str = "", progress: Progress | None = None
) -> None:
    """Write stored adapters as peft's folder.

    Args:
        adapter: under the names of its base's architecture.
        base: the base; where it is not open, what is recorded of it suffices.
        path: where to.
        base_name: what the files call the base; by default where it was.
        progress: called with the bytes written since the last call.
    """
    record = adapter.config.base or {}
    name = base_name or str(record.get("path") or adapter.base_name or (base.path if base is not None else ""))
    described = (base.architecture, base.config) if base is not None else (record.get("architecture"), record.get("config"))
    linear = list(linear_of(*described))
    _write_peft(path, lazily(adapter.tensors), adapter.config, described, linear, name, None, progress)


def write_book(adapter: StoredAdapter, base: Checkpoint, path: Path, progress: Progress | None = None) -> list[str]:
    """Write stored adapters and their base as the book's file; returns what the user should know."""
    return book.write(path, adapter, base, linear_layers(base), progress)


def linear_layers(base: Checkpoint) -> dict[str, Shape]:
    """The linear layers of a model that can be built here, with the shapes of their weights; none of others."""
    return linear_of(base.architecture, base.config)


def linear_of(architecture: str | None, config: Mapping[str, Any] | None) -> dict[str, Shape]:
    """As :func:`linear_layers`, by what a model is built from."""
    if architecture is None or config is None:
        return {}
    model = build_model(architecture, config)
    return {path: tuple(unwrap(place.layer).weight.shape) for place in linear_places(model) for path in place.paths}  # type: ignore[arg-type]


def _write_peft(
    path: Path,
    state: Mapping[str, Any],
    config: LoRAConfig,
    described: tuple[str | None, Mapping[str, Any] | None],
    linear: list[str],
    base_name: str,
    task: str | None,
    progress: Progress | None = None,
) -> None:
    architecture, model_config = described
    family = family_of(architecture)
    format = family.peft(model_config) if family is not None and family.peft is not None and model_config is not None else None
    layers = layers_of(state)
    names = {layer: layer for layer in [*linear, *layers]}
    turned = bool(config.transposed)
    if family is not None and family.peft is not None:
        if format is None:
            raise CheckpointError(
                f"No class of transformers holds a {architecture} of this configuration, so there are no names for peft: end "
                "the path in .safetensors."
            )
        renaming = renaming_of(format)
        for layer in names:
            theirs, is_turned = renaming.to_theirs(layer) or ([], False)
            if len(theirs) == 1:
                names[layer] = theirs[0]
                turned = turned or (layer in layers and is_turned)
            elif layer in layers:
                raise CheckpointError(f"{format.title} has no layer for {layer}, so there is no name for its adapter in peft.")
        task = "CAUSAL_LM"
    theirs_config = with_values(
        replace(config, rank_pattern={}, alpha_pattern={}),
        {names[layer]: config.rank_of(layer) for layer in layers},
        {names[layer]: config.alpha_of(layer) for layer in layers},
    )
    values = peft_files.settings(
        theirs_config,
        [names[layer] for layer in layers],
        linear=[names[layer] for layer in linear],
        transposed=turned,
        task=task,
        base_name=base_name,
    )
    renamed = {f"{names[layer]}.{name.removeprefix(f'{layer}.')}": state[name] for name in state for layer in [_layer(name)]}
    own = config if config.targets else replace(config, targets=tuple(ends_of(layers)))
    peft_files.write(path, renamed, values, own, progress)


def _layer(name: str) -> str:
    (layer,) = layers_of([name])
    return layer
