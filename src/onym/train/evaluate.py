"""The held-out loss: the same tokens in the same order each time, without compilation."""

from __future__ import annotations

from itertools import zip_longest

from torch import nn

from onym.compile.eager import without_compilation
from onym.data.batches import IGNORED_TARGET, evaluation_batches
from onym.data.tokens import TokenStream
from onym.state.collectives import all_gather_object
from onym.state.dtensor import any_sharded, reshard, without_gradients
from onym.train.precision import Compute


def held_out_loss(
    model: nn.Module,
    stream: TokenStream,
    context_length: int,
    batch_size: int,
    limit: int,
    compute: Compute,
    share: tuple[int, int] = (0, 1),
) -> float:
    """Mean cross-entropy in nats a token over at most ``limit`` batches; NaN where the stream has nothing to predict.

    Args:
        share: of the batches, as (which process, of how many): each computes its own, and all have the result.
    """
    which, of_how_many = share
    sums: list[tuple[float, int]] = []
    was_training = model.training
    model.eval()
    sharded, number = any_sharded([model]), -1
    with without_gradients(sharded), compute.autocast(), without_compilation():
        for number, (inputs, targets) in enumerate(evaluation_batches(stream, context_length, batch_size, limit)):
            if number % of_how_many != which:
                continue
            counted = int((targets != IGNORED_TARGET).sum())
            loss = model(inputs.to(compute.device), targets.to(compute.device))
            sums.append((float(loss) * counted, counted))
        if sharded and which > number % of_how_many:  # the others have one more, for which all are needed; it counts once
            model(inputs.to(compute.device), targets.to(compute.device))
    if sharded:
        reshard(model)
    model.train(was_training)
    shares = all_gather_object(sums, collective=of_how_many > 1)
    # In the batches' order, whoever computed them: the same bits as from one process.
    gather_bf16 = [each for batches in zip_longest(*shares) for each in batches if each is not None]
    total, tokens = sum(loss for loss, _ in gather_bf16), sum(count for _, count in gather_bf16)
    return total / tokens if tokens else float("nan")
