"""A model's state under its own names, whatever wraps it, in both directions.

Values come from the module's own ``state_dict()``, so its hooks, buffers and extra state are honoured; only the names are
ours. Loading copies into the tensors that are there, so an optimizer keeps its parameters and compiled code stays valid; all
is checked before the first copy, so a load that fails has changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from origo.errors import CheckpointError, ConfigError
from origo.naming.canonical import canonical_names
from origo.naming.mismatch import Described, Differences, MismatchError, compare, explain
from origo.naming.wrappers import unwrap

DtypePolicy = Literal["exact", "cast"]


@dataclass(frozen=True)
class LoadReport:
    """What a load did. All names are canonical."""

    loaded: list[str]
    missing: list[str] = field(default_factory=list)
    """In the model, not stored: left as they were (only with ``strict=False``)."""
    unexpected: list[str] = field(default_factory=list)
    """Stored, not in the model: not used (only with ``strict=False``)."""
    cast: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stored dtype and model dtype, where they differed (only with ``dtype="cast"``)."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Stored name -> name, where a wrapper had changed it."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for count, what in (
            (len(self.renamed), "renamed"),
            (len(self.cast), "cast"),
            (len(self.missing), "left as they were"),
            (len(self.unexpected), "not used"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return ", ".join(parts)


def state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` under the names that the model's author gave, through any nesting of wrappers.

    The tensors are the live ones, detached and not copied: clone them to keep them past the next training step.

    Raises:
        ConfigError: ``model`` is not a module (``torch.compile(torch.compile(m))`` is a function, for one).

    >>> list(state_dict(torch.compile(nn.Linear(2, 1))))
    ['weight', 'bias']
    """
    raw = _require_module(model).state_dict()
    return {canonical: raw[name] for name, canonical in canonical_names(model, raw).items()}


def load_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, dtype: DtypePolicy = "exact"
) -> LoadReport:
    """Copy tensors into a model, plain or wrapped, by canonical name.

    Args:
        model: any module; its tensors keep their identity, device and dtype.
        state: {canonical name: tensor}; not changed. A tied tensor may be given under any of its names.
        strict: refuse names that are missing or unexpected. Shapes must agree in any case.
        dtype: ``"exact"`` refuses a tensor of another dtype, ``"cast"`` converts and reports it.

    Raises:
        MismatchError: it does not fit; nothing has been changed.
    """
    if dtype not in ("exact", "cast"):
        raise ConfigError(f'dtype is "exact" or "cast", not {dtype!r}.')
    # Past the wrappers of the root: a CheckpointWrapper's own loading hook confuses names like its prefix.
    target_module = unwrap(_require_module(model))
    live = target_module.state_dict()
    raw_names = {canonical: raw for raw, canonical in canonical_names(target_module, live).items()}
    ties = _ties({canonical: live[raw] for canonical, raw in raw_names.items()})
    complete = dict(state)
    for name, others in ties.items():
        given = next((other for other in others if other in state), None)
        if name not in complete and given is not None:
            complete[name] = state[given]

    stored, target = describe(complete), describe({name: live[raw] for name, raw in raw_names.items()})
    differences = compare(stored, target)
    refused = Differences(
        missing=differences.missing if strict else [],
        unexpected=differences.unexpected if strict else [],
        shapes=differences.shapes,
        dtypes=differences.dtypes if dtype == "exact" else {},
    )
    if refused:
        raise MismatchError(explain(refused, stored, target), refused)
    _require_equal_ties(ties, complete)

    loaded = [name for name in target if name in complete]
    target_module.load_state_dict({raw_names[name]: complete[name] for name in loaded}, strict=strict)
    return LoadReport(loaded, differences.missing, differences.unexpected, differences.dtypes)


def describe(state: Mapping[str, Any]) -> Described:
    """Names with their shapes and dtypes."""
    return {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) if isinstance(value, Tensor) else ((), "value")
        for name, value in state.items()
    }


def tensor_identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two tensors that are the same memory seen the same way; None where a tensor has no memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _ties(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each name of a tied tensor, its other names."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and (identity := tensor_identity(value)) is not None:
            groups.setdefault(identity, []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group if len(group) > 1}


def _require_equal_ties(ties: Mapping[str, list[str]], state: Mapping[str, Any]) -> None:
    for name, others in ties.items():
        for other in others:
            if name < other and name in state and other in state:
                mine, theirs = state[name], state[other]
                if tensor_identity(mine) != tensor_identity(theirs) and not torch.equal(mine, theirs):
                    raise CheckpointError(
                        f"{name} and {other} are one tensor in this model but differ in what is stored: build the model "
                        "with them untied (for a GPT: tie_embeddings=False)."
                    )


def _require_module(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if callable(model):
        raise ConfigError(
            f"This is a {type(model).__name__}, not a module. torch.compile applied twice, or to a function, gives a "
            "function that has no state: pass the module that was compiled."
        )
    raise ConfigError(f"This is a {type(model).__name__}, not a torch.nn.Module: pass the model itself.")
