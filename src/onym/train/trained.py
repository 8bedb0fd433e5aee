"""The model that a run trains: new, or sharded, or a frozen one with an adapter; and which of its weights train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from onym.adapters.lora import LoRA
from onym.errors import ConfigError, nearest
from onym.gpt.causal_lm import CausalLM
from onym.gpt.config import ModelConfig
from onym.gpt.models import make_model
from onym.train.finetune_options import FinetuneOptions
from onym.train.init_from import InitFrom
from onym.train.options import TrainOptions
from onym.train.parallel import Sharding
from onym.train.precision import Compute


@dataclass(frozen=True)
class Trained:
    """A model, ready to be trained."""

    model: CausalLM
    lora: LoRA | None = None
    """The adapter that trains, where the model is frozen."""
    rounds_base: bool = False
    """Whether the frozen layers are in bf16."""


def make_trained(
    options: TrainOptions, config: ModelConfig, sharding: Sharding | None, compute: Compute, base: InitFrom | None
) -> Trained:
    """The model of a run before its first step.

    Args:
        base: under an adapter, the weights that stay as they are.

    Raises:
        ConfigError: a pattern of names matches nothing.
    """
    if options.finetune.lora is not None:
        assert base is not None
        return _adapted(options.finetune, config, sharding, compute, base)
    model = sharding.make(config) if sharding else make_model(config).to(compute.device)
    if options.optimization.zero_init:
        model.zero_residual_outputs()
    if options.finetune.train_only is not None:
        freeze_all_but(model, options.finetune.train_only)
    return Trained(model)


def _adapted(
    tuning: FinetuneOptions, config: ModelConfig, sharding: Sharding | None, compute: Compute, base: InitFrom
) -> Trained:
    model = make_model(config)
    base.load_into(model)
    rounds = tuning.base_dtype == "bf16" or (tuning.base_dtype == "auto" and compute.dtype == torch.bfloat16)
    if rounds and compute.dtype != torch.bfloat16:
        raise ConfigError(
            f"--base-dtype bf16 is for --precision bf16, and this run computes in {compute.precision}: leave it out."
        )
    rounds = rounds and sharding is None  # a sharded block is gathered in one dtype
    if rounds:
        round_linears(model)
    lora = adapt(model, tuning)
    lora.record_base(base.record)
    if sharding is not None:
        sharding.shard(model)
    else:
        model.to(compute.device)
    return Trained(model, lora, rounds)


def adapt(model: CausalLM, tuning: FinetuneOptions) -> LoRA:
    """Put the adapter of a run into its model, which is frozen."""
    assert tuning.lora is not None
    targets = tuning.lora_targets or "all"
    alpha = tuning.lora_alpha or 2.0 * tuning.lora
    return LoRA.apply(model, rank=tuning.lora, alpha=alpha, dropout=tuning.lora_dropout, targets=targets)


@torch.no_grad()
def round_linears(model: CausalLM) -> None:
    """The weights of the blocks' linear layers in bf16, half the memory: a step that computes in bf16 rounds them each time."""
    for module in model.trf_blocks.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.bfloat16(), requires_grad=False))


def freeze_all_but(model: nn.Module, names: str) -> None:
    """Freeze the parameters that none of the names is part of.

    Args:
        names: separated by commas; each a run of whole segments of a parameter's name, as ``trf_blocks.11``.

    Raises:
        ConfigError: one of them matches no parameter.
    """
    wanted = [name.strip().strip(".") for name in names.split(",") if name.strip().strip(".")]
    known = [name for name, _ in model.named_parameters()]
    for pattern in wanted or [names]:
        if not any(f".{pattern}." in f".{name}." for name in known):
            parts = {".".join(name.split(".")[:end]) for name in known for end in range(1, name.count(".") + 2)}
            raise ConfigError(f"--train-only has {pattern!r}, which no weight is called{nearest(pattern, parts)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{pattern}." in f".{name}." for pattern in wanted))
