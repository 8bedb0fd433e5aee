"""Everything that a training loop holds <-> the files of one checkpoint.

Models and optimizers have files of their own, under names that do not depend on wrappers; whatever else has a
``state_dict()`` (schedulers, gradient scalers, samplers) or is made of plain values is in ``trainer.json``, and its tensors in
``trainer.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from origo.errors import CheckpointError, ConfigError, OrigoError, nearest
from origo.models.registry import describe_model
from origo.naming.mismatch import compare
from origo.naming.wrappers import unwrap
from origo.state.model import describe, load_state_dict, state_dict, whole_state
from origo.state.optimizer import load_optimizer_state, optimizer_state
from origo.state.processes import gathered, process_number
from origo.state.rng import load_rng_state, require_rng_state, rng_state
from origo.state.sharded import any_sharded
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
    if "model" in state and "model" not in modules:
        raise ConfigError(f"What is called 'model' is a {type(state['model']).__name__}, not a module: give it another name.")
    if not modules:
        raise ConfigError('There is no model in what is to be kept: pass it too, as {"model": model, …}.')
    main = "model" if "model" in modules else next(iter(modules))
    parts = _Parts()
    for key, value in state.items():
        if key in modules:
            file = MODEL if key == main else f"{key}.safetensors"
            parts.tensors[file], extra = _split(state_dict(value))
            parts.objects[key] = {"kind": "model", "file": file}
            if extra:  # what modules keep of their own making (get_extra_state)
                tensors, parts.objects[key]["extra"] = flatten(extra, f"{key}.extra")
                parts.loose |= tensors
        elif _is_optimizer(value):
            file = f"{key}.safetensors"
            parts.tensors[file], values = optimizer_state(_model_of(key, value, modules), value)
            parts.objects[key] = {"kind": "optimizer", "file": file, "state": values}
        else:
            stateful = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
            try:
                tensors, values = flatten(value.state_dict() if stateful else value, key)
                json.dumps(values)
            except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
                if isinstance(error, OrigoError):
                    raise
                raise CheckpointError(f"{key!r} cannot be kept: {error}.") from error
            parts.loose |= tensors
            parts.objects[key] = {"kind": "state" if stateful else "values", "state": values}
    # Of several processes each has generators of its own.
    mine, mine_too = rng_state()
    together = any_sharded(state.values())
    states = gathered(({name: tensor.numpy() for name, tensor in mine.items()}, mine_too), together)
    rng_tensors = {
        _of_process(name, number): torch.from_numpy(array)
        for number, (arrays, _) in enumerate(states)
        for name, array in arrays.items()
    }
    rng_values = {**states[0][1], "others": [values for _, values in states[1:]]}
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
    if not isinstance(state, Mapping):
        raise ConfigError(
            f'restore takes a dict like {{"model": model, "optimizer": optimizer}}, not a {type(state).__name__}.'
        )
    stored = _Stored(checkpoint)
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    # All is read, checked and decoded before anything is changed.
    decoded: dict[str, Any] = {}
    for key, value in state.items():
        if key not in stored.objects:
            raise CheckpointError(
                f"'{checkpoint.path}' holds nothing called {key!r}{nearest(key, stored.objects)}; it holds "
                f"{', '.join(stored.objects)}."
            )
        if _kind_of(value) != stored.kind(key):
            raise CheckpointError(
                f"{key!r} in '{checkpoint.path}' is of the kind {stored.kind(key)!r}, not {_kind_of(value)!r}."
            )
        decoded[key] = stored.tensors(key) if stored.kind(key) in ("model", "optimizer") else stored.plain(key)
        if isinstance(value, dict | list) and stored.kind(key) == "values" and not isinstance(decoded[key], type(value)):
            raise CheckpointError(
                f"{key!r} in '{checkpoint.path}' is a {type(decoded[key]).__name__}, and a {type(value).__name__} was given to "
                "be filled: leave it out, and take it from restore(...).values."
            )
    values = stored.values()
    generators = None
    if rng:
        with stored.decoding("rng"):
            generators = stored.generators()
            if generators is not None:
                require_rng_state(*generators)

    fitting = {key: not compare(describe(decoded[key]), describe(state_dict(module))) for key, module in modules.items()}
    for key in sorted(modules, key=lambda key: fitting[key]):  # one that does not fit says so before any other is changed
        if not fitting[key]:
            load_state_dict(modules[key], decoded[key])
    for key, value in state.items():
        if stored.kind(key) == "optimizer":
            with stored.decoding(key):
                load_optimizer_state(_model_of(key, value, modules), value, decoded[key], stored.objects[key]["state"])
    for key, value in state.items():
        if stored.kind(key) == "model" and fitting[key]:
            load_state_dict(value, decoded[key])
        elif stored.kind(key) == "state":
            with stored.decoding(key):
                value.load_state_dict(decoded[key])
        elif isinstance(value, dict):
            value.clear()
            value.update(decoded[key])
        elif isinstance(value, list) and stored.kind(key) == "values":
            value[:] = decoded[key]
    if generators is not None:
        load_rng_state(*generators)
    return values


def stored_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain values that a checkpoint has, by name."""
    return _Stored(checkpoint).values()


def stored_generators(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint has of the random number generators besides tensors."""
    return _Stored(checkpoint).rng


def stored_objects(checkpoint: Checkpoint) -> list[str]:
    """The names of all that a checkpoint has: models, optimizers, whatever had a ``state_dict()``, plain values."""
    return list(_Stored(checkpoint).objects)


class _Stored:
    """What a checkpoint's ``trainer.json`` says, decoded where it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        text = checkpoint.text(TRAINER)
        if text is None:
            raise CheckpointError(
                f"'{checkpoint.path}' holds a model only, not the state of a training: origo.load(path, into=model) loads it."
            )
        content = parse_json(text, f"'{checkpoint.path / TRAINER}'")
        with self.decoding("objects"):
            self.objects: dict[str, dict[str, Any]] = dict(content["objects"])
            self.rng: dict[str, Any] = dict(content["rng"])
            self._kinds = {key: str(entry["kind"]) for key, entry in self.objects.items()}
        self.loose = checkpoint.tensors(TRAINER_TENSORS).state()

    def kind(self, key: str) -> str:
        return self._kinds[key]

    def tensors(self, key: str) -> dict[str, Any]:
        """Of a model or optimizer, each checked."""
        with self.decoding(key):
            file = str(self.objects[key]["file"])
            extra = self.objects[key].get("extra", {})
            return {**self._checkpoint.tensors(file).state(), **unflatten(extra, _own(extra, self.loose))}

    def plain(self, key: str) -> Any:
        """A structure with its tensors, in memory of their own."""
        with self.decoding(key):
            structure = self.objects[key]["state"]
            return unflatten(structure, _own(structure, self.loose))

    def values(self) -> dict[str, Any]:
        """All plain values."""
        return {key: self.plain(key) for key in self.objects if self.kind(key) == "values"}

    def generators(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """This process's random number generators; None where there were fewer processes."""
        number = process_number()
        if number == 0:
            return self.loose, self.rng
        if number > len(self.rng["others"]):  # of DDP the first process alone is kept: the others stay as they were seeded
            return None
        prefix = _of_process("rng.", number)
        mine = {"rng." + name.removeprefix(prefix): t for name, t in self.loose.items() if name.startswith(prefix)}
        return mine, self.rng["others"][number - 1]

    @contextmanager
    def decoding(self, key: str) -> Iterator[None]:
        """Put whatever a file of other content than ours makes Python raise into a sentence."""
        try:
            yield
        except OrigoError:
            raise
        except (
            TypeError,
            KeyError,
            AttributeError,
            ValueError,
            IndexError,
            OverflowError,
            RecursionError,
            RuntimeError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"What '{self._checkpoint.path}' holds as {key!r} cannot be taken ({reason[:200]}): it is damaged, or of "
                "another kind of object than the one given."
            ) from error


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a model's state, and the rest."""
    rest = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return {name: value for name, value in state.items() if name not in rest}, rest


def _of_process(name: str, number: int) -> str:
    return name if number == 0 else name.replace("rng.", f"rng.process-{number}.", 1)


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
    for module in modules.values():
        if wanted <= {id(parameter) for parameter in module.parameters()}:
            return module
    having = {name: module for name, module in modules.items() if any(id(each) in wanted for each in module.parameters())}
    if not having:
        raise ConfigError(
            f"The parameters of {key!r} belong to none of the models given ({', '.join(modules)}): pass its model too."
        )
    return nn.ModuleDict(having)
