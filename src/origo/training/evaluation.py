"""The held-out loss: the same tokens in the same order each time, without compilation."""

from __future__ import annotations

import torch
from torch import nn

from origo.data.batches import IGNORED_TARGET, evaluation_batches
from origo.data.tokens import TokenStream
from origo.models.eager import without_compilation
from origo.training.precision import Compute


def held_out_loss(
    model: nn.Module, stream: TokenStream, context_length: int, batch_size: int, limit: int, compute: Compute
) -> float:
    """Mean cross-entropy in nats a token over at most ``limit`` batches; NaN where the stream has nothing to predict."""
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode(), compute.autocast(), without_compilation():
        for inputs, targets in evaluation_batches(stream, context_length, batch_size, limit):
            counted = int((targets != IGNORED_TARGET).sum())
            loss = model(inputs.to(compute.device), targets.to(compute.device))
            total += float(loss) * counted
            tokens += counted
    model.train(was_training)
    return total / tokens if tokens else float("nan")
