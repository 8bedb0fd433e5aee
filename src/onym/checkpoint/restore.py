"""The files of one checkpoint -> the objects of a training loop. Everything is read and checked before anything is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from onym.checkpoint.snapshot import RNG_VALUES, generator_name, is_optimizer, model_of
from onym.errors import CheckpointError, ConfigError, OnymError, nearest
from onym.format.manifest import MODEL, TRAINER, TRAINER_TENSORS, parse_json
from onym.format.reader import Checkpoint
from onym.names.mismatch import compare
from onym.names.plain_view import plain_view
from onym.state.collectives import get_rank, run_on_all_ranks
from onym.state.composite import build_like
from onym.state.dtensor import any_sharded, from_local_chunk, has_chunks, local_chunk
from onym.state.model import DtypePolicy, LoadReport, describe, load_state_dict, named_state, refused_of
from onym.state.offloaded import require_not_offloaded
from onym.state.optimizer import Difference, OptimizerReport, prepare_optimizer_state
from onym.state.patterns import matches, require_patterns
from onym.state.rng import load_rng_state, require_rng_state
from onym.state.tree import unflatten
from onym.state.undo import undone_on_failure

Reports = dict[str, LoadReport | OptimizerReport]
"""By the name of a model or optimizer, what its restore did."""


@dataclass(frozen=True)
class Policy:
    """The differences to go on with: as the arguments of ``load_state_dict`` and ``load_optimizer_state``."""

    strict: bool = True
    dtype: DtypePolicy = "exact"
    accept: Difference | Iterable[Difference] = ()
    skip_mismatched: str | Iterable[str] = ()


def restore_state(
    checkpoint: Checkpoint, state: Mapping[str, Any], *, rng: bool = True, policy: Policy = Policy()
) -> tuple[dict[str, Any], Reports]:
    """Restore objects from a checkpoint.

    Args:
        checkpoint: an open one.
        state: the objects, under the names that they were saved under; any may be left out. A dict or list of plain values is
            filled in place, and a torch.Generator in it gets the stored state.
        rng: restore the random number generators too.
        policy: what may differ.

    Returns:
        The plain values that the checkpoint has, and what was done to models and optimizers.

    Raises:
        CheckpointError: it has nothing under one of the names, or something of another kind, on any rank.
        MismatchError: it does not fit.
    """
    collective = isinstance(state, Mapping) and any_sharded(state.values())
    return _apply(state, run_on_all_ranks(lambda: _decoded(checkpoint, state, rng), collective), policy)


def _decoded(checkpoint: Checkpoint, state: Mapping[str, Any], rng: bool) -> _Decoded:
    """The state of all objects, read, verified and decoded. Nothing has been changed."""
    if not isinstance(state, Mapping):
        raise ConfigError(
            f'restore takes a dict like {{"model": model, "optimizer": optimizer}}, not a {type(state).__name__}.'
        )
    stored = _Stored(checkpoint)
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
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
            require_not_offloaded(value)
            live = named_state(value)
            decoded[key] = build_like(stored.tensors(key, live), live)
        elif stored.kind(key) == "optimizer":
            decoded[key] = stored.tensors(key, _slots_like(stored.names(key), model_of(key, value, modules)))
        else:
            decoded[key] = stored.plain(key)
        filled = isinstance(value, dict | list | torch.Generator) and stored.kind(key) == "values"
        if filled and not isinstance(decoded[key], type(value)):
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


def _apply(state: Mapping[str, Any], content: _Decoded, policy: Policy) -> tuple[dict[str, Any], Reports]:
    """Change the objects."""
    stored, modules, decoded = content.stored, content.modules, content.objects
    names = {key: named_state(module) for key, module in modules.items()}
    patterns = require_patterns(policy.skip_mismatched, {name: None for each in names.values() for name in each})
    skipping = {key: _matching(patterns, each) for key, each in names.items()}
    reports: Reports = {}

    def load(key: str) -> None:
        reports[key] = load_state_dict(
            modules[key], decoded[key], strict=policy.strict, dtype=policy.dtype, skip_mismatched=skipping[key]
        )

    fitting = {key: _fits(decoded[key], each, skipping[key], policy) for key, each in names.items()}
    changes: dict[str, Callable[[], OptimizerReport]] = {}
    with ExitStack() as undone:
        for key, module in modules.items():  # one that does not fit says so before any other is changed for good
            if not fitting[key]:
                undone.enter_context(undone_on_failure(plain_view(module), decoded[key]))
                load(key)
        for key, value in state.items():
            if stored.kind(key) == "optimizer":
                with stored.decoding(key):
                    model, description = model_of(key, value, modules), stored.objects[key]["state"]
                    among = _matching(patterns, (name for group in description["groups"] for name in group["params"]))
                    changes[key] = prepare_optimizer_state(
                        model, value, decoded[key], description, accept=policy.accept, skip_mismatched=among
                    )
    reports |= {key: change() for key, change in changes.items()}
    for key, value in state.items():
        if stored.kind(key) == "model" and fitting[key]:
            load(key)
        elif stored.kind(key) == "state":
            with stored.decoding(key):
                value.load_state_dict(decoded[key])
        elif stored.kind(key) == "values":
            restored = _with_live_generators(decoded[key], value)
            if isinstance(value, dict):
                value.clear()
                value.update(restored)
            elif isinstance(value, list):
                value[:] = restored
    if content.generators is not None:
        load_rng_state(*content.generators)
    return content.values, {key: reports[key] for key in state if key in reports}


def _with_live_generators(stored: Any, live: Any) -> Any:
    """Stored values, with the live generators at their places, which others draw from: they get the stored state."""
    if isinstance(stored, torch.Generator) and isinstance(live, torch.Generator) and stored.device == live.device:
        return live.set_state(stored.get_state())
    if type(stored) is dict and isinstance(live, Mapping):
        return {key: _with_live_generators(value, live.get(key)) for key, value in stored.items()}
    if type(stored) is list and isinstance(live, list):
        return [_with_live_generators(*pair) for pair in zip_longest(stored, live[: len(stored)])]
    return stored


def _matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The patterns that match one of these names."""
    known = list(names)
    return [pattern for pattern in patterns if any(matches([pattern], name) for name in known)]


def _fits(stored: Mapping[str, Any], live: Mapping[str, Any], skipping: Iterable[str], policy: Policy) -> bool:
    """Whether a model will load without its own loading code being asked."""
    differences = compare(describe(stored), describe(live, stored))
    for name in [name for name in differences.shapes if matches(skipping, name)]:
        del differences.shapes[name]
        differences.dtypes.pop(name, None)
    return not refused_of(differences, strict=policy.strict, dtype=policy.dtype) and len(differences.missing) < len(live)


def stored_extra_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the modules of a checkpoint's model store of their own making, by name; empty where it is not of a training."""
    if checkpoint.text(TRAINER) is None:
        return {}
    stored = _Stored(checkpoint)
    return next((stored.extra(key) for key, entry in stored.objects.items() if entry.get("file") == MODEL), {})


def stored_optimizer(checkpoint: Checkpoint, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer in a checkpoint, as :func:`onym.state.optimizer.optimizer_state` returns it.

    Raises:
        CheckpointError: it holds no optimizer of this name, or is damaged.
    """
    stored = _Stored(checkpoint)
    found = [key for key in stored.objects if stored.kind(key) == "optimizer"]
    if name not in found:
        raise CheckpointError(
            f"'{checkpoint.path}' holds no optimizer called {name!r}; its optimizers: {', '.join(found) or 'none'}."
        )
    with stored.decoding(name):
        return stored.tensors(name, {}), dict(stored.objects[name]["state"])


def stored_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain values that a checkpoint has, by name."""
    return _Stored(checkpoint).values()


def stored_generators(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain values of the random number generators in a checkpoint."""
    return _Stored(checkpoint).rng


def stored_objects(checkpoint: Checkpoint) -> list[str]:
    """The names of all objects in a checkpoint: models, optimizers, whatever had a ``state_dict()``, plain values."""
    return list(_Stored(checkpoint).objects)


@dataclass(frozen=True)
class _Decoded:
    """The state of all objects that are to be restored."""

    stored: _Stored
    modules: dict[str, nn.Module]
    objects: dict[str, Any]
    values: dict[str, Any]
    """The plain values that the checkpoint has."""
    generators: tuple[dict[str, Tensor], dict[str, Any]] | None


class _Stored:
    """The content of a checkpoint's ``trainer.json``, decoded when it is asked for."""

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
        theirs = re.compile(rf"rng\.process-(?!{get_rank()}\.)")  # other ranks' generators
        self.loose = {name: loose.tensor(name) for name in loose.names if not theirs.match(name)}

    def kind(self, key: str) -> str:
        return self._kinds[key]

    def names(self, key: str) -> list[str]:
        """Of a model's or optimizer's tensors."""
        with self.decoding(key):
            return self._checkpoint.tensors(str(self.objects[key]["file"])).names

    def tensors(self, key: str, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a model or optimizer, verified; of sharded targets this rank's chunks."""
        with self.decoding(key):
            file = self._checkpoint.tensors(str(self.objects[key]["file"]))
            extra = self.extra(key)
            if not any(map(has_chunks, targets.values())):
                return {**file.state(), **extra}
            tensors: dict[str, Any] = {}
            for name in file.shapes:
                target = targets.get(name)
                if has_chunks(target) and tuple(target.shape) == tuple(file.shapes[name]):
                    tensors[name] = from_local_chunk(file.part(name, local_chunk(target).slices), target)
                else:
                    tensors[name] = file.tensor(name)
            return {**tensors, **{alias: tensors[name] for alias, name in file.aliases.items()}, **extra}

    def extra(self, key: str) -> dict[str, Any]:
        """Of a model the values that are no tensors."""
        with self.decoding(key):
            return dict(self._unflatten(self.objects[key].get("extra", {})))

    def plain(self, key: str) -> Any:
        """A structure with its tensors."""
        with self.decoding(key):
            return self._unflatten(self.objects[key]["state"])

    def _unflatten(self, structure: Any) -> Any:
        """Its tensors have memory of their own: the caller may use them when the file is gone."""
        return unflatten(structure, self.loose, lambda _, tensor: tensor.clone())

    def values(self) -> dict[str, Any]:
        """All plain values."""
        return {key: self.plain(key) for key in self.objects if self.kind(key) == "values"}

    def generators(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """This rank's random number generators; None where fewer ranks saved theirs."""
        rank = get_rank()
        if rank == 0:
            return self.loose, self.rng
        prefix = generator_name("rng.", rank)
        own = {"rng." + name.removeprefix(prefix): t for name, t in self.loose.items() if name.startswith(prefix)}
        if not own:  # under DDP only rank 0 saves: the others stay as they were seeded
            return None
        return own, json.loads(bytes(own.pop(RNG_VALUES).numpy()))

    @contextmanager
    def decoding(self, key: str) -> Iterator[None]:
        """Turn what a file with other content than ours makes Python raise into a sentence."""
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
                f"What '{self._checkpoint.path}' holds as {key!r} cannot be restored ({reason[:200]}): it is damaged, or of "
                "another kind of object than the one given."
            ) from error


def _slots_like(names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """The parameter that each of an optimizer's tensors (``state.<slot>.<name>``) belongs to."""
    parameters = named_state(model)
    found = {name: parameters.get(name.split(".", 2)[-1]) for name in names}
    return {name: parameter for name, parameter in found.items() if isinstance(parameter, Tensor)}


def _kind_of(value: Any) -> str:
    if isinstance(value, nn.Module):
        return "model"
    if is_optimizer(value):
        return "optimizer"
    return "state" if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") else "values"
