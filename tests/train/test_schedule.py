"""Lengths, sizes and learning rates."""

from __future__ import annotations

from typing import Any

import pytest

from onym.errors import ConfigError
from onym.train.options import OptimizationOptions
from onym.train.schedule import make_schedule
from onym.units import parse_count


@pytest.mark.parametrize(
    ("options", "steps", "batch_size"),
    [
        ({}, 800, 8),
        ({"steps": 7}, 7, 8),
        ({"tokens": "10k"}, 10, 8),
        ({"tokens": "10_241"}, 11, 8),
        ({"epochs": 2.0}, 20, 8),
        ({"epochs": 0.01}, 1, 8),
        ({"tokens_per_step": "1k"}, 800, 8),
        ({"tokens_per_step": "5", "epochs": 1.0}, 80, 1),
    ],
)
def test_lengths_in_each_unit(options: dict[str, Any], steps: int, batch_size: int) -> None:
    schedule = make_schedule(OptimizationOptions(**options), context_length=128, training_tokens=80 * 128 + 1)
    assert (schedule.steps, schedule.batch_size) == (steps, batch_size)


def test_shapes_of_the_learning_rate() -> None:
    def rates(schedule: str) -> list[float]:
        options = OptimizationOptions(steps=100, warmup_steps=10, learning_rate=1.0, schedule=schedule)  # type: ignore[arg-type]
        made = make_schedule(options, 128, 10**6)
        return [round(made.learning_rate(step), 3) for step in (0, 9, 10, 55, 80, 90, 100)]

    assert rates("cosine") == [0.1, 1.0, 1.0, 0.55, 0.205, 0.127, 0.1]
    assert rates("linear") == [0.1, 1.0, 1.0, 0.55, 0.3, 0.2, 0.1]
    assert rates("constant") == [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("wsd") == [0.1, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]


def test_micro_batches_divide_the_batch() -> None:
    schedule = make_schedule(OptimizationOptions(batch_size=12), 128, 10**6)
    assert schedule.micro_batches("auto") == [12, 6, 4, 3, 2, 1]
    assert schedule.micro_batches("4") == [4]
    with pytest.raises(ConfigError, match="not a multiple of --micro-batch 5: take 6"):
        schedule.micro_batches("5")


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "1e99", "5 parsecs", "1_0k0", "٣"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--tokens is a number of tokens as 10M"):
        parse_count(text, "--tokens")
