"""``onym generate``: text from a trained GPT, as it comes."""

from __future__ import annotations

import itertools
import sys

from onym.api import load_checkpoint
from onym.cli.arguments import GenerateArguments
from onym.cli.report import open_noting
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, ConfigError, TokenizerError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.generate.engine import generate
from onym.gpt.causal_lm import CausalLM
from onym.train.precision import choose_compute


def run(given: GenerateArguments) -> int:
    """``onym generate``."""
    settings = {name: getattr(given, name) for name in ("n_heads", "rope_base", "context_length")}
    checkpoint = open_noting(given.model, given.step, part=given.part, settings=settings)
    for note in checkpoint.origin.notes if checkpoint.origin is not None else []:
        print(note, file=sys.stderr)
    tokenizer = _tokenizer(given, checkpoint)
    if tokenizer.vocab_size > (rows := (checkpoint.config or {}).get("vocab_size", tokenizer.vocab_size)):
        raise TokenizerError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model {rows:,}: name the one that it was trained with, "
            "with --tokenizer."
        )
    model = load_checkpoint(checkpoint, device=choose_compute(given.device, "fp32").device)
    if not isinstance(model, CausalLM):
        raise CheckpointError(f"'{given.model}' is a {type(model).__name__}; only a GPT generates text here.")
    try:
        given.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("The prompt is not valid UTF-8 text.") from error
    tokens = generate(
        model,
        tokenizer.encode(given.prompt) or [tokenizer.end_of_text],
        given.max_new_tokens,
        given.sampling,
        seed=given.seed,
        end_of_text=tokenizer.end_of_text,
    )
    for text in itertools.chain([given.prompt], tokenizer.decode_stream(tokens), ["\n"]):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _tokenizer(given: GenerateArguments, checkpoint: Checkpoint) -> Tokenizer:
    if given.tokenizer is not None:
        return Tokenizer.load(given.tokenizer)
    text = checkpoint.text(TOKENIZER)
    if text is None:
        raise TokenizerError(f"'{given.model}' holds no tokenizer: name the one it was trained with, with --tokenizer.")
    return Tokenizer.from_json(text)
