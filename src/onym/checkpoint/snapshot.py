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

from onym.errors import CheckpointError, ConfigError, OnymError, nearest
from onym.format.manifest import CONFIG, MODEL, TRAINER, TRAINER_TENSORS, parse_json
from onym.format.reader import Checkpoint
from onym.format.safetensors import dtype_name
from onym.format.sharded_tensor import Part, Table
from onym.format.writer import Box
from onym.state.architectures import describe_model
from onym.names.mismatch import compare
from onym.names.wrappers import unwrap
from onym.state.collectives import all_gather_object, get_rank, get_world_size, raise_on_all_ranks
from onym.state.dtensor import any_sharded, cut_as, from_own_piece, full_tensor, is_cut, is_mine_to_write, local, local_chunk
from onym.state.model import describe, full_state_dict, load_state_dict, state_dict, tensor_identity
from onym.state.optimizer import load_optimizer_state, optimizer_state
from onym.state.rng import load_rng_state, require_rng_state, rng_state
from onym.state.tree import flatten, unflatten

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_VALUES = "rng.values"  # JSON as bytes
_TAKEN = ("rng", "trainer", "manifest", "config", "tokenizer")


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds. The tensors are the live ones."""

    tensors: dict[str, dict[str, Tensor]]
    """By file."""
    texts: dict[str, str]
    """By file."""
    architecture: str | None = None
    boxes: dict[str, dict[str, Box]] = field(default_factory=dict)
    """Of the tensors that are this process's part of one, by file and name."""
    table: Table = field(default_factory=Table)
    """Of what several processes keep together."""


@dataclass
class _Parts:
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)


def capture(state: Mapping[str, Any], texts: Mapping[str, str], *, share: bool = False) -> Snapshot:
    """See what is to be kept of some objects.

    Args:
        state: by a name of the caller's choice: models, optimizers (one, or a list of them), objects with a ``state_dict()``,
            and plain values.
        texts: further files.
        share: this process's share alone: of sharded tensors its pieces, its random number generators, and, in the first
            process, everything else. Otherwise all of it, for which sharded tensors are put together; each process calls this.

    Raises:
        ConfigError: a name cannot be one, or an optimizer's model is not among the objects.
        CheckpointError: something in it cannot be kept; says what.
    """
    failure: BaseException | None = None
    try:
        modules, main, parts = _seen(state)
    except BaseException as error:
        failure = error
    raise_on_all_ranks(failure, share)  # what follows, all of them have to take part in
    first = get_rank() == 0
    generators, values = _generators()
    shares = _Shares()
    if share:
        parts.tensors = {file: shares.own(file, tensors) for file, tensors in parts.tensors.items()}
        loose = shares.own(TRAINER_TENSORS, parts.loose)
        shares.leave_to_others({**parts.tensors, TRAINER_TENSORS: loose})
    else:
        for each in all_gather_object(
            {name: tensor.numpy() for name, tensor in generators.items()}, any_sharded(state.values())
        ):
            generators |= {name: torch.from_numpy(array) for name, array in each.items()}
        parts.tensors = {file: full_state_dict(tensors)[0] for file, tensors in parts.tensors.items()}
        loose, _ = full_state_dict(parts.loose)
    parts.tensors[TRAINER_TENSORS] = {**loose, **generators}
    if not first and share:
        return Snapshot(parts.tensors, {}, None, shares.boxes, shares.table)
    architecture, config = describe_model(unwrap(modules[main]))
    written = {TRAINER: json.dumps({"objects": parts.objects, "rng": values}, allow_nan=False) + "\n", **texts}
    if config is not None:
        written[CONFIG] = json.dumps(config, indent=2) + "\n"
    return Snapshot(parts.tensors, written, architecture, shares.boxes, shares.table)


def _seen(state: Mapping[str, Any]) -> tuple[dict[str, nn.Module], str, _Parts]:
    """The models among some objects, which of them is the main one, and what is to be kept of all."""
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
                if isinstance(error, OnymError):
                    raise
                raise CheckpointError(f"{key!r} cannot be kept: {error}.") from error
            parts.loose |= tensors
            parts.objects[key] = {"kind": "state" if stateful else "values", "state": values}
    return modules, main, parts


class _Shares:
    """What this process has of tensors that several keep together. Each finds the same table, without asking another."""

    def __init__(self) -> None:
        self.boxes: dict[str, dict[str, Box]] = {}
        self.table = Table()
        self._numbers: dict[Any, int] = {}
        self._meshes: dict[Any, int] = {}
        self._in_a_part_of_them = False

    def own(self, file: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Its pieces of those that are sharded; of whole ones the first process has all."""
        mine: dict[str, Any] = {}
        first: dict[Any, tuple[int, str]] = {}
        rows = self.table.tensors.setdefault(file, {})
        for at, (name, value) in enumerate(tensors.items()):
            turn, stored = first.setdefault(_memory_of(value) or name, (at, name))  # a tied one is one process's to write
            if stored != name:
                self.table.aliases.setdefault(file, {})[name] = stored
            shape = tuple(value.shape)
            cut = cut_as(value, turn)
            if cut is not None and cut[0].size() != get_world_size():
                self._in_a_part_of_them = True
            if cut is None:
                value = full_tensor(value)  # of what is sharded in another way; each process has to take part
            # Meshes by the order in which they appear: another process may be in another one, at the same place.
            alike = None if cut is None else (self._meshes.setdefault(cut[0], len(self._meshes)), *cut[1:])
            number = self._numbers.setdefault((shape, alike), len(self._numbers))
            rows[name] = (dtype_name(value.dtype), shape, number)
            part = self.table.parts.get(number)
            if part is None:
                part = self._part(value, cut, turn)
                if part is None:
                    continue
                self.table.parts[number] = part
            mine[name] = local(value)
            if part.size != shape:
                self.boxes.setdefault(file, {})[name] = Box(name, shape, part.start)
        return mine

    def leave_to_others(self, mine: Mapping[str, dict[str, Any]]) -> None:
        """Drop from ``mine`` what an earlier process has too: of meshes that are not of all processes none knows of another."""
        if not self._in_a_part_of_them:
            return
        before = all_gather_object(self.table.parts)[: get_rank()]
        for number, part in list(self.table.parts.items()):
            theirs = [each[number] for each in before if number in each]
            if any((other.start, other.size) == (part.start, part.size) for other in theirs):
                del self.table.parts[number]
                for file, rows in self.table.tensors.items():
                    for name, (_, _, of) in rows.items():
                        if of == number:
                            mine[file].pop(name, None)

    @staticmethod
    def _part(value: Tensor, cut: Any, turn: int) -> Part | None:
        number = get_rank()
        if cut is None or value.numel() == 0:
            return Part(0, (0,) * value.dim(), tuple(value.shape)) if number == 0 else None
        if not is_mine_to_write(value, turn):
            return None
        where = local_chunk(value)
        if any(part.start >= part.stop for part in where):
            return None
        return Part(number, tuple(part.start for part in where), tuple(part.stop - part.start for part in where))


def _memory_of(value: Tensor) -> Any:
    """Equal for tied tensors, in a process too that has nothing of them; None where it cannot be told."""
    own = local(value)
    if own.numel() == 0 and is_cut(value):
        return own.untyped_storage()._cdata, tuple(value.shape)
    return tensor_identity(value)


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's random number generators: tensors under names of its own, and values. Of others than the first one the
    values are a tensor too, so that each can write what it has.
    """
    tensors, values = rng_state()
    number = get_rank()
    if number:
        tensors[_VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return {_of_process(name, number): tensor for name, tensor in tensors.items()}, values


def restore_state(checkpoint: Checkpoint, state: Mapping[str, Any], *, rng: bool = True) -> dict[str, Any]:
    """Give objects the state that a checkpoint has of them.

    Args:
        checkpoint: an open one.
        state: the objects, under the names they were kept under; any may be left out. A dict or list of plain values is filled
            in place.
        rng: put the random number generators back too.

    Returns:
        The plain values that the checkpoint has.

    Raises:
        CheckpointError: it has nothing under one of the names, or something of another kind; in one of several processes.
        MismatchError: it does not fit.
    """
    collective = isinstance(state, Mapping) and any_sharded(state.values())
    failure: BaseException | None = None
    try:
        decoded = _decoded(checkpoint, state, rng)
    except BaseException as error:
        failure = error
    raise_on_all_ranks(failure, collective)
    return _put(state, decoded)


def _decoded(checkpoint: Checkpoint, state: Mapping[str, Any], rng: bool) -> _Decoded:
    """All that objects are to be given, read, checked and decoded; nothing has been changed."""
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
        if stored.kind(key) == "model":
            decoded[key] = stored.tensors(key, state_dict(value))
        elif stored.kind(key) == "optimizer":
            decoded[key] = stored.tensors(key, _slots_like(stored.names(key), _model_of(key, value, modules)))
        else:
            decoded[key] = stored.plain(key)
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
    return _Decoded(stored, modules, decoded, values, generators)


def _put(state: Mapping[str, Any], found: _Decoded) -> dict[str, Any]:
    """Give the objects what was found of them."""
    stored, modules, decoded = found.stored, found.modules, found.objects
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
    if found.generators is not None:
        load_rng_state(*found.generators)
    return found.values


def stored_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain values that a checkpoint has, by name."""
    return _Stored(checkpoint).values()


def stored_generators(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint has of the random number generators besides tensors."""
    return _Stored(checkpoint).rng


def stored_objects(checkpoint: Checkpoint) -> list[str]:
    """The names of all that a checkpoint has: models, optimizers, whatever had a ``state_dict()``, plain values."""
    return list(_Stored(checkpoint).objects)


@dataclass(frozen=True)
class _Decoded:
    """All that some objects are to be given."""

    stored: _Stored
    modules: dict[str, nn.Module]
    objects: dict[str, Any]
    values: dict[str, Any]
    """The plain values that the checkpoint has."""
    generators: tuple[dict[str, Tensor], dict[str, Any]] | None


class _Stored:
    """What a checkpoint's ``trainer.json`` says, decoded where it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        text = checkpoint.text(TRAINER)
        if text is None:
            raise CheckpointError(
                f"'{checkpoint.path}' holds a model only, not the state of a training: onym.load(path, into=model) loads it."
            )
        content = parse_json(text, f"'{checkpoint.path / TRAINER}'")
        with self.decoding("objects"):
            self.objects: dict[str, dict[str, Any]] = dict(content["objects"])
            self.rng: dict[str, Any] = dict(content["rng"])
            self._kinds = {key: str(entry["kind"]) for key, entry in self.objects.items()}
        loose = checkpoint.tensors(TRAINER_TENSORS)
        theirs = re.compile(rf"rng\.process-(?!{get_rank()}\.)")  # other processes' generators
        self.loose = {name: loose.tensor(name) for name in loose.names if not theirs.match(name)}

    def kind(self, key: str) -> str:
        return self._kinds[key]

    def names(self, key: str) -> list[str]:
        """Of a model's or optimizer's tensors."""
        with self.decoding(key):
            return self._checkpoint.tensors(str(self.objects[key]["file"])).names

    def tensors(self, key: str, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Of a model or optimizer, each checked; of those whose targets are in pieces, this process's piece."""
        with self.decoding(key):
            file = self._checkpoint.tensors(str(self.objects[key]["file"]))
            extra = self.objects[key].get("extra", {})
            if not any(map(is_cut, targets.values())):
                return {**file.state(), **unflatten(extra, _own(extra, self.loose))}
            found: dict[str, Any] = {}
            for name in file.shapes:
                target = targets.get(name)
                if is_cut(target) and tuple(target.shape) == tuple(file.shapes[name]):
                    found[name] = from_own_piece(file.part(name, local_chunk(target)), target)
                else:
                    found[name] = file.tensor(name)
            found |= {alias: found[name] for alias, name in file.aliases.items()}
            return {**found, **unflatten(extra, _own(extra, self.loose))}

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
        number = get_rank()
        if number == 0:
            return self.loose, self.rng
        prefix = _of_process("rng.", number)
        mine = {"rng." + name.removeprefix(prefix): t for name, t in self.loose.items() if name.startswith(prefix)}
        if not mine:  # of DDP the first process alone is kept: the others stay as they were seeded
            return None
        return mine, json.loads(bytes(mine.pop(_VALUES).numpy()))

    @contextmanager
    def decoding(self, key: str) -> Iterator[None]:
        """Put whatever a file of other content than ours makes Python raise into a sentence."""
        try:
            yield
        except OnymError:
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


def _slots_like(names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """The parameter that each of an optimizer's tensors (``state.<slot>.<name>``) belongs to."""
    parameters = state_dict(model)
    found = {name: parameters.get(name.split(".", 2)[-1]) for name in names}
    return {name: parameter for name, parameter in found.items() if isinstance(parameter, Tensor)}


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
