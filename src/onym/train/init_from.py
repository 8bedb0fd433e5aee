"""A new run from the weights of an old one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onym.adapters.merging import base_of, open_base
from onym.api import open_checkpoint
from onym.errors import ConfigError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.gpt.causal_lm import CausalLM
from onym.gpt.formats import nanogpt
from onym.gpt.models import arch_named, read_config
from onym.state.dtensor import distribute_like, full_tensor
from onym.state.model import load_state_dict
from onym.train.optimizer import with_recipe
from onym.train.options import ModelOptions, TrainOptions, flag

_POSITIONS = "pos_emb.weight"
_MOST_NEW_TOKENS = 2  # chatml's
_PADDED_TO = 64  # rows, by the programs that pad a vocabulary: 50257 -> 50304


def _rows(model: CausalLM) -> dict[str, int]:
    """How many rows of the tables a model takes."""
    rows = model.config.vocab_size
    return {_POSITIONS: model.config.context_length, "tok_emb.weight": rows, "out_head.weight": model.config.head_rows}


@dataclass(frozen=True)
class InitFrom:
    """Where the weights come from."""

    checkpoint: Checkpoint

    vocab_size: int
    new_tokens: int = 0
    """Tokens that a chat template may add to the vocabulary."""
    step: int = 0
    """The steps that the other program did, where its optimizer comes along; the run continues after them."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What an adapter's checkpoints say of it, by which it is found again and known to be the same."""

    def load_into(self, model: CausalLM) -> None:
        """Fill a new model. Of a longer context the first positions are taken, and of a padded vocabulary the tokens. Rows of
        tokens that the tokenizer got for a chat template keep their first values, and so does the head of a classifier, unless
        it has learned the same labels.
        """
        rows, labels = model.config.vocab_size, model.config.labels
        padded = self.checkpoint.origin is not None and rows <= self.vocab_size == -(-rows // _PADDED_TO) * _PADDED_TO
        if not padded and not self.vocab_size <= rows <= self.vocab_size + self.new_tokens:
            raise ConfigError(
                f"'{self.checkpoint.path}' has a vocabulary of {self.vocab_size} tokens, and the tokenizer has "
                f"{model.config.vocab_size}: leave --tokenizer out, or give the one it was trained with."
            )
        self.checkpoint.verify()
        weights = dict(self.checkpoint.model.state())
        if labels and list(labels) != list((self.checkpoint.config or {}).get("labels", ())):
            for name in ("out_head.weight", "out_head.bias"):
                weights.pop(name, None)
        own = dict(model.named_parameters())
        for name, kept in _rows(model).items():
            if name in weights:
                weights[name] = weights[name][:kept]
                if len(weights[name]) < kept and name in own:
                    weights[name] = torch.cat([weights[name], full_tensor(own[name].detach())[len(weights[name]) :].cpu()])
        load_state_dict(model, weights, strict=not labels)

    def load_into_optimizer(self, model: CausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Give AdamW the moments that the other program's had."""
        parameters = dict(model.named_parameters())
        found = nanogpt.moments(self.checkpoint.origin.contents.values, list(parameters))
        assert found is not None
        rows = _rows(model)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = next(name for name, each in parameters.items() if each is parameter)
                    moments = {slot: found[0][f"{slot}.{name}"] for slot in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {
                        "step": found[0][f"step.{name}"].to(parameter.device, torch.float32, copy=True),
                        **{
                            slot: distribute_like(
                                value[: rows.get(name, len(value))].to(parameter.device, parameter.dtype, copy=True), parameter
                            )
                            for slot, value in moments.items()
                        },
                    }


def starting_point(options: TrainOptions) -> tuple[TrainOptions, InitFrom]:
    """Open what ``--from`` names, and complete the options with its shape.

    Raises:
        ConfigError: the options ask for another shape, or a tokenizer is missing.
    """
    given = options.model
    assert given.start_from is not None
    checkpoint = open_checkpoint(Path(given.start_from))
    if checkpoint.origin is not None and checkpoint.origin.problem is not None:
        raise ConfigError(checkpoint.origin.problem)
    if checkpoint.config is None:
        raise ConfigError(f"'{given.start_from}' does not say what shape its model has: --from takes what onym has saved.")
    config = read_config(checkpoint.architecture, checkpoint.config)
    if config is None:
        raise ConfigError(f"'{given.start_from}' is a {checkpoint.architecture}, which onym train has no model for.")
    shape, arch = config.to_dict(), arch_named(config)
    if given.arch not in (None, arch):
        raise ConfigError(f"'{given.start_from}' is of --arch {arch}, and {given.arch} was given: leave it out.")
    if options.data.tokenizer is None and checkpoint.text(TOKENIZER) is None:
        raise ConfigError(f"'{given.start_from}' holds no tokenizer: give the one it was trained with as --tokenizer.")
    known = {field.name for field in dataclasses.fields(ModelOptions)}
    for name, value in shape.items():
        if name not in known or (wanted := getattr(given, name)) is None or wanted == value:
            continue
        if name == "drop_rate" or (name == "context_length" and wanted < value):
            shape[name] = wanted
        else:
            raise ConfigError(
                f"'{given.start_from}' has {name}={value}, and {flag(name)} {wanted} was given: leave it out"
                f"{' or take a smaller one' if name == 'context_length' else ''}, or train without --from."
            )
    model = dataclasses.replace(given, arch=arch, **{name: value for name, value in shape.items() if name in known})
    options = with_recipe(dataclasses.replace(options, model=model))
    new_tokens = _MOST_NEW_TOKENS if options.finetune.task == "chat" else 0
    record = base_of(checkpoint, given.start_from) if options.finetune.lora is not None else {}
    return options, InitFrom(checkpoint, shape["vocab_size"], new_tokens, _steps_done(options, checkpoint), record)


def _steps_done(options: TrainOptions, checkpoint: Checkpoint) -> int:
    """Where the file is nanoGPT's, with AdamW's moments, the steps behind it; otherwise this is a new run."""
    if (
        checkpoint.origin is None
        or checkpoint.origin.format is not nanogpt.NANOGPT
        or options.optimization.optimizer != "adamw"
    ):
        return 0
    values = checkpoint.origin.contents.values
    names = [name for name in checkpoint.model.shapes if name != "out_head.weight"]
    found, step = nanogpt.moments(values, names), values.get("iter_num")
    whole = found is not None and all(
        f"{slot}.{name}" in found[0] for slot in ("exp_avg", "exp_avg_sq", "step") for name in names
    )
    return step if whole and isinstance(step, int) else 0


def base_under(checkpoint: Checkpoint) -> InitFrom:
    """What the adapter of a run that continues was trained on.

    Raises:
        CheckpointError: it is gone, or another one now.
    """
    record = dict((checkpoint.config or {}).get("base") or {})
    base = open_base(record, checkpoint.path)
    assert base.config is not None
    return InitFrom(base, base.config["vocab_size"], record=record)
