"""The optimizers: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onym.errors import ConfigError
from onym.gpt.gpt2 import GPT
from onym.state.dtensor import local
from onym.train.options import OptimizationOptions


def build_optimizers(model: GPT, options: OptimizationOptions) -> list[torch.optim.Optimizer]:
    """Optimizers over all parameters: matrices with weight decay, biases and norms without.

    Raises:
        ConfigError: this torch has no Muon.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or take --optimizer adamw.")
        # The embeddings and the head are matrices too, but their rows are tokens, each with a gradient of its own size.
        hidden = [parameter for parameter in model.trf_blocks.parameters() if parameter.dim() == 2]
        # Scaled so that an update has AdamW's size, the two share a learning rate (Liu et al., 2025, "Muon is scalable").
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=options.learning_rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
        taken = {id(parameter) for parameter in hidden}
        parameters = [parameter for parameter in parameters if id(parameter) not in taken]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # beta2 0.95 rather than 0.999: GPT-3's choice, which forgets the large gradients of the first steps in time.
    return [*optimizers, torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)]


class Average:
    """An exponential moving average of a model's weights, as a model of its own.

    Args:
        model: a copy of the one whose weights are averaged, on the same device.
        decay: the share that stays at each step; less in the first ones (``(1 + n) / (10 + n)``), or the average would remember
            the random weights of the beginning for ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: GPT, decay: float) -> None:
        self.model = model.requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, bad: Tensor) -> None:
        """Take in the weights after a step, counted from 0; nothing where it was not applied, decided on the device.

        Args:
            bad: 0-d bool.
        """
        share = torch.where(bad, 0.0, 1 - min(self._decay, (1 + step) / (10 + step)))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            local(mine).lerp_(local(theirs), share.to(local(mine).device))
