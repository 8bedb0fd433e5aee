"""How long to train, how much goes into a step, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onym.errors import ConfigError
from onym.train.options import DEFAULT_STEPS, OptimizationOptions
from onym.units import parse_count


@dataclass(frozen=True)
class Schedule:
    """The options in steps and sequences, now that the text and the context are known."""

    options: OptimizationOptions
    steps: int
    batch_size: int
    """Sequences in a step."""
    context_length: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step learns from."""
        return self.batch_size * self.context_length

    def learning_rate(self, step: int) -> float:
        """The rate of one step, counted from 0.

        >>> options = OptimizationOptions(warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
        >>> [round(Schedule(options, 100, 8, 128).learning_rate(step), 2) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.55, 0.1]
        """
        options, peak = self.options, self.options.learning_rate
        assert peak is not None, "the optimizer's recipe has been chosen"
        if step < options.warmup_steps:
            return peak * (step + 1) / options.warmup_steps
        progress = min(1.0, (step - options.warmup_steps) / max(1, self.steps - options.warmup_steps))
        above = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "wsd": min(1.0, max(0.0, self.steps - step) / max(1.0, self.steps * options.decay_share)),
            "constant": 1.0,
        }[options.schedule]
        return peak * (options.min_learning_rate + (1 - options.min_learning_rate) * above)

    def micro_batches(self, given: str, processes: int = 1) -> list[int]:
        """The sizes of micro-batch to try, the largest first; each divides a rank's part of the batch.

        Raises:
            ConfigError: the one that is asked for does not divide it, or the processes cannot share it.
        """
        share, left = divmod(self.batch_size, processes)
        if left:
            nearest = max(1, round(self.batch_size / processes)) * processes
            raise ConfigError(
                f"A step of {self.batch_size} sequences cannot be divided among {processes} processes: take --batch-size "
                f"{nearest}."
            )
        fitting = [size for size in range(share, 0, -1) if share % size == 0]
        if given == "auto":
            return fitting
        if int(given) not in fitting:
            closest = min(fitting, key=lambda size: abs(size - int(given)))
            raise ConfigError(f"A batch of {share} sequences is not a multiple of --micro-batch {given}: take {closest}.")
        return [int(given)]


def make_schedule(options: OptimizationOptions, context_length: int, training_tokens: int) -> Schedule:
    """Put lengths and sizes that were given as tokens or epochs into steps and sequences.

    Args:
        context_length: tokens in a sequence.
        training_tokens: of the text, for ``--epochs``.
    """
    batch_size = options.batch_size
    if options.tokens_per_step is not None:
        batch_size = max(1, round(parse_count(options.tokens_per_step, "--tokens-per-step") / context_length))
    per_step = batch_size * context_length
    steps = options.steps or DEFAULT_STEPS
    if options.tokens is not None:
        steps = math.ceil(parse_count(options.tokens, "--tokens") / per_step)
    elif options.epochs is not None:
        windows = max(0, (training_tokens - 1) // context_length)
        steps = math.ceil(options.epochs * windows / batch_size)
    return Schedule(options, max(1, steps), batch_size, context_length)
