"""How much memory a program holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from onym.data.batches import Batch
from onym.train.step import Stepper

_PIECE = 1 << 30
ON_CPU = 8  # sequences that fit, where there is no limit


def allocated(device: torch.device) -> int:
    """Bytes of tensors that are there, without looking for those that nothing reaches any more."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.layout is torch.strided]
    found = {each.untyped_storage().data_ptr(): each.nbytes for each in tensors if each.device.type != "meta"}
    return sum(found.values())


def reserved(device: torch.device) -> int:
    """Bytes that the process has taken from a GPU, after it gave back what it can."""
    gc.collect()
    if device.type != "cuda":
        return allocated(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


@contextmanager
def little_memory(device: torch.device, bytes_left: int, stepper: Stepper) -> Iterator[None]:
    """A GPU with that much left; on a CPU a stepper that fails, as a GPU does, above :data:`ON_CPU` sequences."""
    if device.type == "cuda":
        limit, index = reserved(device) + bytes_left, torch.cuda.current_device()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(index)[1], index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)
        return
    loss = stepper._loss

    def limited(part: Batch) -> Tensor:
        found = loss(part)
        if len(part[0]) > ON_CPU:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepper, "_loss", limited)
        yield


def keep_all_of_it(device: torch.device) -> None:
    """Let torch take nearly all that a GPU has free, and not give it back, as after a large batch."""
    if device.type == "cuda":
        left = max(0, torch.cuda.mem_get_info(device)[0] - (256 << 20))
        # In pieces: one in which something lies is not given back at all.
        sizes = [_PIECE] * (left // _PIECE) + [left % _PIECE]
        pieces = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        del pieces
