"""What a classifier says of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.gpt.causal_lm import CausalLM

_TOGETHER = 32  # texts, in one forward pass


@dataclass(frozen=True)
class Classified:
    """A text's label."""

    label: str
    """The likeliest."""
    probabilities: dict[str, float]
    """Of all labels; together 1."""
    cut: bool
    """Whether the text was longer than the context, so that its end was not read, as in training."""


@torch.inference_mode()
def classify(model: CausalLM, tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Classified]:
    """Classify texts, in their order, some at a time; in evaluation mode, in the dtype of the weights.

    A text is padded behind its last token, which sees nothing of that: so a label does not depend on what is beside it.

    Raises:
        ConfigError: the model is no classifier, or a text is empty.
    """
    if not model.config.labels:
        raise ConfigError(
            "The model predicts tokens, not labels: train a classifier with onym train --from MODEL --classify FILE."
        )
    model.eval()
    batch: list[list[int]] = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ConfigError(f"Text {number:,} is empty: there is nothing to classify.")
        batch.append(tokenizer.encode(text))
        if len(batch) == _TOGETHER:
            yield from _classified(model, batch)
            batch = []
    if batch:
        yield from _classified(model, batch)


def _classified(model: CausalLM, texts: Sequence[list[int]]) -> Iterator[Classified]:
    context, device = model.config.context_length, model.tok_emb.weight.device
    read = [tokens[:context] for tokens in texts]
    padded = torch.zeros(len(read), max(map(len, read)), dtype=torch.long)
    for row, tokens in zip(padded, read, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    last = torch.tensor([len(tokens) - 1 for tokens in read], device=device)
    logits = model(padded.to(device))[torch.arange(len(read), device=device), last]
    for tokens, row in zip(texts, logits.float().softmax(dim=-1).cpu(), strict=True):
        probabilities = dict(zip(model.config.labels, row.tolist(), strict=True))
        yield Classified(max(probabilities, key=probabilities.__getitem__), probabilities, len(tokens) > context)
