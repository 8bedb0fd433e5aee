"""Token after token from a model, with its keys and values cached.

While the text fits the context, each new token costs one forward pass of one token, and the logits are those of the whole
sequence (within float tolerance). Past the context the window slides: keys and values hold their positions, so what is kept
must be read again at its new ones. Sliding by one token each time is what the book's loop does, and costs a whole
context a token; sliding by a quarter of the context costs three tokens a token, and the model still sees at least three
quarters of what it could.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onym.compile.in_place import without_compilation
from onym.errors import ConfigError
from onym.generate.sampling import Sampling, choose
from onym.gpt.causal_lm import CausalLM
from onym.state.collectives import broadcast_from_rank0
from onym.state.dtensor import any_sharded, computes_on, reshard, without_gradients


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    end_of_text: int | None = None,
    slide: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token id at a time.

    Args:
        model: in evaluation mode; runs without compilation. Where FSDP2 has sharded it, all processes have to call this, and
            take all tokens; they are those that the first one draws.
        prompt: token ids, at least one. Of one longer than the context, the last ones are read.
        max_new_tokens: when to stop at the latest.
        sampling: how tokens are chosen.
        seed: for the same text again; None for another one each time.
        end_of_text: stop before this token.
        slide: tokens dropped from the front when the context is full, a quarter of it by default; 1 gives exactly the
            result of cropping to the last ``context_length`` tokens at each step.

    Raises:
        ConfigError: the prompt is empty or has ids that the model does not know, or a number is out of range.
    """
    context = model.config.context_length
    slide = max(1, context // 4) if slide is None else slide
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, not {max_new_tokens}.")
    if not 1 <= slide <= context:
        raise ConfigError(f"slide must be from 1 to the context length {context}, not {slide}.")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must be from 0 to 2^63 - 1, not {seed}.")
    if not prompt:
        raise ConfigError("The prompt has no tokens: give it some text.")
    if not all(0 <= token < model.config.vocab_size for token in prompt):
        raise ConfigError(
            f"The prompt has token {max(prompt)}, the model knows {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with."
        )
    sampling = sampling or Sampling()
    sampling.check()
    return _generate(model, list(prompt), max_new_tokens, sampling, seed=seed, end=end_of_text, slide=slide)


def _generate(
    model: CausalLM,
    tokens: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int | None,
    end: int | None,
    slide: int,
) -> Iterator[int]:
    context = model.config.context_length
    device, sharded = computes_on(model.tok_emb.weight), any_sharded([model])
    generator = torch.Generator(device=device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    cache = model.new_cache(device=device, capacity=min(context, len(tokens) + max_new_tokens))
    unread = tokens[-context:]
    try:
        for _ in range(max_new_tokens):
            # Entered anew for each token: a caller may do other things between two of them.
            with without_gradients(sharded), without_compilation():
                logits = model(torch.tensor([unread], device=device), cache=cache)[:, -1]  # [1, vocab]
                token = broadcast_from_rank0(lambda: int(choose(logits, sampling, generator)), sharded)  # noqa: B023  # called at once
            if token == end:
                return
            yield token
            tokens.append(token)
            unread = [token]
            if cache.length == context:
                cache.length = 0
                unread = tokens[-(context - slide + 1) :]
    finally:
        if sharded:
            reshard(model)
