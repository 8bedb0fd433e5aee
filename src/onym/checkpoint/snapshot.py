"""The objects of a training loop -> the files of one checkpoint.

Models and optimizers have files of their own, under names that do not depend on wrappers. Everything else that has a
``state_dict()`` (schedulers, gradient scalers, samplers) or is made of plain values is in ``trainer.json``, and its tensors in
``trainer.safetensors``. :mod:`onym.checkpoint.restore` is the way back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onym.checkpoint.shard_plan import ShardPlan
from onym.errors import CheckpointError, ConfigError, OnymError
from onym.format.manifest import CONFIG, MODEL, TRAINER, TRAINER_TENSORS
from onym.format.rank_files import RankContent
from onym.names.wrappers import unwrap
from onym.state.architectures import describe_model
from onym.state.collectives import all_gather_object, get_rank, run_on_all_ranks
from onym.state.composite import is_composite, require_loadable
from onym.state.dtensor import any_sharded
from onym.state.model import full_state_dict, state_dict
from onym.state.optimizer import optimizer_state
from onym.state.rng import rng_state
from onym.state.tree import flatten

RNG_VALUES = "rng.values"
"""The tensor with what a rank's random number generators have besides tensors: JSON as bytes."""
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("rng", "trainer", "manifest", "config", "tokenizer")


@dataclass(frozen=True)
class Snapshot:
    """The content of one checkpoint. The tensors are the live ones, not copies."""

    content: RankContent
    texts: dict[str, str] = field(default_factory=dict)
    """By file."""
    architecture: str | None = None


@dataclass
class _Parts:
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)


def capture(state: Mapping[str, Any], texts: Mapping[str, str], *, sharded: bool = False) -> Snapshot:
    """Collect what is to be saved of some objects.

    Args:
        state: by a name of the caller's choice: models, optimizers (one, or a list of them), objects with a ``state_dict()``,
            and plain values.
        texts: further files.
        sharded: only what this rank writes: its chunks of sharded tensors, its random number generators, and in rank 0
            everything else. Otherwise everything, for which sharded tensors are all-gathered; each rank calls this.

    Raises:
        ConfigError: a name cannot be one, or an optimizer's model is not among the objects.
        CheckpointError: a value cannot be saved; says which.
    """
    modules, main, parts = run_on_all_ranks(lambda: _parts_of(state), sharded)
    rank = get_rank()
    generators, values = _generators(rank)
    plan = ShardPlan()
    if sharded:
        tensors = {file: plan.add(file, each) for file, each in parts.tensors.items()}
        loose = plan.add(TRAINER_TENSORS, parts.loose)
        plan.drop_duplicates({**tensors, TRAINER_TENSORS: loose})
    else:
        own = {name: tensor.numpy() for name, tensor in generators.items()}
        for each in all_gather_object(own, any_sharded(state.values())):
            generators |= {name: torch.from_numpy(array) for name, array in each.items()}
        tensors = {file: full_state_dict(each)[0] for file, each in parts.tensors.items()}
        loose, _ = full_state_dict(parts.loose)
    tensors[TRAINER_TENSORS] = {**loose, **generators}
    content = RankContent(tensors, plan.chunks, plan.table)
    if rank > 0 and sharded:
        return Snapshot(content)
    architecture, config = describe_model(unwrap(modules[main]))
    written = {TRAINER: json.dumps({"objects": parts.objects, "rng": values}, allow_nan=False) + "\n", **texts}
    if config is not None:
        written[CONFIG] = json.dumps(config, indent=2) + "\n"
    return Snapshot(content, written, architecture)


def _parts_of(state: Mapping[str, Any]) -> tuple[dict[str, nn.Module], str, _Parts]:
    """The models among some objects, the name of the main one, and what is to be saved of all objects."""
    if not isinstance(state, Mapping):
        raise ConfigError(f'save takes a dict like {{"model": model, "optimizer": optimizer}}, not a {type(state).__name__}.')
    for key in state:
        if type(key) is not str or not _KEY.fullmatch(key) or key in _TAKEN:
            raise ConfigError(f"{key!r} cannot name a part of a checkpoint: use letters, digits and '_', and none of {_TAKEN}.")
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    if "model" in state and "model" not in modules:
        raise ConfigError(f"What is called 'model' is a {type(state['model']).__name__}, not a module: give it another name.")
    if not modules:
        raise ConfigError('There is no model in what is to be saved: pass it too, as {"model": model, …}.')
    main = "model" if "model" in modules else next(iter(modules))
    parts = _Parts()
    for key, value in state.items():
        if key in modules:
            file = MODEL if key == main else f"{key}.safetensors"
            parts.tensors[file], extra = _split(state_dict(value))
            parts.objects[key] = {"kind": "model", "file": file}
            for name, each in extra.items():  # values of get_extra_state, and tensors that are made of others
                require_loadable(name, each)
                tensors, structure = flatten(each, f"{key}.extra.{name}", subclasses=isinstance(each, Tensor))
                parts.objects[key].setdefault("extra", {})[name] = structure
                parts.loose |= tensors
        elif is_optimizer(value):
            file = f"{key}.safetensors"
            parts.tensors[file], values = optimizer_state(model_of(key, value, modules), value)
            parts.objects[key] = {"kind": "optimizer", "file": file, "state": values}
        else:
            stateful = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
            try:
                tensors, values = flatten(value.state_dict() if stateful else value, key)
                json.dumps(values)
            except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
                if isinstance(error, OnymError):
                    raise
                raise CheckpointError(f"{key!r} cannot be saved: {error}.") from error
            parts.loose |= tensors
            parts.objects[key] = {"kind": "state" if stateful else "values", "state": values}
    return modules, main, parts


def _generators(rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's random number generators: tensors under names of its own, and values.

    Except in rank 0 the values are a tensor too, so that each rank can write its own.
    """
    tensors, values = rng_state()
    if rank:
        tensors[RNG_VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return {generator_name(name, rank): tensor for name, tensor in tensors.items()}, values


def generator_name(name: str, rank: int) -> str:
    """The name of a rank's generator in the checkpoint."""
    return name if rank == 0 else name.replace("rng.", f"rng.process-{rank}.", 1)


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain tensors of a model's state, and the rest."""
    rest = {name: value for name, value in state.items() if not isinstance(value, Tensor) or is_composite(value)}
    return {name: value for name, value in state.items() if name not in rest}, rest


def is_optimizer(value: Any) -> bool:
    """Whether it is an optimizer, or several."""
    return isinstance(value, Optimizer) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(part, Optimizer) for part in value)
    )


def model_of(key: str, optimizer: Any, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The model whose parameters an optimizer has; where several have them, a module with each under its name."""
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
