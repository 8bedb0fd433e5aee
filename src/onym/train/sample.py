"""A sample of text: the beginning of a held-out document, continued by the model."""

from __future__ import annotations

import numpy as np

from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenStream
from onym.generate.engine import generate
from onym.gpt.gpt2 import GPT

_PROMPT_TOKENS = 16
_NEW_TOKENS = 80
_SEED = 0  # the same each time, so that samples of different steps differ by what was learned


def write_sample(model: GPT, tokenizer: Tokenizer, held_out: TokenStream) -> str:
    """The beginning of a held-out document in brackets, and what the model makes of it."""
    prompt = _beginning(held_out)
    was_training = model.training
    model.eval()
    # After the end of a document a new one begins, so that token goes before the prompt, as it did in training.
    tokens = [tokenizer.end_of_text, *prompt]
    written = tokenizer.decode(generate(model, tokens, _NEW_TOKENS, seed=_SEED, end_of_text=tokenizer.end_of_text))
    model.train(was_training)
    return f"[{tokenizer.decode(prompt)}]{written}"


def _beginning(held_out: TokenStream) -> list[int]:
    """The first tokens of the first held-out document that is long enough to be begun."""
    ends = np.append(held_out.document_starts[1:], len(held_out))
    long_enough = np.flatnonzero(ends - held_out.document_starts > 3 * _PROMPT_TOKENS)
    start = int(held_out.document_starts[long_enough[0]]) if len(long_enough) else 0
    tokens: list[int] = held_out.tokens[start : start + _PROMPT_TOKENS].tolist()
    return tokens if len(long_enough) else []
