"""A model's weights, arranged for decoding.

Decoding reads every weight for each token, and little else: its speed is the memory's. So the linear layers are taken in the
narrowest dtype that is wanted, once, and multiplied by what reads them fastest:

- compiled, as a sum over each row of the weights: on a CPU, and of one token or of int8 on a GPU too. For a few tokens the
  compiler makes one loop of it that reads each weight once, whatever its dtype, and all layers become one function
  (:mod:`onym.generation.compiled`, :mod:`onym.generation.captured`)
- not compiled on a CPU, by oneDNN, with the weights in its own order: twice as fast as ``F.linear`` for 1 to 8 tokens
- elsewhere by ``F.linear``

Everything between the products stays in fp32, so a weight in bf16 is rounded where training with ``autocast`` rounded it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onym.generation.ways import Dtype
from onym.gpt.causal_lm import CausalLM
from onym.gpt.hardware import computes_in_bf16

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(dtype: Dtype, device: torch.device) -> Dtype:
    """What ``"auto"`` is on a device."""
    if dtype != "auto":
        return dtype
    return "bf16" if computes_in_bf16(device) else "fp32"


class Product(nn.Module):
    """What a linear layer computes, with its weights as decoding wants them.

    Args:
        linear: the layer; its weights are shared where they have the dtype already.
        dtype: ``fp32``, ``bf16``, or ``int8`` with a factor for each row.
        pack: for a CPU, without compilation: keep them in oneDNN's order alone, where that is faster.
    """

    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    packed: Any

    def __init__(self, linear: nn.Linear, dtype: Dtype, *, pack: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        weight = linear.weight.detach()
        scale = packed = None
        if dtype == "int8":
            weight, scale = rounded_to_int8(weight)
        else:
            weight = weight.to(_TORCH[dtype])
            if pack and weight.device.type == "cpu":
                if weight.nbytes < _SMALL:
                    weight = weight.float()
                else:
                    packed = _packed(weight)
        self.register_buffer("weight", weight if packed is None else None)
        self.register_buffer("scale", scale)
        dtype_of_bias = torch.float32 if packed is None else packed.dtype  # which oneDNN wants to be equal
        if weight.device.type != "cpu" and scale is None:  # as F.linear wants it, rather than to cast it for each token
            dtype_of_bias = weight.dtype
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype_of_bias))
        self.packed = packed  # an opaque tensor: in no state dict

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, in] fp32 -> [batch, time, out] fp32
        if torch.compiler.is_compiling() and (x.device.type == "cpu" or len(x) == 1 or self.scale is not None):
            return self._by_rows(x)
        # In two dimensions: of one row in three, a product in bf16 takes fifteen times as long.
        return self._product(x.flatten(0, -2)).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:  # [rows, in] -> [rows, out]
        if self.packed is not None:
            y = torch.ops.mkldnn._linear_pointwise(x.to(self.packed.dtype), self.packed, self.bias, "none", [], "")
            return y.to(x.dtype)  # type: ignore[no-any-return]
        assert self.weight is not None
        if self.scale is not None:
            return self._by_int8(x)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)

    def _by_rows(self, x: Tensor) -> Tensor:
        """[batch, 1, in] -> [batch, 1, out]. One loop over the weights for all of the batch."""
        assert self.weight is not None
        # Written to memory first: what leads to x would otherwise be computed anew for each row of the weights.
        x = x.contiguous().as_strided(x.shape, x.stride())
        weight = self.weight.float()
        y = torch.stack([(weight * x[sequence, 0]).sum(-1) for sequence in range(x.shape[0])])  # [batch, out]
        if self.scale is not None:
            y = y * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y[:, None]

    def _by_int8(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.scale is not None
        if x.device.type == "cpu" and len(x) <= _FEW:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.weight, self.scale.bfloat16()).float()
        else:
            # Whole numbers up to 127 are exact in bf16, too.
            dtype = torch.bfloat16 if computes_in_bf16(x.device) else torch.float32
            y = F.linear(x.to(dtype), self.weight.to(dtype)).float() * self.scale
        return y if self.bias is None else y + self.bias


_SMALL = 640_000
"""Bytes of weights up to which oneDNN's 40 microseconds a call are more than it saves: those are multiplied in fp32."""
_FEW = 32  # rows up to which the kernel for int8 beats fp32's product of many


def rounded_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [out, in] as int8 and a factor for each row, [out] fp32: the largest of a row becomes 127."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _packed(weight: Tensor) -> Tensor | None:
    """In oneDNN's order; None where this torch or this machine has none for the dtype."""
    if weight.dtype is torch.bfloat16 and not computes_in_bf16(weight.device):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, weight.shape[1], dtype=weight.dtype), packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed  # type: ignore[no-any-return]


def for_decoding(model: CausalLM, dtype: Dtype, *, pack: bool) -> CausalLM:
    """A model whose linear layers are :class:`Product`; everything else is shared with the one that is given.

    Args:
        model: plain or compiled in place; in evaluation mode.
        dtype: see :class:`Product`.
        pack: for a CPU, without compilation.
    """
    copy = type(model).without_values(model.config).eval()
    for name, module in model.named_modules():
        parent, _, attribute = name.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(copy.get_submodule(parent), attribute, Product(module, dtype, pack=pack))
        elif name:
            there = copy.get_submodule(name)
            for key, parameter in module.named_parameters(recurse=False):
                setattr(there, key, nn.Parameter(parameter.detach().float(), requires_grad=False))
    return copy


def bytes_a_token(model: nn.Module) -> int:
    """Bytes of weights that a decoding step reads: those of the products, once each."""
    total = 0
    for module in model.modules():
        if isinstance(module, Product):
            held = module.packed if module.packed is not None else module.weight
            size = module.out_features * module.in_features * held.dtype.itemsize if held is not None else 0
        elif isinstance(module, nn.Linear):
            size = module.weight.numel() * module.weight.dtype.itemsize
        else:
            continue
        total += size
    return total
