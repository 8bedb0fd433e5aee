"""From logits to the next token: temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onym.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8
    """Below 1 sharper, above 1 more varied; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (nucleus sampling); 1 for all."""

    def check(self) -> None:
        """Raise a ConfigError for a value out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature must be 0 or more, not {self.temperature}.")
        if self.top_k < 0:
            raise ConfigError(f"--top-k must be 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be above 0 and at most 1, not {self.top_p}.")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token for each row.

    Args:
        logits: [batch, vocab], any float dtype.
        sampling: how.
        generator: on the logits' device.

    Returns:
        [batch] int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # Below the largest, so that a tiny temperature leads to -inf and never to a NaN.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token stays when those before it have not reached top_p yet; so the first one always does.
        beyond = probability.cumsum(dim=-1) - probability >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    try:
        return logits.softmax(dim=-1).multinomial(1, generator=generator).squeeze(-1)
    except RuntimeError as error:
        raise CheckpointError("The model's output is non-finite, and so are its weights: take an earlier step.") from error
