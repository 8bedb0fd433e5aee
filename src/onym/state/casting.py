"""Which dtypes convert to which, and whether values are lost by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onym.state.dtensor import local


def overflows(stored: Any, live: Any) -> bool:
    """Whether values are beyond the range of a smaller dtype of the same kind; of shards, this rank's."""
    if not isinstance(stored, Tensor) or not isinstance(live, Tensor):
        return False
    values = local(stored)
    if values.is_floating_point() and live.is_floating_point():
        most = torch.finfo(live.dtype).max
        return most < torch.finfo(values.dtype).max and bool((values.isfinite() & (values.abs() > most)).any())
    if any(each.dtype == torch.bool or each.is_floating_point() or each.is_complex() for each in (values, live)) or not len(
        values.flatten()
    ):
        return False
    least, largest = torch.iinfo(live.dtype).min, torch.iinfo(live.dtype).max
    return int(values.min()) < least or int(values.max()) > largest


def castable(stored: str, live: str) -> bool:
    """Whether a cast preserves the kind of number: float to float, integer to float, but not float to integer."""
    was, now = getattr(torch, stored, None), getattr(torch, live, None)
    return isinstance(was, torch.dtype) and isinstance(now, torch.dtype) and torch.can_cast(was, now)
