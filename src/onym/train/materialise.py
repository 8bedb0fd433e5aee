"""A GPT on the meta device gets its values block after block, so that no process ever holds more than a block of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from onym.gpt.gpt2 import GPT, Block


def materialise(model: GPT, after_block: Callable[[Block], object], *, draw: bool = True) -> None:
    """Allocate a model's parameters, block after block.

    Args:
        model: of :meth:`GPT.without_values`.
        after_block: is called with each block before the next one is allocated; to shard it, say.
        draw: initialise as ``GPT(config)`` does, with the same random numbers in the same order; False where the values are
            overwritten.
    """
    for layer in model.modules() if draw else ():
        if isinstance(layer, nn.Linear | nn.Embedding):  # its constructor draws values, which the GPT then draws again
            layer.to_empty(device="cpu").reset_parameters()
            layer.to_empty(device="meta")
    for child in model.children():
        for part in child if isinstance(child, nn.ModuleList) else (child,):
            part.to_empty(device="cpu")
            if draw:
                model.reset_parameters(part)
            if isinstance(part, Block):
                after_block(part)
    if model.config.tie_embeddings:
        model.out_head.weight = model.tok_emb.weight


class UpcastLayerNorm(nn.LayerNorm):
    """LayerNorm that upcasts weights that are narrower than its input: those that FSDP all-gathers in bf16."""

    def forward(self, x: Tensor) -> Tensor:  # [..., emb] -> the same
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def upcast_norms(block: Block) -> None:
    """Make a block's norms :class:`UpcastLayerNorm`, in place."""
    for module in block.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = UpcastLayerNorm
