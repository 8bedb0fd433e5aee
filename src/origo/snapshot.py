"""Everything that a training loop holds <-> the files of one checkpoint.

Models and optimizers have files of their own, under names that do not depend on wrappers; whatever else has a
``state_dict()`` (schedulers, gradient scalers, samplers) or is made of plain values is in ``trainer.json``, and its tensors in
``trainer.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from origo.errors import CheckpointError, ConfigError, nearest
from origo.models.registry import describe_model
from origo.naming.wrappers import unwrap
from origo.state.model import load_state_dict, state_dict, whole_state
from origo.state.optimizer import load_optimizer_state, optimizer_state
from origo.state.rng import load_rng_state, rng_state
from origo.state.tree import flatten, unflatten
from origo.store.layout import CONFIG, MODEL, TRAINER, TRAINER_TENSORS, parse_json
from origo.store.reader import Checkpoint

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("rng", "trainer", "manifest", "config", "tokenizer")


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds. The tensors are the live ones."""

    tensors: dict[str, dict[str, Tensor]]
    """By file."""
    texts: dict[str, str]
    """By file."""
    architecture: str | None = None
    mine_to_write: bool = True
    """Of several processes the first one writes."""


@dataclass
class _Parts:
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)


def take(state: Mapping[str, Any], texts: Mapping[str, str]) -> Snapshot:
    """See what is to be kept of some objects.

    Args:
        state: by a name of the caller's choice: models, optimizers (one, or a list of them), objects with a ``state_dict()``,
            and plain values.
        texts: further files.

    Raises:
        ConfigError: a name cannot be one, or an optimizer's model is not among the objects.
        CheckpointError: something in it cannot be kept; says what.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f'save takes a dict like {{"model": model, "optimizer": optimizer}}, not a {type(state).__name__}.')
    for key in state:
        if type(key) is not str or not _KEY.fullmatch(key) or key in _TAKEN:
            raise ConfigError(f"{key!r} cannot name a part of a checkpoint: use letters, digits and '_', and none of {_TAKEN}.")
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    if not modules:
        raise ConfigError('There is no model in what is to be kept: pass it too, as {"model": model, …}.')
    main = "model" if "model" in modules else next(iter(modules))
    parts = _Parts()
    for key, value in state.items():
        if key in modules:
            file = MODEL if key == main else f"{key}.safetensors"
            parts.tensors[file] = state_dict(value)
            parts.objects[key] = {"kind": "model", "file": file}
        elif _is_optimizer(value):
            file = f"{key}.safetensors"
            parts.tensors[file], values = optimizer_state(_model_of(key, value, modules), value)
            parts.objects[key] = {"kind": "optimizer", "file": file, "state": values}
        else:
            stateful = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
            tensors, values = flatten(value.state_dict() if stateful else value, key)
            parts.loose |= tensors
            parts.objects[key] = {"kind": "state" if stateful else "values", "state": values}
    rng_tensors, rng_values = rng_state()
    parts.tensors[TRAINER_TENSORS] = {**parts.loose, **rng_tensors}
    whole = {file: whole_state(tensors) for file, tensors in parts.tensors.items()}
    architecture, config = describe_model(unwrap(modules[main]))
    written = {TRAINER: json.dumps({"objects": parts.objects, "rng": rng_values}, allow_nan=False) + "\n", **texts}
    if config is not None:
        written[CONFIG] = json.dumps(config, indent=2) + "\n"
    return Snapshot(
        {file: tensors for file, (tensors, _) in whole.items()}, written, architecture, all(mine for _, mine in whole.values())
    )


def put_back(checkpoint: Checkpoint, state: Mapping[str, Any], *, rng: bool = True) -> dict[str, Any]:
    """Give objects the state that a checkpoint has of them.

    Args:
        checkpoint: an open one.
        state: the objects, under the names they were kept under; any may be left out. A dict or list of plain values is filled
            in place.
        rng: put the random number generators back too.

    Returns:
        The plain values that the checkpoint has.

    Raises:
        CheckpointError: it has nothing under one of the names, or something of another kind.
        MismatchError: it does not fit.
    """
    stored = _stored(checkpoint)
    objects: Mapping[str, Any] = stored["objects"]
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    for key, value in state.items():
        if key not in objects:
            raise CheckpointError(
                f"'{checkpoint.path}' holds nothing called {key!r}{nearest(key, objects)}; it holds {', '.join(objects)}."
            )
        if _kind_of(value) != objects[key]["kind"]:
            raise CheckpointError(
                f"{key!r} in '{checkpoint.path}' is of the kind {objects[key]['kind']!r}, not {_kind_of(value)!r}."
            )
    loose = checkpoint.tensors(TRAINER_TENSORS).state()
    values = stored_values(checkpoint)
    for key, value in state.items():
        entry = objects[key]
        if entry["kind"] == "model":
            load_state_dict(value, checkpoint.tensors(entry["file"]).state())
    for key, value in state.items():
        entry = objects[key]
        if entry["kind"] == "optimizer":
            load_optimizer_state(
                _model_of(key, value, modules), value, checkpoint.tensors(entry["file"]).state(), entry["state"]
            )
        elif entry["kind"] == "state":
            value.load_state_dict(unflatten(entry["state"], _own(entry["state"], loose)))
        elif isinstance(value, dict):
            value.clear()
            value.update(values[key])
        elif isinstance(value, list):
            value[:] = values[key]
    if rng:
        load_rng_state(loose, stored["rng"])
    return values


def stored_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain values that a checkpoint has, by name."""
    loose = checkpoint.tensors(TRAINER_TENSORS).state()
    objects = _stored(checkpoint)["objects"]
    return {
        key: unflatten(entry["state"], _own(entry["state"], loose))
        for key, entry in objects.items()
        if entry["kind"] == "values"
    }


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    text = checkpoint.text(TRAINER)
    if text is None:
        raise CheckpointError(
            f"'{checkpoint.path}' holds a model only, not the state of a training: origo.load(path, into=model) loads it."
        )
    stored: dict[str, Any] = parse_json(text, f"'{checkpoint.path / TRAINER}'")
    return stored


def _own(structure: Any, loose: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a structure names, in memory of their own: the caller keeps them, the file may go."""
    text = json.dumps(structure)
    return {name: tensor.clone() for name, tensor in loose.items() if json.dumps(name) in text}


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(part, Optimizer) for part in value)
    )


def _kind_of(value: Any) -> str:
    if isinstance(value, nn.Module):
        return "model"
    if _is_optimizer(value):
        return "optimizer"
    return "state" if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") else "values"


def _model_of(key: str, optimizer: Any, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The model whose parameters an optimizer has; of several together, one with each under its name."""
    optimizers: Iterable[Optimizer] = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    wanted = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    having = {name: module for name, module in modules.items() if any(id(each) in wanted for each in module.parameters())}
    if not having:
        raise ConfigError(
            f"The parameters of {key!r} belong to none of the models given ({', '.join(modules)}): pass its model too."
        )
    return next(iter(having.values())) if len(having) == 1 else nn.ModuleDict(having)
