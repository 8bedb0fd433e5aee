"""A new run from the weights of an old one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from origo.errors import ConfigError
from origo.models.config import GPTConfig
from origo.models.gpt import GPT
from origo.persist import open_checkpoint
from origo.state.model import load_state_dict
from origo.store.layout import TOKENIZER
from origo.store.reader import Checkpoint
from origo.training.options import ModelOptions, TrainOptions, flag

_POSITIONS = "pos_emb.weight"


@dataclass(frozen=True)
class Start:
    """Where the weights come from."""

    checkpoint: Checkpoint

    vocab_size: int

    def load_into(self, model: GPT) -> None:
        """Fill a new model. Of a longer context the first positions are taken."""
        if model.config.vocab_size != self.vocab_size:
            raise ConfigError(
                f"'{self.checkpoint.path}' has a vocabulary of {self.vocab_size} tokens, and the tokenizer has "
                f"{model.config.vocab_size}: leave --tokenizer out, or give the one it was trained with."
            )
        self.checkpoint.verify()
        weights = dict(self.checkpoint.model.state())
        weights[_POSITIONS] = weights[_POSITIONS][: model.config.context_length]
        load_state_dict(model, weights)


def starting_point(options: TrainOptions) -> tuple[TrainOptions, Start]:
    """Open what ``--from`` names, and complete the options with its shape.

    Raises:
        ConfigError: the options ask for another shape, or a tokenizer is missing.
    """
    given = options.model
    assert given.start_from is not None
    checkpoint = open_checkpoint(Path(given.start_from))
    if checkpoint.config is None:
        raise ConfigError(f"'{given.start_from}' does not say what shape its model has: --from takes what origo has saved.")
    shape = GPTConfig.from_dict(checkpoint.config).to_dict()
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
    model = dataclasses.replace(given, **{name: value for name, value in shape.items() if name in known})
    return dataclasses.replace(options, model=model), Start(checkpoint, shape["vocab_size"])
