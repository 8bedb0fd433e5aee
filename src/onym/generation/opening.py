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


def open_model(
    path: str | Path,
    *,
    step: int | str = "latest",
    part: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    device: str | torch.device = "cpu",
    note: Callable[[str], None] = warnings.warn,
) -> OpenedModel:
    """Open a GPT and its tokenizer.

    Args:
        path: a run, a checkpoint, a model folder or file, Onym's or another program's (docs/formats.md).
        step: of a run, ``"latest"`` (the newest good one), a number, or the name of a pinned one.
        part: of a file with several models, which.
        settings: fields of the configuration that the file does not state, as ``{"n_heads": 12}``.
        tokenizer: where the model's folder holds none, or instead of it: a tokenizer, a tokenizer.json, or a hub name.
        device: where to put the model.
        note: called with what was assumed, and with damaged steps that were skipped for an older one.

    Raises:
        CheckpointError: there is no model, it is damaged, or it is no GPT.
        TokenizerError: there is no tokenizer, or it has tokens that the model does not know.
    """
    found = open_any(path, step, part=part, settings=dict(settings or {}))
    checkpoint = found.checkpoint
    for skipped, reason in found.skipped:
        note(f"Passed over '{skipped}': {reason}")
    for assumed in checkpoint.origin.notes if checkpoint.origin is not None else []:
        note(assumed)
    known = _tokenizer(path, checkpoint, tokenizer)
    require_fitting(known, (checkpoint.config or {}).get("vocab_size", known.vocab_size))
    model = load_checkpoint(checkpoint, device=device)
    if not isinstance(model, CausalLM):
        raise CheckpointError(f"'{path}' is a {type(model).__name__}; only a GPT generates text or scores it here.")
    return OpenedModel(model, known, checkpoint)


def require_fitting(tokenizer: Tokenizer, rows: int) -> None:
    """Raise a TokenizerError where a tokenizer has tokens that a model with so many rows in its embedding does not know."""
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model {rows:,}: name the one that it was trained with, "
            "with --tokenizer."
        )


def _tokenizer(path: str | Path, checkpoint: Checkpoint, given: str | Path | Tokenizer | None) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if given is not None:
        return Tokenizer.load(given)
    text = checkpoint.text(TOKENIZER)
    if text is None:
        raise TokenizerError(f"'{path}' holds no tokenizer: name the one it was trained with, with --tokenizer.")
    return Tokenizer.from_json(text)
