"""Adapters in a file, whoever wrote them: their matrices under the names of layers, what they are, and which base they need.

Layers are called as the file calls them until :func:`fitted` gives them the names of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from onym.adapters.layer import A, B
from onym.adapters.lora import LoRAConfig
from onym.adapters.renaming import Renaming, renamings
from onym.convert.mapping import Recipe, Shape, View
from onym.convert.understand import shape_of
from onym.errors import CheckpointError
from onym.format.reader import Checkpoint
from onym.format.tensors import TensorFile


@dataclass(frozen=True)
class StoredAdapter:
    """Adapters alone, opened but not read."""

    path: Path
    kind: str
    """Whose layout it is, in words."""
    tensors: TensorFile
    """``<layer>.lora_A.weight`` [rank, in] and ``<layer>.lora_B.weight`` [out, rank]."""
    config: LoRAConfig
    """Its patterns are by the same names of layers."""
    checkpoint: Checkpoint
    """What was opened: its other texts, its hashes."""
    base_name: str = ""
    """What the file calls its base."""
    base: Checkpoint | None = None
    """The base, where it is in the same file."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, in sentences."""

    @property
    def layers(self) -> list[str]:
        """The layers that have adapters."""
        return layers_of(self.tensors.names)

    @property
    def said(self) -> str:
        """In words: ``LoRA adapters of rank 8 (alpha 16) for 12 layers``."""
        ranks = sorted({self.config.rank_of(layer) for layer in self.layers})
        alphas = sorted({self.config.alpha_of(layer) for layer in self.layers})
        rank, alpha = (" and ".join(f"{each:g}" for each in values) for values in (ranks, alphas))
        return f"LoRA adapters of rank {rank} (alpha {alpha}) for {len(self.layers)} layers"


def layers_of(names: Iterable[str]) -> list[str]:
    """The layers that matrices belong to, in order."""
    return list(dict.fromkeys(name.removesuffix(f".{end}") for name in names for end in (A, B) if name.endswith(f".{end}")))


def require_whole(path: Path, tensors: TensorFile, config: LoRAConfig) -> None:
    """Check that each layer has both matrices, of its rank, and that there is nothing else.

    Raises:
        CheckpointError: says which tensor is missing, of another shape, or not LoRA's.
    """
    layers = layers_of(tensors.names)
    wanted = {f"{layer}.{each}" for layer in layers for each in (A, B)}
    if other := next((name for name in tensors.names if name not in wanted), None):
        raise CheckpointError(f"'{path}' has {other}, which is no matrix of LoRA for a linear layer: only those are read here.")
    if missing := sorted(wanted - set(tensors.names)):
        raise CheckpointError(f"'{path}' is incomplete: {missing[0]} is missing.")
    if not layers:
        raise CheckpointError(f"'{path}' is incomplete: it has no matrices of LoRA.")
    for layer in layers:
        a, b = (shape_of(tensors, f"{layer}.{each}") for each in (A, B))
        rank = config.rank_of(layer)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise CheckpointError(
                f"'{path}' does not fit together: {layer} has rank {rank} by its settings, and its matrices are {list(a)} and "
                f"{list(b)}."
            )


def fitted(adapter: StoredAdapter, weights: Mapping[str, Shape], base: str, architecture: str | None) -> StoredAdapter:
    """The adapter under the names of a model's layers.

    Args:
        adapter: under its own names.
        weights: the model's tensors: name -> shape.
        base: what to call the model in a sentence.
        architecture: of the model, where it is registered: then names of its formats are known too.

    Raises:
        CheckpointError: the model has no such layers, or they have other shapes.
    """
    layers = adapter.layers
    found = adapter
    if not all(f"{layer}.weight" in weights for layer in layers):
        renaming = next((each for each in renamings(architecture) if each.fits(layers, weights)), None)
        if renaming is None:
            absent = next(layer for layer in layers if f"{layer}.weight" not in weights)
            raise CheckpointError(
                f"'{adapter.path}' has adapters for {absent}, and {base} has no such layer: they belong to another model"
                f"{f', {adapter.base_name!r}' if adapter.base_name else ''}."
            )
        found = renamed(adapter, renaming)
    for layer in found.layers:
        a, b = (shape_of(found.tensors, f"{layer}.{each}") for each in (A, B))
        shape, wanted = tuple(weights[f"{layer}.weight"]), (b[0], a[1])
        if shape != (wanted[::-1] if layer in found.config.transposed else wanted):
            raise CheckpointError(
                f"'{adapter.path}' has an adapter for a layer {layer} of {wanted[1]} inputs and {wanted[0]} outputs, and in "
                f"{base} its weight is {list(shape)}: it belongs to another model"
                f"{f', {adapter.base_name!r}' if adapter.base_name else ''}."
            )
    return found


def renamed(adapter: StoredAdapter, renaming: Renaming) -> StoredAdapter:
    """The adapter under the architecture's names instead of a format's.

    Several matrices that are one layer there become one adapter, whose rank is the sum of theirs.
    """
    config = adapter.config
    recipes: dict[str, Recipe] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, theirs in renaming.to_ours(adapter.layers).items():
        scaling = config.scaling_of(theirs[0])
        weights = [config.scaling_of(each) / scaling for each in theirs]
        recipes |= renaming.joined(layer, theirs, weights)
        ranks[layer] = sum(config.rank_of(each) for each in theirs)
        alphas[layer] = scaling * ranks[layer] if len(theirs) > 1 else config.alpha_of(theirs[0])
    return replace(
        adapter,
        tensors=View(adapter.tensors, recipes),
        config=with_values(replace(config, transposed=(), targets=tuple(ends_of(ranks))), ranks, alphas),
    )


def with_values(config: LoRAConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoRAConfig:
    """A configuration in which the layers have these ranks and alphas: the commonest are its own, others are patterns."""
    rank = int(_commonest(ranks.values()))
    alpha = _commonest(alphas.values())
    return replace(
        config,
        rank=rank,
        alpha=alpha,
        rank_pattern={layer: each for layer, each in ranks.items() if each != rank},
        alpha_pattern={layer: each for layer, each in alphas.items() if each != alpha},
    )


def ends_of(layers: Iterable[str]) -> list[str]:
    """What is said of layers in a few words: their names without what comes before the number of a block.

    >>> ends_of(["trf_blocks.0.att.qkv", "trf_blocks.1.att.qkv", "out_head"])
    ['att.qkv', 'out_head']
    """
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", layer) for layer in layers))


def weights_of(checkpoint: Checkpoint) -> dict[str, Shape]:
    """The shapes of a checkpoint's tensors, by all of their names."""
    model = checkpoint.model
    return {name: tuple(model.shapes[model.aliases.get(name, name)]) for name in model.names}


def _commonest(values: Iterable[float]) -> float:
    listed = list(values)
    return max(dict.fromkeys(listed), key=listed.count)
