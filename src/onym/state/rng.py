"""The state of every random number generator that training draws from, as tensors and JSON values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Start every generator from one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Capture the generators of Python, NumPy, torch and each CUDA device."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(np.asarray(keys, dtype=np.uint32).copy())}
    if torch.cuda.is_initialized():  # else nothing was drawn there, and asking would take hold of the device
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{device}"] = state
    values = {
        "python": [version, list(words), gauss],
        "numpy": [algorithm, int(position), int(has_gauss), float(cached)],
    }
    return tensors, values


def require_rng_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """See that :func:`load_rng_state` would succeed, with generators that nobody uses.

    Raises:
        Exception: of whatever type Python, NumPy or torch choose.
    """
    version, words, gauss = values["python"]
    random.Random().setstate((version, tuple(words), gauss))
    algorithm, position, has_gauss, cached = values["numpy"]
    np.random.RandomState().set_state((algorithm, tensors["rng.numpy"].numpy(), position, has_gauss, cached))
    torch.Generator().set_state(tensors["rng.torch"].clone())


def load_rng_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put the generators back; CUDA devices that are not here any more are passed over."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, position, has_gauss, cached = values["numpy"]
    np.random.set_state((algorithm, tensors["rng.numpy"].numpy(), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng.torch"].clone())  # torch reads it as numbers of eight bytes: a mapped one may lie anywhere
    if torch.cuda.is_available() and any(name.startswith("rng.cuda.") for name in tensors):
        for device in range(torch.cuda.device_count()):
            if (state := tensors.get(f"rng.cuda.{device}")) is not None:
                torch.cuda.set_rng_state(state.clone(), device)
