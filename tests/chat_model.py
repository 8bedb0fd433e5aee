"""A small model that converses, for several tests: random weights, a tokenizer with the tokens of turns, and its template."""

from __future__ import annotations

from pathlib import Path

import torch

import onym
from onym.checkpoint.checkpointer import Checkpointer
from onym.data.chat_template import ChatTemplate, tokenizer_config
from onym.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the lamp and the river, the stone and the garden\n" * 20, "user assistant system " * 20], 320)
CONTEXT = 128


def scattered() -> onym.GPT:
    """With weights so far apart that what it writes depends on what it read."""
    config = onym.GPTConfig(vocab_size=320, context_length=CONTEXT, emb_dim=32, n_heads=2, n_layers=2, qkv_bias=True)
    model = onym.GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def save(path: Path, source: str, model: onym.GPT) -> ChatTemplate:
    """As training does: the template is in a text beside the weights."""
    template = ChatTemplate(source, TOKENIZER)
    about = tokenizer_config(TOKENIZER, template, CONTEXT)
    with Checkpointer(path) as checkpointer:
        checkpointer.save(1, {"model": model}, files={"tokenizer.json": TOKENIZER.to_json(), "tokenizer_config.json": about})
    return template
