"""The held-out loss, how often a classifier is right, and a sample of text.

The same tokens in the same order each time, without compilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from onym.compile.in_place import without_compilation
from onym.data.batches import IGNORED_TARGET, Batch
from onym.data.examples import Example, Examples
from onym.data.sources import Sources
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenStream
from onym.errors import CheckpointError
from onym.generation.engine import generate
from onym.generation.sampling import Sampling
from onym.gpt.causal_lm import CausalLM
from onym.gpt.documents import MARKED, counted, loss_of, unmarked
from onym.state.collectives import all_gather_object
from onym.state.dtensor import any_sharded, reshard, without_gradients
from onym.train.distributed import DistContext
from onym.train.precision import Compute

_PROMPT_TOKENS = 16
_NEW_TOKENS = 80
MAIN = "val_loss"
"""The held-out loss, in metrics.jsonl."""
_SEED = 0  # the same each time, so that samples of different steps differ by what was learned


class HeldOut(Protocol):
    """What is held out of training: text or examples."""

    @property
    def mixed(self) -> bool:
        """Whether there are several sources."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """Of the sources; together 1."""
        ...

    def held_out_batches(self, context_length: int, batch_size: int, limit: int) -> list[tuple[str, Iterator[Batch]]]:
        """See :meth:`onym.data.sources.Sources.held_out_batches`."""
        ...


def held_out_loss(
    model: CausalLM,
    batches: Iterable[Batch],
    compute: Compute,
    ranks: DistContext = DistContext(),  # noqa: B008
    separator: int | None = None,
) -> float:
    """Mean cross-entropy in nats a target; NaN where there is nothing to predict.

    With a ``separator`` documents are kept apart (:func:`onym.gpt.documents.loss_of`). Of text that is another loss than
    without: the first token of a document is not in it, and the others have less before them.

    A collective: each rank computes its own batches. Forward passes of a sharded model are collective too, so evaluation is
    padded to equal batch counts on all ranks.
    """
    found: list[tuple[Tensor, int]] = []  # of each batch: its loss, and the number of its targets
    was_training = model.training
    model.eval()
    sharded, number = any_sharded([model]), -1
    with without_gradients(sharded), compute.autocast(), without_compilation():
        for number, (inputs, targets) in enumerate(batches):
            if number % ranks.world_size != ranks.rank:
                continue
            number_counted = int(counted(inputs, targets, separator))
            loss = loss_of(model, inputs.to(compute.device), targets.to(compute.device), separator)
            found.append((loss, number_counted))  # not read yet: a GPU goes on meanwhile
        if sharded and ranks.rank > number % ranks.world_size:  # lower ranks have one batch more; this pass does not count
            loss_of(model, inputs.to(compute.device), targets.to(compute.device), separator)
    if sharded:
        reshard(model)
    model.train(was_training)
    # The mean of nothing is not a number.
    losses = torch.stack([loss for loss, _ in found]).tolist() if found else []
    sums = [(loss * count if count else 0.0, count) for loss, (_, count) in zip(losses, found, strict=True)]
    gathered = all_gather_object(sums, collective=ranks.world_size > 1)
    # Summed in the order of the batches, so that the result is bitwise identical with any number of ranks.
    ordered = [each for round_ in zip_longest(*gathered) for each in round_ if each is not None]
    total, tokens = sum(loss for loss, _ in ordered), sum(count for _, count in ordered)
    return total / tokens if tokens else float("nan")


def held_out_losses(
    model: CausalLM,
    sources: HeldOut,
    batch_size: int,
    limit: int,
    compute: Compute,
    ranks: DistContext = DistContext(),  # noqa: B008
    separator: int | None = None,
) -> dict[str, float]:
    """The held-out loss over at most ``limit`` batches; of a mixture that of each source, and as :data:`MAIN` their mean,
    weighted as they are trained on.

    A collective. ``limit`` is divided among the sources.
    """
    found = {
        name: held_out_loss(model, batches, compute, ranks, separator)
        for name, batches in sources.held_out_batches(model.config.context_length, batch_size, limit)
    }
    if not sources.mixed:
        return {MAIN: next(iter(found.values()))}
    mean = sum(loss * weight for loss, weight in zip(found.values(), sources.weights, strict=True))
    return {MAIN: mean, **{f"{MAIN}/{name}": loss for name, loss in found.items()}}


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


def write_reply(model: CausalLM, tokenizer: Tokenizer, example: Example) -> str:
    """What a held-out conversation asks, in brackets, and what the model answers in the place of its first reply."""
    targets = np.array(example.targets)
    counts = np.flatnonzero(targets != IGNORED_TARGET)
    prompt = list(example.tokens[: counts[0] + 1])
    was_training = model.training
    model.eval()
    stop = int(targets[counts[-1]])
    written = tokenizer.decode(generate(model, prompt, _NEW_TOKENS, Sampling(temperature=0), end_of_text=stop))
    model.train(was_training)
    return f"[{tokenizer.decode(prompt)}]{written}"


def right_answers(
    model: CausalLM,
    examples: Examples,
    batch_size: int,
    limit: int,
    compute: Compute,
    ranks: DistContext = DistContext(),  # noqa: B008
) -> dict[str, float]:
    """How a classifier does on held-out rows: ``accuracy``, and ``f1``, the mean of its labels' F1.

    A collective, where the model is sharded; each rank computes all of it.
    """
    counts = torch.zeros(len(model.config.labels), len(model.config.labels), dtype=torch.long)  # [right label, given label]
    was_training, sharded = model.training, any_sharded([model])
    model.eval()
    if sharded or ranks.is_rank0:
        with without_gradients(sharded), compute.autocast(), without_compilation():
            ((_, batches),) = examples.held_out_batches(examples.window, batch_size, limit)
            for inputs, targets in batches:
                tokens, documents = unmarked(inputs.to(compute.device))
                given = model(tokens, documents=documents).argmax(dim=-1).cpu()
                asked = targets != IGNORED_TARGET
                counts += torch.bincount(targets[asked] * len(counts) + given[asked], minlength=counts.numel()).view_as(counts)
        if sharded:
            reshard(model)
    model.train(was_training)
    return scores_of(counts)


def scores_of(counts: Tensor) -> dict[str, float]:
    """Accuracy and mean F1.

    Args:
        counts: [right label, given label] int64. A label that was neither asked for nor given is left out of the mean.

    >>> scores_of(torch.tensor([[8, 2], [1, 9]]))["accuracy"]
    0.85
    """
    right, given, asked = counts.diagonal().double(), counts.sum(dim=0), counts.sum(dim=1)
    there = (given + asked) > 0
    f1 = (2 * right / (given + asked).clamp(min=1))[there]
    return {"accuracy": float(right.sum() / max(1, int(counts.sum()))), "f1": float(f1.mean()) if len(f1) else 0.0}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the models of a run."""

    tokenizer: Tokenizer
    sources: Sources | Examples
    compute: Compute
    ranks: DistContext
    rounds_weights: bool
    """Whether some weights are in bf16 when they are multiplied: a sharded model's, or those under an adapter."""
    sequences: int
    """The most in an evaluation: the same text, however a batch is split."""
    separator: int | None = None
    """What keeps documents apart, see :func:`onym.gpt.documents.loss_of`."""

    def losses(self, model: CausalLM, micro_batch: int) -> dict[str, float]:
        """Held-out losses by their names in metrics.jsonl, and a classifier's scores. A collective."""
        limit = self.sequences // micro_batch
        found = held_out_losses(model, self.sources, micro_batch, limit, self.compute, self.ranks, self.separator)
        if isinstance(self.sources, Examples) and model.config.labels:
            found |= right_answers(model, self.sources, micro_batch, limit, self.compute, self.ranks)
        return found

    def sample(self, model: CausalLM) -> str | None:
        """What the model makes of a held-out document or question, on rank 0; None on other ranks, of a classifier, and of
        weights that are not finite.

        A collective where the model is sharded.
        """
        if model.config.labels or (not self.ranks.is_rank0 and not any_sharded([model])):
            return None
        try:
            # Weights in bf16 can be multiplied with bf16 alone.
            with self.compute.autocast() if self.rounds_weights else nullcontext():
                text = sample_of(model, self.tokenizer, self.sources, self.separator)
        except CheckpointError:  # non-finite weights, which are reported elsewhere
            return None
        return text if self.ranks.is_rank0 else None


def sample_of(model: CausalLM, tokenizer: Tokenizer, sources: Sources | Examples, separator: int | None) -> str:
    """A held-out document continued, or a held-out question answered."""
    if isinstance(sources, Examples):
        return write_reply(model, tokenizer, sources.first_held_out())
    return write_sample(model, tokenizer, sources.sources[0].tokens.held_out, document_mask=separator is not None)


def open_sources(values: Sequence[dict[str, object]]) -> Sources | Examples:
    """What ``to_list()`` of either gave."""
    return Examples.open(values) if "examples" in values[0] else Sources.open(values)


def separator_of(sources: Sources | Examples, tokenizer: Tokenizer, *, document_mask: bool) -> int | None:
    """What keeps apart what is in one row; None where nothing does."""
    if isinstance(sources, Examples):
        return MARKED
    return tokenizer.end_of_text if document_mask else None
