"""Appendix E of "Build a Large Language Model From Scratch": a model's file with its adapters in it.

Each ``nn.Linear`` became a ``LinearWithLoRA``: ``X.linear.weight``, ``X.linear.bias``, ``X.lora.A`` [in, rank] and ``X.lora.B``
[rank, out]. The class multiplies the product by alpha itself, not by alpha / rank, and the file does not say alpha. Source:
appendix_e.py of the package ``llms_from_scratch``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from onym.adapters.layer import A, B
from onym.adapters.lora import LoRAConfig
from onym.adapters.renaming import Renaming, is_diagonal, renaming_of
from onym.adapters.stored import StoredAdapter, ends_of, require_whole, with_values
from onym.convert.lazy import mapped_on_disk
from onym.convert.mapping import TRANSPOSED, Change, Joined, Recipe, Shape, View, made, nbytes, zeros
from onym.convert.opening import understood
from onym.convert.registry import Target
from onym.convert.targets import format_named
from onym.convert.translation import their_recipes
from onym.convert.understand import shape_of
from onym.errors import CheckpointError
from onym.format.pth import write_pickle
from onym.format.reader import Checkpoint
from onym.format.safetensors import dtype_called
from onym.format.tensor_writing import Progress
from onym.format.tensors import TensorFile

_A, _B, _LINEAR = ".lora.A", ".lora.B", ".linear."


def is_adapted(names: Collection[str]) -> bool:
    """Whether a file has the names of appendix E."""
    known = set(names)
    return any(name.endswith(_A) and f"{name.removesuffix(_A)}.linear.weight" in known for name in names)


def read(checkpoint: Checkpoint, alpha: float | None = None) -> StoredAdapter:
    """The adapters and their base, apart.

    Args:
        checkpoint: the file, opened.
        alpha: what the class multiplied the product by; the rank by default, as in the book (16 and 16), which is noted.
    """
    origin = checkpoint.origin
    clean: TensorFile = origin.clean
    recipes, others = dict[str, Recipe](), dict[str, Recipe]()
    for name in clean.names:
        if name.endswith((_A, _B)):
            end = A if name.endswith(_A) else B
            recipes[f"{name[: -len(_A)]}.{end}"] = Recipe((name,), TRANSPOSED)
        else:
            layer, _, last = name.rpartition(_LINEAR)
            others[f"{layer}.{last}" if layer and f"{layer}{_A}" in clean.names else name] = Recipe((name,))
    tensors, rest = View(clean, recipes), View(clean, others)
    ranks = {name.removesuffix(f".{A}"): shape_of(tensors, name)[0] for name in tensors.names if name.endswith(f".{A}")}
    notes = []
    factor = alpha
    if factor is None:
        factor = float(max(ranks.values()))
        notes.append(
            f"alpha={factor:g} was assumed, the rank, as in the book: the file does not say. If it was another number, give it "
            "to onym convert (--alpha)."
        )
    config = LoRAConfig(1, 1, 0.0, tuple(ends_of(ranks)))
    config = with_values(config, ranks, {layer: factor * rank for layer, rank in ranks.items()})
    require_whole(checkpoint.path, tensors, config)
    base = understood(
        replace(origin.contents, tensors=rest, kind=f"{origin.contents.kind}, without its adapters"), origin.given
    )
    return StoredAdapter(checkpoint.path, "the book's, with its base", tensors, config, checkpoint, base=base, notes=notes)


def write(
    path: Path, adapter: StoredAdapter, base: Checkpoint, linear: Mapping[str, Shape], progress: Progress | None
) -> list[str]:
    """Write a base and its adapters as one file of the book's.

    Args:
        path: its place, ``.pth``.
        adapter: under the names of the base's architecture.
        base: the base.
        linear: all linear layers of the base, with the shapes of their weights: the book's function gives each an adapter.
        progress: called with the bytes written since the last call.

    Returns:
        Sentences for a report; the first says alpha.

    Raises:
        CheckpointError: the book has no class for this model.
    """
    known = format_named("book", base)
    if base.config is None or known is None or known.architecture != base.architecture or known.target is None:
        raise CheckpointError(f"'{base.path}' is no model that the book has a class for, so it cannot be written as book-lora.")
    target: Target = known.target
    refused = target.refuses(base.config) or next(iter(target.lacks(base.config).values()), None)
    if refused is not None:
        raise CheckpointError(f"'{base.path}' cannot be written as book-lora: {refused}.")
    renaming = renaming_of(known)
    factor = adapter.config.scaling_of(adapter.layers[0])
    lora = _lora(adapter, renaming, factor, linear)
    recipes = their_recipes(base.model, known) | target.added(base.config, next(iter(base.model.dtypes.values())))
    wrapped = {name.removesuffix(_A) for name in lora.names if name.endswith(_A)}
    renamed = {}
    for name, recipe in recipes.items():
        layer, _, last = name.rpartition(".")
        renamed[f"{layer}{_LINEAR}{last}" if layer in wrapped else name] = recipe
    together = Joined(path, [View(base.model, renamed), lora])
    with mapped_on_disk(together, path, progress) as weights:
        write_pickle(path, weights, nbytes(together))
    ranks = {shape_of(lora, name)[1] for name in lora.names if name.endswith(_A)}
    uniform = f"replace_linear_with_lora(model, rank={max(ranks)}, alpha={factor:g})"
    notes = [f"The book's files do not say alpha: make the model's layers with {uniform}, and give --alpha {factor:g} here."]
    if len(ranks) > 1:
        notes.append(f"Its layers have ranks {', '.join(map(str, sorted(ranks)))}: the book's function makes all of one rank.")
    note = target.note(base.config)
    return [*notes, *([note] if note else [])]


def _lora(adapter: StoredAdapter, renaming: Renaming, factor: float, linear: Mapping[str, Shape]) -> View:
    """The adapters as the book has them, all scaled by one factor; layers without one get one that adds nothing."""
    split: dict[str, Recipe] = {}
    turned: dict[str, Recipe] = {}
    kind = next(iter(adapter.tensors.dtypes.values()))
    for layer in dict.fromkeys([*linear, *adapter.layers]):
        named = renaming.to_theirs(layer)
        if named is None:
            raise CheckpointError(f"{renaming.format.title} has no layer {layer}, for which '{adapter.path}' has an adapter.")
        theirs, _ = named
        if layer in adapter.layers:
            split |= Renaming.split(layer, theirs, _in_blocks(adapter, layer, len(theirs)))
            ratio = adapter.config.scaling_of(layer) / factor
            for name in theirs:
                turned[f"{name}{_A}"] = Recipe((f"{name}.{A}",), TRANSPOSED)
                turned[f"{name}{_B}"] = Recipe((f"{name}.{B}",), TRANSPOSED if ratio == 1 else _scaled(ratio))
            continue
        rows, columns = linear[layer]
        for name in theirs:
            turned[f"{name}{_A}"] = Recipe((), _first((columns, adapter.config.rank), kind), kind)
            turned[f"{name}{_B}"] = Recipe((), zeros((adapter.config.rank, rows // len(theirs)), kind), kind)
    return View(View(adapter.tensors, split), turned)


def _in_blocks(adapter: StoredAdapter, layer: str, count: int) -> bool:
    """Whether an adapter is several, one for each part of its layer, as those that were read from a file of the book's."""
    if count == 1 or adapter.config.rank_of(layer) % count:
        return False
    return is_diagonal(adapter.tensors.tensor(f"{layer}.{B}"), count)


def _scaled(ratio: float) -> Change:
    return Change("transposed", TRANSPOSED.shape, lambda tensors: tensors[0].t() * ratio)


def _first(shape: Shape, dtype: str) -> Change:
    """A as the book's class draws it, so that such a layer can be trained: [in, rank]."""

    def make() -> torch.Tensor:
        value = torch.empty(shape, dtype=dtype_called(dtype) or torch.float32, device="cpu")
        return torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))

    return made("given first values", shape, make)
