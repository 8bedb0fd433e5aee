"""A linear layer with LoRA's two matrices beside it, and where in a model such layers can stand.

``y = W x + b + (alpha / rank) B A dropout(x)``, of which A [rank, in] and B [out, rank] alone are trained. B begins as zeros,
so nothing changes before the first step. Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021).

The layer is a wrapper (:mod:`onym.names.wrappers`): what it holds keeps its names, and A and B stand beside them, as
``att.qkv.weight``, ``att.qkv.lora_A.weight`` and ``att.qkv.lora_B.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from onym.names.plain_view import plain_view
from onym.names.wrappers import inner_module, unwrap, wrapper_of

A, B = "lora_A.weight", "lora_B.weight"
"""The names of both matrices, after that of the layer."""


class LoRALinear(nn.Module):
    """A linear layer and its adapter.

    Args:
        base_layer: an ``nn.Linear``, or a ``Conv1D`` of transformers, whose weight is [in, out]; perhaps wrapped.
        rank: rows of A and columns of B.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability that an input of A is zeroed while training.
        generator: draws A; torch's own by default.
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = self.weight
        # In fp32 where the base is in less: a step of an optimizer is smaller than what bf16 can add to a weight.
        kind = torch.promote_types(weight.dtype, torch.float32) if weight.dtype.is_floating_point else torch.float32
        with torch.device("meta"):
            self.lora_A = nn.Linear(self.in_features, rank, bias=False, dtype=kind)
            self.lora_B = nn.Linear(rank, self.out_features, bias=False, dtype=kind)
        self.dropout = nn.Dropout(dropout)
        self.rank, self.alpha = rank, alpha
        if weight.device.type != "meta":
            self.lora_A.to_empty(device=weight.device)
            self.lora_B.to_empty(device=weight.device)
            self.reset_parameters(generator)
        self.train(base_layer.training)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A as torch draws a linear layer's weight, B zeros."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y: Tensor = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        change = self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)
        return y + change.to(y.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight of one linear layer that computes the same, in the dtype and layout of the base's."""
        return merged(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling, transposed=self.is_conv1d)

    @property
    def scaling(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / self.rank

    @property
    def is_conv1d(self) -> bool:
        """Whether the base's weight is [in, out]."""
        return is_conv1d(self.base_layer)

    @property
    def weight(self) -> nn.Parameter:
        """The base's, [out, in] (of a Conv1D [in, out]), without the adapter."""
        return cast(nn.Parameter, unwrap(self.base_layer).weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's, [out]."""
        return cast("nn.Parameter | None", unwrap(self.base_layer).bias)

    @property
    def in_features(self) -> int:
        """The width of its input."""
        return self.weight.shape[0 if self.is_conv1d else 1]

    @property
    def out_features(self) -> int:
        """The width of its output."""
        return self.weight.shape[1 if self.is_conv1d else 0]

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"rank={self.rank}, alpha={self.alpha}"


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float, *, transposed: bool = False) -> Tensor:
    """``weight + scaling * b @ a``, computed in fp32 at least, and rounded to the weight's dtype once.

    Args:
        weight: [out, in], or ``transposed`` [in, out].
        a: [rank, in].
        b: [out, rank].
        scaling: alpha / rank.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    change = scaling * (b.to(kind) @ a.to(kind))
    return (weight.to(kind) + (change.t() if transposed else change).to(weight.device)).to(weight.dtype)


@dataclass
class Place:
    """A linear layer in a model, and every slot of the tree that it stands in."""

    path: str
    """Its name without wrappers, the first if there are several."""
    layer: nn.Module
    """The layer, with what wraps it alone; or its LoRALinear."""
    slots: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """Each parent, the layer's name in it, and what stands there without an adapter."""
    paths: list[str] = field(default_factory=list)
    """All of its names."""

    def replace(self, layer: nn.Module) -> None:
        """Put another module there."""
        for parent, name, _ in self.slots:
            parent._modules[name] = layer
        self.layer = layer

    def restore(self) -> None:
        """Put back what stands there without an adapter."""
        for parent, name, base in self.slots:
            parent._modules[name] = base


# Their fused kernels read the weights of the layers inside, which therefore are not called.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def linear_places(model: nn.Module) -> list[Place]:
    """Every linear layer that could have an adapter, in the model's order, the adapted ones included."""
    places: dict[int, Place] = {}
    for path, parent, name, child in _children(unwrap(model), "", ()):
        layer, slot = _inside(child, (parent, name))
        if isinstance(layer, LoRALinear) or _is_linear(unwrap(layer)):
            place = places.setdefault(id(unwrap(layer)), Place(path, layer))
            place.slots.append((*slot, layer.base_layer if isinstance(layer, LoRALinear) else layer))
            place.paths.append(path)
    return list(places.values())


def tied_places(model: nn.Module, places: list[Place]) -> dict[str, str]:
    """The layers whose weight is another module's too, by path, with that parameter's other name."""
    names: dict[int, list[str]] = {}
    for name, parameter in plain_view(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {}
    for place in places:
        own = {f"{path}.weight" for path in place.paths}
        others = [name for name in names.get(id(unwrap(place.layer).weight), []) if name not in own]
        if others:
            found[place.path] = others[0]
    return found


def _children(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module below one: its path without wrappers, its parent, its name there, itself with what wraps it."""
    if isinstance(module, _READS_WEIGHTS):
        return
    for name, child in module._modules.items():
        if child is None:
            continue
        inner_path = f"{path}.{name}" if path else name
        yield inner_path, module, name, child
        inner = unwrap(child)
        if not isinstance(_inside(child, (module, name))[0], LoRALinear) and inner not in above:
            yield from _children(inner, inner_path, (*above, module))


def _inside(child: nn.Module, slot: tuple[nn.Module, str]) -> tuple[nn.Module, tuple[nn.Module, str]]:
    """The LoRALinear that wrappers are around, and where it stands; otherwise the child with its wrappers, and its place."""
    layer, inner = child, slot
    while not isinstance(layer, LoRALinear):
        attribute = wrapper_of(layer)
        if attribute is None:
            return child, slot
        # What torch.compile returns calls the module that it was given, whatever is put into it: it is replaced itself.
        inner = inner if type(layer).__name__ == "OptimizedModule" else (layer, attribute)
        layer = inner_module(layer)
    return layer, inner


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")  # of a parametrised layer it is computed
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and weight is not None and weight.dim() == 2


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer, with what wraps it, is a ``Conv1D`` of transformers, whose weight is [in, out]."""
    return any(cls.__name__ == "Conv1D" for cls in type(unwrap(module)).__mro__)
