"""AdamW with decay for matrices only, and a learning rate that rises linearly and falls as a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from origo.training.options import OptimizationOptions


def build_optimizer(model: nn.Module, options: OptimizationOptions) -> torch.optim.AdamW:
    """AdamW over all parameters, in two groups: matrices with weight decay, biases and norms without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # beta2 0.95 rather than 0.999: GPT-3's choice, which forgets the large gradients of the first steps in time.
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, options: OptimizationOptions) -> float:
    """The rate of one step, counted from 0.

    >>> options = OptimizationOptions(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    >>> [round(learning_rate(step, options), 2) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = min(1.0, (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps))
    share = options.min_learning_rate + (1 - options.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return options.learning_rate * share
