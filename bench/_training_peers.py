"""What bench/training.py and bench/gpu.py let train: onym's step, and the peers', each as its own project makes it.

Every function makes a model and its optimizer for a :class:`Setting`, and returns the step: forward, backward, clipping,
optimizer, zeroing. Nothing in a step waits for a GPU. What compiles does so at the first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from onym.gpt.kinds import Arch

LEARNING_RATE = 3e-4
Step = Callable[[Tensor, Tensor], Tensor]
"""From inputs and targets, both [batch, context_length] on the device, to the loss before the step, a 0-d tensor."""


@dataclass(frozen=True)
class Setting:
    """What all of a table have in common."""

    shape: Mapping[str, int]
    """vocab_size, context_length, emb_dim, n_heads, n_layers."""
    gated: Mapping[str, int]
    """Of a decoder besides: hidden_dim, n_kv_groups."""
    batch: int
    """Sequences in a step."""
    device: torch.device
    dtype: torch.dtype
    """That products are computed in."""
    compiled: bool = True
    """Whether those that are compiled are; else they run as they are written, to try a benchmark."""
    compiles_loss: bool = False
    """Whether the peers' loss is compiled together with their model, which is faster, and spares memory."""

    @property
    def head_dim(self) -> int:
        return self.shape["emb_dim"] // self.shape["n_heads"]

    def compile(self, function: Any) -> Any:
        return torch.compile(function) if self.compiled else function


class Trainee(NamedTuple):
    """Somebody who trains."""

    step: Step
    note: Callable[[], str] = lambda: ""
    """What a reader of its figures has to know."""


def _by_torch(
    setting: Setting,
    model: torch.nn.Module,
    optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
    *,
    logits: Callable[[Any], Tensor] = lambda out: out,
    autocast: bool = True,
    eager: bool = False,
) -> Trainee:
    """PyTorch's own loop: autocast, cross-entropy, ``clip_grad_norm_``.

    Args:
        logits: what of the model's result they are.
    """
    model = model.to(setting.device)
    updates = optimizer(model)
    compiled = setting.compile if not eager else (lambda function: function)
    call = model if setting.compiles_loss else compiled(model)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(call(inputs)).flatten(0, 1), targets.flatten())

    loss_of_batch = compiled(loss_of) if setting.compiles_loss else loss_of

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        narrow = setting.dtype is not torch.float32
        with torch.autocast(setting.device.type, setting.dtype if narrow else torch.bfloat16, enabled=autocast and narrow):
            loss = loss_of_batch(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        updates.step()
        updates.zero_grad(set_to_none=True)
        return loss.detach()

    return Trainee(step)


def _fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def transformers(setting: Setting) -> Trainee:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = setting.shape
    sizes: dict[str, Any] = {
        "n_embd": shape["emb_dim"],
        "n_layer": shape["n_layers"],
        "n_head": shape["n_heads"],
        "use_cache": False,
    }
    sizes |= {"vocab_size": shape["vocab_size"], "n_positions": shape["context_length"]}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return _by_torch(setting, model, _fused, logits=lambda out: out.logits)


def nanogpt(setting: Setting) -> Trainee:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.convert.peers import NanoGPT

    shape = setting.shape
    model = NanoGPT(
        shape["n_layers"], shape["n_heads"], shape["emb_dim"], shape["context_length"], False, shape["vocab_size"], 0.0
    )
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.02)

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        rest = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    return _by_torch(setting, model, optimizer)


def _litgpt(setting: Setting, **more: Any) -> Trainee:
    from litgpt.config import Config
    from litgpt.model import GPT

    shape = setting.shape
    config = Config(
        block_size=shape["context_length"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["n_layers"],
        n_head=shape["n_heads"],
        n_embd=shape["emb_dim"],
        **more,
    )
    return _by_torch(setting, GPT(config), _fused)


def litgpt(setting: Setting) -> Trainee:
    return _litgpt(setting)


def litgpt_llama(setting: Setting) -> Trainee:
    return _litgpt(
        setting,
        n_query_groups=setting.gated["n_kv_groups"],
        intermediate_size=setting.gated["hidden_dim"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


def book_optimised(setting: Setting) -> Trainee:
    from llms_from_scratch.ch04 import GPTModelFast

    model = GPTModelFast({**setting.shape, "drop_rate": 0.0, "qkv_bias": False}).to(setting.dtype)
    return _by_torch(setting, model, _fused, autocast=False)


def book_baseline(setting: Setting) -> Trainee:
    from llms_from_scratch.ch04 import GPTModel

    model = GPTModel({**setting.shape, "drop_rate": 0.0, "qkv_bias": False})
    plain = lambda model: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)  # noqa: E731
    return _by_torch(setting, model, plain, autocast=False, eager=True)


def book_llama(setting: Setting) -> Trainee:
    from llms_from_scratch.llama3 import Llama3Model

    more = {"rope_base": 10_000.0, "rope_freq": None, "dtype": torch.float32}
    return _by_torch(setting, Llama3Model({**setting.shape, **setting.gated, **more}), _fused)


def transformers_decoder(setting: Setting, family: str) -> Trainee:
    import transformers

    shape = setting.shape
    config = getattr(transformers, f"{family}Config")(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["emb_dim"],
        intermediate_size=setting.gated["hidden_dim"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=setting.gated["n_kv_groups"],
        head_dim=setting.head_dim,
        max_position_embeddings=shape["context_length"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return _by_torch(setting, model, _fused, logits=lambda out: out.logits)


def onym(setting: Setting, *, tied: bool = True, arch: Arch = "gpt2", optimizer: Literal["auto", "adamw"] = "adamw") -> Trainee:
    """What ``onym train`` does: its precision, its step with the guard, compiled in place.

    Args:
        optimizer: AdamW with the peers' learning rate, or what a run takes by itself, with its own.
    """
    from onym.gpt.models import make_model
    from onym.train.dry_run import prepare
    from onym.train.optimizer import resolved
    from onym.train.options import OptimizationOptions
    from onym.train.precision import choose_compute
    from onym.train.step import Stepper

    compute = choose_compute(str(setting.device), "auto")
    compute.set_deterministic(False)
    model = make_model(config_of(setting, arch, tied=tied)).to(setting.device)
    given = OptimizationOptions(optimizer=optimizer, learning_rate=LEARNING_RATE if optimizer == "adamw" else None)
    options = resolved(given, arch, setting.shape["emb_dim"], muon=True)
    stepper = Stepper(model, options, compute)
    rate, steps, notes = options.learning_rate or LEARNING_RATE, iter(range(10**9)), list[str]()

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        if not stepper.micro_batch:
            how: Literal["whole", "off"] = "whole" if setting.compiled else "off"
            compilation, _ = prepare(stepper, (inputs, targets), [setting.batch], how)
            if compilation.how != how:
                notes.append(f"not compiled: {compilation.reason}")
        return stepper((inputs, targets), rate, next(steps)).loss

    if optimizer == "auto":
        notes.append(" and ".join(type(each).__name__ for each in stepper.optimizers))
    return Trainee(step, lambda: "; ".join(notes))


def config_of(setting: Setting, arch: Arch, *, tied: bool = True) -> Any:
    """The shape as onym has it."""
    from onym.gpt import kinds

    shape = setting.shape if arch == "gpt2" else {**setting.shape, **setting.gated}
    return kinds.config_of(arch, "nano", **shape, tie_embeddings=tied)
