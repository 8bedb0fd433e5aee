"""The held-out loss and a sample of text: the same tokens in the same order each time, without compilation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from onym.compile.in_place import without_compilation
from onym.data.batches import evaluation_batches
from onym.data.sources import Sources
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenStream
from onym.errors import CheckpointError
from onym.generation.engine import generate
from onym.gpt.causal_lm import CausalLM
from onym.gpt.documents import counted, loss_of
from onym.state.collectives import all_gather_object
from onym.state.dtensor import any_sharded, reshard, without_gradients
from onym.train.distributed import DistContext
from onym.train.precision import Compute

_PROMPT_TOKENS = 16
_NEW_TOKENS = 80
MAIN = "val_loss"
"""The held-out loss, in metrics.jsonl."""
_SEED = 0  # the same each time, so that samples of different steps differ by what was learned


def held_out_loss(
    model: CausalLM,
    stream: TokenStream,
    batch_size: int,
    limit: int,
    compute: Compute,
    ranks: DistContext = DistContext(),  # noqa: B008
    end_of_text: int | None = None,
) -> float:
    """Mean cross-entropy in nats a token over at most ``limit`` batches; NaN where the stream has nothing to predict.

    With ``end_of_text`` documents are kept apart (:func:`onym.gpt.documents.loss_of`). That is another loss than without: the
    first token of a document is not in it, and the others have less before them.

    A collective: each rank computes its own batches. Forward passes of a sharded model are collective too, so evaluation is
    padded to equal batch counts on all ranks.
    """
    sums: list[tuple[float, int]] = []  # of each batch: its loss, summed over its tokens, and their number
    was_training = model.training
    model.eval()
    sharded, number = any_sharded([model]), -1
    with without_gradients(sharded), compute.autocast(), without_compilation():
        batches = evaluation_batches(stream, model.config.context_length, batch_size, limit)
        for number, (inputs, targets) in enumerate(batches):
            if number % ranks.world_size != ranks.rank:
                continue
            number_counted = int(counted(inputs, targets, end_of_text))
            loss = loss_of(model, inputs.to(compute.device), targets.to(compute.device), end_of_text)
            # The mean of nothing is not a number.
            sums.append((float(loss) * number_counted if number_counted else 0.0, number_counted))
        if sharded and ranks.rank > number % ranks.world_size:  # lower ranks have one batch more; this pass does not count
            loss_of(model, inputs.to(compute.device), targets.to(compute.device), end_of_text)
    if sharded:
        reshard(model)
    model.train(was_training)
    gathered = all_gather_object(sums, collective=ranks.world_size > 1)
    # Summed in the order of the batches, so that the result is bitwise identical with any number of ranks.
    ordered = [each for round_ in zip_longest(*gathered) for each in round_ if each is not None]
    total, tokens = sum(loss for loss, _ in ordered), sum(count for _, count in ordered)
    return total / tokens if tokens else float("nan")


def held_out_losses(
    model: CausalLM,
    sources: Sources,
    batch_size: int,
    limit: int,
    compute: Compute,
    ranks: DistContext = DistContext(),  # noqa: B008
    end_of_text: int | None = None,
) -> dict[str, float]:
    """The held-out loss of each source of a mixture, and as :data:`MAIN` their mean, weighted as they are trained on.

    A collective. ``limit`` is divided among the sources.
    """
    limit = max(1, limit // len(sources.sources))
    losses = [
        held_out_loss(model, each.tokens.held_out, batch_size, limit, compute, ranks, end_of_text) for each in sources.sources
    ]
    if not sources.mixed:
        return {MAIN: losses[0]}
    mean = sum(loss * weight for loss, weight in zip(losses, sources.weights, strict=True))
    return {MAIN: mean, **{f"{MAIN}/{each.name}": loss for each, loss in zip(sources.sources, losses, strict=True)}}


def write_sample(model: CausalLM, tokenizer: Tokenizer, held_out: TokenStream, *, document_mask: bool = False) -> str:
    """The beginning of a held-out document in brackets, and what the model makes of it.

    Args:
        document_mask: whether the model was trained on documents kept apart, so that nothing goes before a document.
    """
    prompt = _beginning(held_out)
    was_training = model.training
    model.eval()
    # After the end of a document a new one begins, so that token goes before the prompt, as it did in training.
    tokens = prompt if document_mask and prompt else [tokenizer.end_of_text, *prompt]
    written = tokenizer.decode(generate(model, tokens, _NEW_TOKENS, seed=_SEED, end_of_text=tokenizer.end_of_text))
    model.train(was_training)
    return f"[{tokenizer.decode(prompt)}]{written}"


def _beginning(held_out: TokenStream) -> list[int]:
    """The first tokens of the first held-out document that is long enough to be begun."""
    ends = np.append(held_out.document_starts[1:], len(held_out))
    long_enough = np.flatnonzero(ends - held_out.document_starts > 3 * _PROMPT_TOKENS)
    start = int(held_out.document_starts[long_enough[0]]) if len(long_enough) else 0
    tokens: list[int] = held_out.read(start, start + _PROMPT_TOKENS).tolist()
    return tokens if len(long_enough) else []


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the models of a run."""

    tokenizer: Tokenizer
    sources: Sources
    compute: Compute
    ranks: DistContext
    gathers_bf16: bool
    """Whether a sharded model's blocks are all-gathered in bf16."""
    sequences: int
    """The most in an evaluation: the same text, however a batch is split."""
    document_mask: bool = False
    """Whether documents are kept apart."""

    def losses(self, model: CausalLM, micro_batch: int) -> dict[str, float]:
        """Held-out losses by their names in metrics.jsonl. A collective."""
        limit = self.sequences // micro_batch
        end_of_text = self.tokenizer.end_of_text if self.document_mask else None
        return held_out_losses(model, self.sources, micro_batch, limit, self.compute, self.ranks, end_of_text)

    def sample(self, model: CausalLM) -> str | None:
        """A held-out document continued by the model, on rank 0; None on other ranks, and of weights that are not finite.

        A collective where the model is sharded.
        """
        if not self.ranks.is_rank0 and not any_sharded([model]):
            return None
        try:
            # Weights that are all-gathered in bf16 can be multiplied with bf16 alone.
            with self.compute.autocast() if self.gathers_bf16 else nullcontext():
                held_out = self.sources.sources[0].tokens.held_out
                text = write_sample(model, self.tokenizer, held_out, document_mask=self.document_mask)
        except CheckpointError:  # non-finite weights, which are reported elsewhere
            return None
        return text if self.ranks.is_rank0 else None
