"""Whether a program waits for its GPU.

torch warns of it on a GPU, or makes an error of it. On a CPU nothing waits, but the same operations can be seen: those that
bring a number to Python, or whose result has a size that depends on values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATIONS = {
    *("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive"),
}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # which on a CPU are no operations
_SAYS = "called a synchronizing CUDA operation"


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Fails where the block waits for the device."""
    if device.type == "cuda":
        with _debug_mode("error"):
            yield
        return
    with waits(device) as found:
        yield
    assert not found


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """A list that has, when the block has ended, what in it waited for the device, and where."""
    found: list[str] = []
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught, _debug_mode("warn"):
            warnings.simplefilter("always")
            yield found
        found += [f"{each.filename}:{each.lineno}" for each in caught if _SAYS in str(each.message)]
    else:
        with _Methods(found), _Operations(found):
            yield found


@contextmanager
def _debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in _INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1])
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _OPERATIONS or by_mask or repeats:
            self._found.append(name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch.tensor([...], device=...) is made in main memory, and its copy is waited for.
        if function in _METHODS or (function is torch.tensor and isinstance((kwargs or {}).get("device"), torch.device)):
            self._found.append(function.__name__)
        return function(*args, **(kwargs or {}))


WAITING = {
    "a number": lambda x: float(x.sum()),
    "a condition": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.to("cpu").numpy(),
    "what a mask picks": lambda x: x[x > 0],
    "where it is written by a mask": lambda x: x.masked_select(x > 0),
    "numbers of Python": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "equality": lambda x: torch.equal(x, x.clone()),
}


def fails(wait: Any, x: Tensor) -> None:
    """That :func:`no_waits` notices one of :data:`WAITING`."""
    with pytest.raises((AssertionError, RuntimeError)), no_waits(x.device):
        wait(x)
