"""A model's logits from the tensors of a file, one layer in memory at a time: what a conversion must not change."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from onym.convert.registry import Config
from onym.format.tensors import TensorFile
from onym.gpt.causal_lm import CausalLM
from onym.gpt.config import GPTConfig
from onym.gpt.decoder import Decoder
from onym.gpt.decoder_config import DecoderConfig
from onym.gpt.gpt2 import GPT

_TRIED = 16  # tokens


def gpt_logits(tensors: TensorFile, values: Config) -> Tensor:
    """Of a GPT-2: [1, 16, vocab or labels], fp32, for the same tokens each time."""
    return _logits(GPT.without_values(GPTConfig.from_dict(values)), tensors)


def decoder_logits(tensors: TensorFile, values: Config) -> Tensor:
    """Of a decoder: [1, 16, vocab or labels], fp32, for the same tokens each time."""
    return _logits(Decoder.without_values(DecoderConfig.from_dict(values)), tensors)


@torch.no_grad()
def _logits(model: CausalLM, tensors: TensorFile) -> Tensor:
    model.eval()
    config = model.config
    tokens = torch.arange(min(_TRIED, config.context_length), device="cpu") * 7919 % config.vocab_size
    positions = torch.arange(len(tokens), device="cpu")

    def weights(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: tensors.tensor(f"{prefix}.{name}", verify=False).float() for name in module.state_dict()}

    x = _rows(tensors, "tok_emb.weight", tokens)[None]
    if isinstance(model, GPT):
        x = x + _rows(tensors, "pos_emb.weight", positions)
    known = model.per_position(positions)
    for number, block in enumerate(model.trf_blocks):
        x = functional_call(block, weights(f"trf_blocks.{number}", block), (x, None, None, *known))
    x = functional_call(model.final_norm, weights("final_norm", model.final_norm), (x,))
    head = tensors.tensor("out_head.weight", verify=False)
    logits = torch.cat([x @ rows.float().t() for rows in head.split(4096)], dim=-1)
    return logits + tensors.tensor("out_head.bias", verify=False).float() if config.head_bias else logits


def _rows(tensors: TensorFile, name: str, numbers: Tensor) -> Tensor:
    rows: Tensor = tensors.tensor(name, verify=False)[numbers]
    return rows.float()
