"""``onym generate``: text from a trained GPT, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from onym.api import load_checkpoint
from onym.cli.report import as_step
from onym.convert.opening import open_any
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, ConfigError, TokenizerError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.generate.engine import generate
from onym.generate.sampling import Sampling
from onym.gpt.gpt2 import GPT
from onym.train.precision import choose_compute


@dataclass(frozen=True)
class _Arguments:
    """Continue a text with a trained GPT, token by token as they come."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]
    """A run, a checkpoint, a file or folder; also another program's GPT-2: model.pth, ckpt.pt, a folder of transformers."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none, a new document)")] = ""
    """The text to continue."""
    max_new_tokens: int = 200
    """Tokens to write at the most."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: another text each time)")] = None
    """For the same text again."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: the newest good one)")] = "latest"
    """Of a run, which step: its number, or the name it is pinned under."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE|NAME", help_behavior_hint="")] = None
    """A tokenizer.json or hub name, where the model's folder holds none."""
    part: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the model)")] = None
    """Of a file with several models, which."""
    n_heads: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: heads of size 64)")] = None
    """Attention heads, where the file does not say."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""


def run(arguments: list[str]) -> int:
    """``onym generate``."""
    given = tyro.cli(_Arguments, prog="onym generate", args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    found = open_any(given.model, as_step(given.step), part=given.part, n_heads=given.n_heads)
    for path, reason in found.skipped:
        print(f"Passed over '{path}': {reason}", file=sys.stderr)
    for note in found.checkpoint.origin.notes if found.checkpoint.origin is not None else []:
        print(note, file=sys.stderr)
    tokenizer = _tokenizer(given, found.checkpoint)
    if tokenizer.vocab_size > (rows := (found.checkpoint.config or {}).get("vocab_size", tokenizer.vocab_size)):
        raise TokenizerError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model {rows:,}: name the one that it was trained with, "
            "with --tokenizer."
        )
    model = load_checkpoint(found.checkpoint, device=choose_compute(given.device, "fp32").device)
    if not isinstance(model, GPT):
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
    _stream(given.prompt, tokenizer.decode_stream(tokens))
    return 0


def _tokenizer(given: _Arguments, checkpoint: Checkpoint) -> Tokenizer:
    if given.tokenizer is not None:
        return Tokenizer.load(given.tokenizer)
    text = checkpoint.text(TOKENIZER)
    if text is None:
        raise TokenizerError(f"'{given.model}' holds no tokenizer: name the one it was trained with, with --tokenizer.")
    return Tokenizer.from_json(text)


def _stream(prompt: str, pieces: Iterator[str]) -> None:
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
