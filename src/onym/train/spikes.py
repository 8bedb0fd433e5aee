"""Which steps are skipped: those whose loss or gradient is not finite, or far above the recent ones.

The device decides, and nothing waits for it: the answer is a tensor, which the optimizer reads there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WINDOW = 128
_ENOUGH = 64  # values from which a standard deviation is meaningful

TOO_MANY = 10
"""Skipped steps in a row after which the weights themselves count as corrupted. fp16 skips a few at its beginning, until its
scale fits."""


class SpikeDetector:
    """Judges each step by the ones before it.

    Args:
        sigma: standard deviations above the mean from which a value is a spike; 0 for none.
        device: where losses and norms are.
    """

    def __init__(self, sigma: float, device: torch.device) -> None:
        self._sigma = sigma
        self._recent = torch.zeros((2, _WINDOW), device=device)  # losses, gradient norms
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        """Steps in a row, up to the last one, that were skipped."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step is bad, a 0-d bool.

        Args:
            loss, norm: 0-d; of the gradient before it is clipped.
        """
        now = torch.stack([loss.detach(), norm.detach()]).float()
        finite = now.isfinite().all()
        bad = ~finite
        if self._sigma:
            filled = torch.arange(_WINDOW, device=now.device) < self._seen
            count = self._seen.clamp(1, _WINDOW)
            mean = self._recent.sum(dim=1) / count
            deviation = (((self._recent - mean[:, None]) * filled).square().sum(dim=1) / count).sqrt()
            # A tenth more, too: where nothing varies any more, a tiny rise is no spike.
            limit = 1.1 * mean + self._sigma * deviation
            bad = bad | ((now > limit).any() & (self._seen >= _ENOUGH))
            # Skipped values still enter the window, so a lasting shift stops counting as a spike.
            place = (self._seen % _WINDOW).expand(2, 1)
            self._recent.scatter_(1, place, torch.where(finite, now[:, None], self._recent.gather(1, place)))
            self._seen += finite
        self.streak = torch.where(bad, self.streak + 1, 0)
        return bad

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"recent": self._recent, "seen": self._seen, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        device = self._recent.device
        self._recent, self._seen = state["recent"].to(device), state["seen"].to(device)
        self.streak = state["streak"].to(device)
