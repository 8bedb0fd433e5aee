"""What a checkpoint holds of the training itself, beside the model, the optimizers and the random number generators.

One dataclass of plain values: what is saved is what is here, and nothing else decides how a run continues. The held-out losses,
the skipped batches and the rows of metrics.jsonl that are not written yet are in it, so a run that is killed and continued
writes the same rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from onym.checkpoint.restore import stored_values
from onym.format.reader import Checkpoint
from onym.train.step import Result

KEY = "train_state"
"""Its name in a checkpoint."""


@dataclass
class TrainState:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Wall-clock time of those steps and of everything between them."""
    tokens: str = ""
    """Name of the token cache, which is a hash of the text and the tokenizer."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the last bit of a result depends on, besides the options: torch, the machine, the processes."""
    micro_batch: int = 0
    """Sequences that go through the model at once; 0 before that is known."""
    first_held_out: float = math.nan
    """Held-out loss before the first step."""
    held_out: float = math.nan
    """The newest one."""
    best: float = math.nan
    best_step: int = -1
    evaluations_since_best: int = 0
    skipped_batches: list[list[int]] = field(default_factory=list)
    """Batches that rollbacks left out, as [first, count], in ascending order."""
    skipped_steps: int = 0
    """Steps that were not applied."""
    rollbacks: int = 0
    streak: int = 0
    """Steps in a row, up to the last one, that were not applied."""
    pending: list[Result] = field(default_factory=list)
    """Results of the steps since the last row of metrics.jsonl."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.jsonl that are not written yet."""
    rows_written: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; waits for the device."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {**values, "pending": [[each.loss.item(), each.norm.item(), each.bad.item()] for each in self.pending]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Read what :meth:`to_dict` gave."""
        pending = [Result(*map(torch.tensor, each)) for each in values["pending"]]
        return cls(**{**values, "pending": pending})

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TrainState:
        """That of a checkpoint of ``onym train``."""
        return cls.from_dict(stored_values(checkpoint)[KEY])

    def batch_number(self, step: int) -> int:
        """The batch of a step: the same number, plus those that rollbacks left out before it.

        >>> TrainState(skipped_batches=[[20, 10]]).batch_number(20)
        30
        """
        for first, count in self.skipped_batches:
            step += count if step >= first else 0
        return step

    def record_evaluation(self, held_out: float) -> None:
        """Take in the held-out loss after :attr:`step`; NaN is never the best one."""
        self.held_out = held_out
        if not held_out >= self.best and not math.isnan(held_out):
            self.best, self.best_step, self.evaluations_since_best = held_out, self.step, 0
        elif self.step:
            self.evaluations_since_best += 1

    def summary(self) -> dict[str, Any]:
        """What run.json shows of it: JSON has no NaN."""
        losses = {name: None if math.isnan(value := getattr(self, name)) else value for name in ("held_out", "best")}
        return {"step": self.step, **losses, "best_step": self.best_step}
