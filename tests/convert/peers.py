"""Other people's models, made with their own packages, small and with random weights; nanoGPT's from its description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BOOK = {"vocab_size": 97, "context_length": 24, "emb_dim": 64, "n_heads": 1, "n_layers": 3, "drop_rate": 0.1, "qkv_bias": False}


def tokens(vocabulary: int = 97, length: int = 24) -> Tensor:
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(3))


def book(**changes: Any) -> nn.Module:
    from llms_from_scratch.ch04 import GPTModel

    return scattered(GPTModel({**BOOK, **changes}))


def book_fast(**changes: Any) -> nn.Module:
    from llms_from_scratch.ch04 import GPTModelFast

    return scattered(GPTModelFast({**BOOK, **changes}))


def book_without_masks(**changes: Any) -> nn.Module:
    """The book's model with a KV cache: its mask is no buffer that is stored."""
    from llms_from_scratch.kv_cache.gpt2 import GPTModel

    return scattered(GPTModel({**BOOK, **changes}))


def huggingface(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 97, "n_positions": 24, "n_embd": 64, "n_head": 4, "n_layer": 3, "bos_token_id": 0, "eos_token_id": 0}
    return scattered(GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})))


def scattered(model: nn.Module) -> nn.Module:
    """With values everywhere, so that a bias or norm which is lost shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out[0] if isinstance(out, tuple) else out


class NanoGPT(nn.Module):
    """A model with nanoGPT's names and arithmetic: nn.Linear, exact GELU, one matrix for both ends, biases or none."""

    def __init__(
        self, n_layer: int, n_head: int, n_embd: int, block_size: int, bias: bool, vocab_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.n_head = n_head
        linear: Callable[[int, int], nn.Linear] = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=bias)  # noqa: E731
        layer = lambda: nn.ModuleDict(  # noqa: E731
            {
                "ln_1": nn.LayerNorm(n_embd, bias=bias),
                "attn": nn.ModuleDict({"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)}),
                "ln_2": nn.LayerNorm(n_embd, bias=bias),
                "mlp": nn.ModuleDict({"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)}),
            }
        )
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(layer() for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1], device=ids.device))
        for h in self.transformer.h:
            q, k, v = (
                part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                for part in h["attn"]["c_attn"](h["ln_1"](x)).chunk(3, dim=-1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + h["attn"]["c_proj"](y)
            x = x + h["mlp"]["c_proj"](F.gelu(h["mlp"]["c_fc"](h["ln_2"](x))))
        return self.lm_head(self.transformer.ln_f(x))

    def optimizer(self) -> torch.optim.AdamW:
        """As nanoGPT groups its parameters."""
        parameters = dict(self.named_parameters())
        decayed = [p for p in parameters.values() if p.dim() >= 2]
        rest = [p for p in parameters.values() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


ARGUMENTS = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 24, "bias": False, "vocab_size": 97, "dropout": 0.0}


def nanogpt(path: Path, *, compiled: bool = False, steps: int = 2, **changes: Any) -> NanoGPT:
    """Train nanoGPT's model for some steps and keep it as its train.py does, at ``path``."""
    arguments = {**ARGUMENTS, **changes}
    model = scattered(NanoGPT(**arguments)).train()
    optimizer = model.optimizer()
    for step in range(steps):
        ids = tokens(arguments["vocab_size"]).roll(step)
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = torch.compile(model) if compiled else model
    torch.save(
        {
            "model": kept.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": arguments,
            "iter_num": steps,
            "best_val_loss": torch.tensor(3.5),
            "config": {"learning_rate": 1e-3, "compile": compiled},
        },
        path,
    )
    return model.eval()
