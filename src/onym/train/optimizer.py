"""The optimizers: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from onym.errors import ConfigError
from onym.gpt.causal_lm import CausalLM
from onym.gpt.kinds import Arch
from onym.gpt.models import arch_named
from onym.state.dtensor import is_sharded, local
from onym.train.finetune_options import DEFAULT_EPOCHS
from onym.train.options import LENGTHS, OptimizationOptions, TrainOptions

_FIRST_MOMENTUM, _MOMENTUM = 0.85, 0.95  # of Muon; modded-nanogpt's warm-up, and torch's default
_PEAK_RATES = {"muon": 1e-2, "adamw": 3e-3}
# The share of these that Muon's matrices have, and the steps in which its momentum rises; measured with nano, see
# docs/performance.md.
_MUON: dict[Arch, tuple[float, int]] = {"gpt2": (1.0, 0), "llama": (0.5, 200), "qwen3": (0.5, 200)}
# Of these rates, for the weights of a trained model that learns to answer or to classify: at GPT-2's width the book's 5e-5. An
# adapter, which begins as nothing, is trained at the full rate.
_TUNING_SHARE = 0.1
_PEAK_WIDTH = 128  # up to which the rates above hold: measured for 128 (Muon) and 256 (AdamW), see docs/performance.md


def resolved(options: OptimizationOptions, arch: Arch, width: int, *, muon: bool, share: float = 1.0) -> OptimizationOptions:
    """The options with the optimizer and the learning rate that a run uses, where they were not given.

    Args:
        arch, width: of the model.
        muon: whether ``auto`` may choose it: where weights are full, and training starts from the first weights.
        share: of the usual learning rate.
    """
    kind = options.optimizer
    if kind == "auto":
        kind = "muon" if muon and hasattr(torch.optim, "Muon") else "adamw"
    rate = options.learning_rate or share * _PEAK_RATES[kind] * min(1.0, _PEAK_WIDTH / width)
    options = replace(options, optimizer=kind, learning_rate=rate)
    if kind != "muon":
        return options
    of_matrices, warmup = _MUON[arch]
    return replace(
        options,
        muon_learning_rate=options.muon_learning_rate or of_matrices * rate,
        muon_momentum_warmup=warmup if options.muon_momentum_warmup is None else options.muon_momentum_warmup,
    )


def with_recipe(options: TrainOptions) -> TrainOptions:
    """A run's options with its kind of model, optimizer and learning rates: stored with it, they hold when it is resumed."""
    muon = options.run.parallel == "ddp" and options.model.start_from is None
    width = options.model.config(vocab_size=1).emb_dim
    model = replace(options.model, arch=options.model.kind)
    task, optimization = options.finetune.task, options.optimization
    if task is not None and all(getattr(optimization, name) is None for name in LENGTHS):
        optimization = replace(optimization, epochs=DEFAULT_EPOCHS[task])
    share = _TUNING_SHARE if task is not None and options.finetune.lora is None else 1.0
    return replace(options, model=model, optimization=resolved(optimization, model.kind, width, muon=muon, share=share))


def build_optimizers(model: CausalLM, options: OptimizationOptions) -> list[torch.optim.Optimizer]:
    """Optimizers over all parameters: matrices with weight decay, biases and norms without.

    Raises:
        ConfigError: this torch has no Muon.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = resolved(options, arch_named(model.config), model.config.emb_dim, muon=not any(map(is_sharded, parameters)))
    assert options.learning_rate is not None
    optimizers: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or take --optimizer adamw.")
        # The embeddings and the head are matrices too, but their rows are tokens, each with a gradient of its own size.
        hidden = [parameter for parameter in model.trf_blocks.parameters() if parameter.dim() == 2 and parameter.requires_grad]
        # Scaled so that an update has AdamW's size, rates are of the same order (Liu et al., 2025, "Muon is scalable").
        assert options.muon_learning_rate is not None
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=options.muon_learning_rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
        taken = {id(parameter) for parameter in hidden}
        parameters = [parameter for parameter in parameters if id(parameter) not in taken]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # beta2 0.95 rather than 0.999: GPT-3's choice, which forgets the large gradients of the first steps in time.
    groups = [group for group in groups if group["params"]]
    return [*optimizers, torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)]


def set_rates(optimizers: Iterable[torch.optim.Optimizer], options: OptimizationOptions, rate: float, number: int) -> None:
    """Set what the optimizers take of a schedule for one step.

    Args:
        options: resolved.
        rate: AdamW's learning rate; Muon's keeps its proportion to that.
        number: of the step, from 0.
    """
    assert options.learning_rate is not None
    for optimizer in optimizers:
        is_muon = not isinstance(optimizer, torch.optim.AdamW)
        share = (options.muon_learning_rate or options.learning_rate) / options.learning_rate if is_muon else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rate * share if share != 1.0 else rate
            if is_muon:  # without a warm-up too: a resumed run may have had one, which it left in the middle
                warmup = options.muon_momentum_warmup
                risen = min(1.0, number / warmup) if warmup else 1.0
                group["momentum"] = _FIRST_MOMENTUM + risen * (_MOMENTUM - _FIRST_MOMENTUM)


@torch.no_grad()
def step_unless(bad: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Step where ``bad`` (0-d bool) is false. The device decides; nothing waits for it."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):  # fused AdamW reads such a tensor, as it does that of a GradScaler
            optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
            optimizer.step()
            continue
        # Muon does not: step, and restore the old values where the step was bad.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not optimizer.state:  # Muon makes its momentum at the first step, as zeros
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        live = [*parameters, *(optimizer.state[parameter]["momentum_buffer"] for parameter in parameters)]
        before = [tensor.clone() for tensor in live]
        optimizer.step()
        for tensor, old in zip(live, before, strict=True):
            torch.where(bad, old, tensor, out=tensor)


class Average:
    """An exponential moving average of a model's weights, as a model of its own.

    Args:
        model: a copy of the model whose weights are averaged, on the same device.
        decay: the share of the old average at each step; smaller in the first steps (``(1 + n) / (10 + n)``), because the
            random initial weights would otherwise stay in the average for ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: CausalLM, decay: float) -> None:
        self.model = model.requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, bad: Tensor) -> None:
        """Take in the weights after a step, counted from 0. Where ``bad`` (0-d bool) is true, nothing changes."""
        weight = torch.where(bad, 0.0, 1 - min(self._decay, (1 + step) / (10 + step)))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            local(mine).lerp_(local(theirs), weight.to(local(mine).device))
