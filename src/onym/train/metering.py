"""How fast training is: the time of the steps alone, without evaluation, sampling, saving and compiling; against what the
machine could do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from onym.gpt.config import ModelConfig
from onym.gpt.hardware import synchronize
from onym.train.precision import Compute

# Dense bf16 and fp16 operations a second, from the vendor's data sheets; the more exact name before the shorter one.
_DOCUMENTED = {
    "H200 NVL": 835e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
}
_SIDE = 1024  # of the matrices that are multiplied to measure
_SIDE_ON_GPUS = 8192  # to launch a small product takes longer than the product
_MEASURED_FOR = 0.3  # seconds


class Meter:
    """Times steps.

    Args:
        tokens_per_step: tokens in one.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self._all, self._recent = _Sums(), _Sums()

    @contextmanager
    def step(self, waited_seconds: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """The time of one step; ``waited_seconds`` is a clock of how much was waited for data."""
        start, waited = time.perf_counter(), waited_seconds()
        yield
        seconds, waited = time.perf_counter() - start, waited_seconds() - waited
        for sums in (self._all, self._recent):
            sums.steps += 1
            sums.seconds += seconds
            sums.waited += waited

    def tokens_per_second(self) -> float:
        """Over the steps since the last call; 0 where there were none."""
        recent, self._recent = self._recent, _Sums()
        return self.tokens_per_step * recent.steps / recent.seconds if recent.steps else 0.0

    def mean_tokens_per_second(self) -> float:
        """Over all steps; 0 where there were none."""
        return self.tokens_per_step * self._all.steps / self._all.seconds if self._all.steps else 0.0

    def share_waited(self) -> float:
        """Share of the time that data was waited for, over the steps since :meth:`tokens_per_second` was last called."""
        return self._recent.waited / self._recent.seconds if self._recent.steps else 0.0

    def mean_share_waited(self) -> float:
        """The same over all steps."""
        return self._all.waited / self._all.seconds if self._all.steps else 0.0


@dataclass
class _Sums:
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True)
class Peak:
    """The most that a device can do."""

    flops: float
    """Floating-point operations a second in matrix products; a multiplication and an addition are two."""
    source: str
    """Where the figure is from."""


def training_flops_per_token(config: ModelConfig, trained: float = 1.0) -> float:
    """Operations of matrix products, forward and backward, for each token.

    Six for each weight that is multiplied (the embeddings are looked up; the head counts once, tied or not), and 12 x layers x
    width x context for attention: the whole square, though half of it is masked, as the field counts (PaLM, appendix B). Of a
    weight that is frozen four, because it has no gradient.

    Args:
        trained: the share of the weights that are not frozen.

    >>> from onym.gpt.config import GPTConfig
    >>> round(training_flops_per_token(GPTConfig.preset("gpt2-small")) / 1e6)
    854
    """
    attention = 12.0 * config.n_layers * config.attention_width * config.context_length
    return (4.0 + 2.0 * trained) * config.multiplied_weights + attention


def peak_of(compute: Compute) -> Peak:
    """A GPU's documented figure where it is known, else what a product of two matrices reaches here, now."""
    if compute.device.type == "cuda" and compute.dtype != torch.float32:
        peak = documented_peak(torch.cuda.get_device_name(compute.device))
        if peak is not None:
            return peak
    return Peak(matmul_flops(compute.device, compute.dtype), "the matmul rate measured here")


def documented_peak(gpu: str) -> Peak | None:
    """What the vendor documents of a GPU, by the name that torch gives it; None where it is not known here.

    >>> documented_peak("NVIDIA L4").source, documented_peak("NVIDIA L40")
    ("L4's documented peak", None)
    """
    if re.search(r"\b(MIG|Laptop)\b", gpu):  # a part of it, or a smaller one of the same name
        return None
    for known, flops in _DOCUMENTED.items():
        if re.search(rf"\b{known}\b", gpu):
            return Peak(flops, f"{known}'s documented peak")
    return None


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = _MEASURED_FOR) -> float:
    """Operations a second that a product of two square matrices reaches: the best of those in ``seconds``, at least of one."""
    side = _SIDE if device.type == "cpu" else _SIDE_ON_GPUS
    # Not of ones, which take less power and so less time; nor drawn from the generator that training draws from.
    drawn = torch.Generator(device).manual_seed(0)
    matrix = torch.rand(side, side, device=device, generator=drawn).to(dtype)
    synchronize(device)

    def once() -> float:
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        return time.perf_counter() - start

    ends, best = time.perf_counter() + seconds, once()
    while time.perf_counter() < ends:
        best = min(best, once())
    return 2.0 * side**3 / best


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or what this process has resident now; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096
