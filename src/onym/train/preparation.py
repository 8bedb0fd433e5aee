"""From the options to tokens: the text is surveyed, its tokenizer found or trained, its tokens found or made."""

from __future__ import annotations

from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenData, cached_tokenizer, survey, tokenise
from onym.errors import CheckpointError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.train.display import Display
from onym.train.options import TrainOptions
from onym.units import format_size


def prepare_data(options: TrainOptions, checkpoint: Checkpoint | None, display: Display) -> tuple[Tokenizer, TokenData]:
    """Text -> tokenizer and token streams, from the caches where they are known already."""
    data, corpus = options.data, options.data.corpus
    with display.activity("Text") as activity:
        found = survey(corpus, data.held_out, activity)
        activity.result = f"{found.documents:,} documents, {format_size(found.text_bytes)} of {corpus.description}"
    with display.activity("Tokenizer") as activity:
        if checkpoint is not None:
            text = checkpoint.text(TOKENIZER)
            if text is None:
                raise CheckpointError(f"'{checkpoint.path}' holds no tokenizer: it was not written by onym train.")
            tokenizer = Tokenizer.from_json(text)
        elif data.tokenizer is not None:
            tokenizer = Tokenizer.load(data.tokenizer)
        else:
            tokenizer = cached_tokenizer(corpus, found, data.vocab_size, data.cache_dir, activity)
        activity.result = f"byte-level BPE, {tokenizer.vocab_size:,} tokens"
        if data.tokenizer is not None:
            activity.result = f"{data.tokenizer}, {tokenizer.vocab_size:,} tokens"
    with display.activity("Tokens") as activity:
        tokens = tokenise(corpus, found, tokenizer, data.cache_dir, activity)
        activity.result = f"{len(tokens.train):,} to train on, {len(tokens.held_out):,} held out"
    return tokenizer, tokens
