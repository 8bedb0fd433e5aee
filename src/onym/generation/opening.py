"""A model and the tokenizer that it was trained with, from anything that Onym opens: what generating and scoring begin with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from onym.api import load_checkpoint
from onym.convert.opening import open_any
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, TokenizerError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.gpt.causal_lm import CausalLM


class OpenedModel(NamedTuple):
    """A model in evaluation mode, with what belongs to it."""

    model: CausalLM
    tokenizer: Tokenizer
    checkpoint: Checkpoint


class FoundModel(NamedTuple):
    """A checkpoint and its tokenizer, which fit; no weights are in memory yet."""

    path: str | Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    def load(self, device: str | torch.device = "cpu", *, classifier: bool = False) -> OpenedModel:
        """Build the model.

        Args:
            classifier: one that tells labels apart is wanted, not one that predicts tokens.

        Raises:
            CheckpointError: it is damaged, or another kind of model.
        """
        model = load_checkpoint(self.checkpoint, device=device)
        if not isinstance(model, CausalLM):
            raise CheckpointError(f"'{self.path}' is a {type(model).__name__}; only a GPT generates text or scores it here.")
        labels = model.config.labels
        if labels and not classifier:
            shown = f"{', '.join(labels[:5])}{', …' if len(labels) > 5 else ''}"
            raise CheckpointError(f"'{self.path}' tells labels apart ({shown}) and writes no text: use onym classify.")
        if classifier and not labels:
            raise CheckpointError(
                f"'{self.path}' predicts tokens, not labels: onym train --from MODEL --classify FILE trains a classifier."
            )
        return OpenedModel(model, self.tokenizer, self.checkpoint)


def find_model(
    path: str | Path,
    *,
    step: int | str = "latest",
    part: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    only_missing: bool = False,
    note: Callable[[str], None] = warnings.warn,
) -> FoundModel:
    """Open a GPT's checkpoint and its tokenizer.

    Args:
        path: a run, a checkpoint, a model folder or file, Onym's or another program's (docs/formats.md).
        step: of a run, ``"latest"`` (the newest good one), a number, or the name of a pinned one.
        part: of a file with several models, which.
        settings: fields of the configuration that the file does not state, as ``{"n_heads": 12}``.
        tokenizer: instead of the one in the model's folder: a tokenizer, a tokenizer.json, or a hub name.
        only_missing: take that only where the model's folder holds none.
        note: called with what was assumed, and with damaged steps that were skipped for an older one.

    Raises:
        CheckpointError: there is no model, or it is damaged.
        TokenizerError: there is no tokenizer, or it has tokens that the model does not know.
    """
    found = open_any(path, step, part=part, settings=dict(settings or {}))
    checkpoint = found.checkpoint
    for skipped, reason in found.skipped:
        note(f"Passed over '{skipped}': {reason}")
    for assumed in checkpoint.origin.notes if checkpoint.origin is not None else []:
        note(assumed)
    own = checkpoint.text(TOKENIZER) if tokenizer is None or only_missing else None
    if own is not None:
        known = Tokenizer.from_json(own)
    elif tokenizer is not None:
        known = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    else:
        raise TokenizerError(f"'{path}' holds no tokenizer: name the one it was trained with, with --tokenizer.")
    require_fitting(known, (checkpoint.config or {}).get("vocab_size", known.vocab_size))
    return FoundModel(path, checkpoint, known)


def open_model(path: str | Path, *, device: str | torch.device = "cpu", **how: Any) -> OpenedModel:
    """:func:`find_model`, whose arguments ``how`` are, and its weights on a device."""
    return find_model(path, **how).load(device)


def model_and_tokenizer(
    model: CausalLM | str | Path, tokenizer: Tokenizer | str | Path | None, device: str | torch.device
) -> tuple[CausalLM, Tokenizer]:
    """A model that is given with its tokenizer, or both from a path.

    Raises:
        TokenizerError: a model comes without its tokenizer, or with one that does not fit.
    """
    if not isinstance(model, CausalLM):
        opened = open_model(model, tokenizer=tokenizer, device=device)
        return opened.model, opened.tokenizer
    if tokenizer is None:
        raise TokenizerError("A model alone does not know its tokens: give its tokenizer too, as tokenizer=….")
    known = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    require_fitting(known, model.config.vocab_size)
    return model, known


def require_fitting(tokenizer: Tokenizer, rows: int) -> None:
    """Raise a TokenizerError where a tokenizer has tokens that a model with so many rows in its embedding does not know."""
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model {rows:,}: name the one that it was trained with, "
            "with --tokenizer."
        )
