"""Weights that are computed from others: weight_norm, spectral_norm, pruning. A renamed part would be another weight.

See :mod:`onym.names.diagnose`. Old and new forms of torch's are known by what their parameters are called.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from onym.names.case import Case
from onym.names.mismatch import clip


@dataclass(frozen=True)
class _Reparametrisation:
    """A weight that is computed from others, which are stored in its place."""

    name: str
    parts: frozenset[str]
    """What the names of these begin with, behind that of the weight."""
    add: str
    """The call that adds it to ``layer``, whose weight ``of`` is."""
    remove: str = "torch.nn.utils.parametrize.remove_parametrizations(layer, '{of}')"


_REPARAMETRISATIONS = (
    _Reparametrisation(
        "weight_norm",
        frozenset({"_g", "_v"}),
        "torch.nn.utils.weight_norm(layer, '{of}')",
        "torch.nn.utils.remove_weight_norm(layer, '{of}')",
    ),
    _Reparametrisation(
        "pruning",
        frozenset({"_orig", "_mask"}),
        "torch.nn.utils.prune.identity(layer, '{of}')",
        "torch.nn.utils.prune.remove(layer, '{of}')",
    ),
    _Reparametrisation(
        "spectral_norm",
        frozenset({"_orig", "_u"}),
        "torch.nn.utils.spectral_norm(layer, '{of}')",
        "torch.nn.utils.remove_spectral_norm(layer, '{of}')",
    ),
    _Reparametrisation(
        "weight_norm", frozenset({"original0", "original1"}), "torch.nn.utils.parametrizations.weight_norm(layer, '{of}')"
    ),
    _Reparametrisation(
        "spectral_norm", frozenset({"original", "0._u"}), "torch.nn.utils.parametrizations.spectral_norm(layer, '{of}')"
    ),
    _Reparametrisation(
        "a parametrisation",
        frozenset({"original"}),
        "torch.nn.utils.parametrize.register_parametrization(layer, '{of}', …)",
    ),
)


def reparametrised(case: Case) -> None:
    """Weights that one side computes from others and the other side has as they are."""
    for names, others, stored in ((case.unexpected, case.missing, True), (case.missing, case.unexpected, False)):
        weights: dict[str, dict[str, str]] = defaultdict(dict)
        for name in names:
            if match := re.fullmatch(r"(.*\.)?parametrizations\.(\w+)\.(.+)", name):
                weights[(match[1] or "") + match[2]][match[3]] = name
            elif match := re.fullmatch(r"(.+)(_(?:g|v|u|orig|mask))", name):
                weights[match[1]][match[2]] = name
        for kind in _REPARAMETRISATIONS:
            found = {
                weight: list(parts.values())
                for weight, parts in weights.items()
                if weight in others and kind.parts <= parts.keys()
            }
            if not found:
                continue
            weight, parts = next(iter(found.items()))
            add, remove = (call.format(of=weight.rpartition(".")[2]) for call in (kind.add, kind.remove))
            computed = f"({weight} is computed from {' and '.join(map(clip, parts))})"
            if stored:
                text = (
                    f"Stored with {kind.name} {computed}, this model has the plain weight: call {add} for the same layers, "
                    f"load, and then {remove} if the plain weight is to stay."
                )
            else:
                text = f"This model has {kind.name} {computed}, the file has the plain weight: load first, and then call {add}."
            case.found(text, [name for weight, parts in found.items() for name in (weight, *parts)])
