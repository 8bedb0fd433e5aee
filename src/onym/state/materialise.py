"""Memory for a model that was built on the meta device, so that it can be loaded into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onym.errors import CheckpointError, ConfigError
from onym.state.offloaded import require_not_offloaded


@contextmanager
def materialise_meta(model: nn.Module, device: str | torch.device = "cpu") -> Iterator[set[int]]:
    """Give a model's tensors on the meta device memory to load into; taken back if the load in the block fails.

    Tied ones stay tied. They are new tensors: an optimizer over them is built afterwards.

    Yields:
        Where their memory is (``data_ptr()``): it holds no values yet.

    Raises:
        ConfigError: one of them is a buffer that is never saved, so nothing could give it values.
    """
    require_not_offloaded(model)
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    new: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta or is_lazy(tensor):
                    continue
                if table is module._buffers and name in module._non_persistent_buffers_set:
                    raise ConfigError(
                        f"{path}.{name} is on the meta device and is a buffer that is not stored (persistent=False), so "
                        "loading cannot give it its values: build the model on a real device."
                    )
                replaced.append((table, name, tensor))
                if id(tensor) not in new:
                    try:
                        empty = _memory_for(tensor, device)
                    except RuntimeError as error:
                        raise CheckpointError(
                            f"There is no memory for {path}.{name}, which has {tensor.numel():,} numbers: {str(error)[:120]}"
                        ) from error
                    isolated = isinstance(tensor, nn.Parameter)
                    new[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isolated else empty
    for table, name, tensor in replaced:
        table[name] = new[id(tensor)]
    try:
        yield {tensor.data_ptr() for tensor in new.values() if tensor.numel()}
    except BaseException:
        for table, name, tensor in replaced:
            table[name] = tensor
        raise


def _memory_for(tensor: Tensor, device: str | torch.device) -> Tensor:
    """What ``empty_like`` gives; of the meta device, that begins by importing sympy, which takes a third of a second."""
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.empty_like(tensor, device=device)
