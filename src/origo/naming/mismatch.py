"""How a file and a model differ, in words: the likely cause and the remedy first, then a few of the names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from origo.errors import CheckpointError
from origo.naming.wrappers import wrapper_prefixes

_SHOWN = 4  # names listed of each kind; all of them are on the exception

Described = Mapping[str, tuple[tuple[int, ...], str]]
"""Names with their shape and dtype; values that are no tensors have shape () and the dtype "value"."""


@dataclass(frozen=True)
class Differences:
    """What does not fit. All names are canonical; "stored" is the file's side, "model" the live one's."""

    missing: list[str] = field(default_factory=list)
    """In the model, not in the file."""
    unexpected: list[str] = field(default_factory=list)
    """In the file, not in the model."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Stored and model shape, where they differ."""
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stored and model dtype, where they differ."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.dtypes)


class MismatchError(CheckpointError):
    """The stored tensors and the model do not fit; ``differences`` has all of the names."""

    def __init__(self, message: str, differences: Differences) -> None:
        super().__init__(message)
        self.differences = differences


def compare(stored: Described, model: Described) -> Differences:
    """Hold two descriptions against each other."""
    both = [name for name in model if name in stored]
    return Differences(
        missing=[name for name in model if name not in stored],
        unexpected=[name for name in stored if name not in model],
        shapes={name: (stored[name][0], model[name][0]) for name in both if stored[name][0] != model[name][0]},
        dtypes={name: (stored[name][1], model[name][1]) for name in both if stored[name][1] != model[name][1]},
    )


def explain(differences: Differences, stored: Described, model: Described) -> str:
    """The differences as a few sentences, the most likely cause first."""
    lines = [
        "The stored tensors do not fit this model; nothing was changed.",
        *_causes(differences, stored, model),
    ]
    for names, what in (
        (differences.missing, "in the model but not stored"),
        (differences.unexpected, "stored but not in the model"),
    ):
        if names:
            lines.append(f"{len(names)} {what}: {_listed(names)}.")
    if differences.shapes:
        shown = [f"{name} {list(was)} stored, {list(now)} in the model" for name, (was, now) in differences.shapes.items()]
        lines.append(f"{len(shown)} of another shape: {_listed(shown)}.")
    if differences.dtypes:
        shown = [f"{name} {was} stored, {now} in the model" for name, (was, now) in differences.dtypes.items()]
        lines.append(f"{len(shown)} of another dtype: {_listed(shown)}.")
    return "\n".join(lines)


def _causes(differences: Differences, stored: Described, model: Described) -> list[str]:
    causes = []
    prefixes = wrapper_prefixes()
    polluted = sorted({segment for name in differences.unexpected for segment in name.split(".") if segment in prefixes})
    if polluted and differences.missing:
        causes.append(
            f"Stored names contain {', '.join(f'`{segment}.`' for segment in polluted)}: they were saved from a wrapped model "
            "(torch.compile, DDP, …). origo.load(path, into=model) puts such names right."
        )
    stored_layers, model_layers = _layers(stored), _layers(model)
    if stored_layers and model_layers and stored_layers != model_layers:
        causes.append(
            f"Stored with {stored_layers} blocks, this model has {model_layers}: build it with n_layers={stored_layers}."
        )
    vocabularies = {shapes for name, shapes in differences.shapes.items() if name in ("tok_emb.weight", "out_head.weight")}
    for was, now in vocabularies:
        if was[1:] == now[1:]:
            causes.append(f"Stored with a vocabulary of {was[0]}, this model has {now[0]}: build it with vocab_size={was[0]}.")
        else:
            causes.append(f"Stored with a width of {was[-1]}, this model has {now[-1]}: build it with emb_dim={was[-1]}.")
    if any(name.endswith(("att.W_query.weight", "norm1.scale")) for name in stored):
        causes.append(
            "Stored names are those of the book's GPTModel (W_query, scale): only the optimised GPTModel (att.qkv, "
            "norm1.weight) has the same layout as origo.GPT."
        )
    if differences.dtypes and not (differences.missing or differences.unexpected or differences.shapes):
        causes.append('Only dtypes differ: pass dtype="cast" to convert while loading.')
    return causes


def _layers(described: Described) -> int:
    """How many numbered blocks the most numerous list of modules has."""
    numbers = [int(match.group(1)) for name in described if (match := re.match(r"^[A-Za-z_.]*?\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
