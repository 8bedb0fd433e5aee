"""What a device computes fast."""

from __future__ import annotations

import time

import torch

from onym.errors import is_out_of_memory

_READ_BYTES, _READ_BYTES_ON_GPUS = 256 << 20, 2 << 30


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware; emulated, they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def is_broken(error: BaseException) -> bool:
    """Whether an error is of a kind after which a GPU answers nothing else in this process, such as an illegal address."""
    kind = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    if kind is None or not isinstance(error, kind) or is_out_of_memory(error):
        return False
    try:
        torch.accelerator.synchronize()
    except RuntimeError:
        return True
    return False


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads from its memory: the best of a few sums over more than its caches hold.

    On a GPU several sums are queued, so that neither launching them nor waiting for them counts.
    """
    size, sums = _READ_BYTES, 1
    if device.type == "cuda":
        size, sums = max(4, min(_READ_BYTES_ON_GPUS, torch.cuda.mem_get_info(device)[0] // 2)), 10
    values = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(sums):
            total = values.sum()
        float(total)
        best = max(best, sums * values.nbytes / (time.perf_counter() - began))
    return best
