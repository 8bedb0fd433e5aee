"""Which device computes, and in which dtype. Weights and optimizer state are fp32 in any case."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from onym.errors import ConfigError, is_out_of_memory
from onym.gpt.hardware import computes_in_bf16

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and in which dtype the model runs."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in ``dtype``, sums and losses in fp32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def set_deterministic(self, wanted: bool) -> None:
        """Give the same bits each time: always on the CPU, elsewhere where it is wanted and may cost something.

        Compiled, the gradient of an embedding is otherwise summed up by several threads in the order in which they come.
        """
        if not wanted and self.device.type != "cpu":
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before it is first used
        torch.use_deterministic_algorithms(True, warn_only=not wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written

    @property
    def precision(self) -> str:
        """As ``--precision`` names it."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    def __str__(self) -> str:
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        return f"{where}, {self.precision if self.precision == 'fp32' else f'{self.precision} compute, fp32 weights'}"


def choose_compute(device: str, precision: str) -> Compute:
    """Resolve ``"auto"`` for this machine.

    Raises:
        ConfigError: there is no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"There is no device {device!r} here ({str(error).splitlines()[0][:100]}): take another --device."
        ) from error
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(chosen) else "fp32"
    return Compute(chosen, _DTYPES[precision])
