"""Modules of names and shapes alone: no memory, no random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _NoInitialisation(TorchFunctionMode):
    """Skips ``torch.nn.init``: on the meta device it begins by importing torch's compiler, which takes a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def no_values() -> Iterator[None]:
    """Modules that are made in this block are on the meta device."""
    with torch.device("meta"), _NoInitialisation():
        yield
