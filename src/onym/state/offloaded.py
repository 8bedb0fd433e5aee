"""Models whose weights are held outside of them: by accelerate (cpu_offload, disk_offload, dispatch_model, ``device_map``), or
by DeepSpeed's ZeRO-3.

Accelerate's tensors are on the meta device. A hook has the values, and puts them into the module for each forward pass.
DeepSpeed's parameters are empty between the passes. Both are known by what they are called and have, so nothing is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from onym.errors import ConfigError


def with_offloaded(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state with the values that hooks have, in the place of tensors on the meta device.

    Raises:
        ConfigError: DeepSpeed has the values.
    """
    _require_not_partitioned(model)
    for value in state.values():  # a plain loop: this is a part of every state_dict()
        if isinstance(value, Tensor) and value.is_meta:
            break
    else:
        return state
    for name, weights, key in _offloaded(model):
        if name in state and state[name].is_meta:
            state[name] = weights[key].detach()
    return state


def require_not_offloaded(model: nn.Module) -> None:
    """Refuse to load into a module whose hook would overwrite the values at the next forward pass.

    Raises:
        ConfigError: saying what to do instead.
    """
    _require_not_partitioned(model)
    if (first := next(_offloaded(model), None)) is not None:
        raise ConfigError(
            f"{first[0]} is offloaded: accelerate has its values outside of the model and would put the old ones back at the "
            "next forward pass. Load first and then offload, or call first accelerate.hooks.remove_hook_from_submodules(model)."
        )


def _require_not_partitioned(model: nn.Module) -> None:
    first = next(model.named_parameters(), None)  # under ZeRO-3 all of them are
    if first is not None and hasattr(first[1], "ds_id") and not first[1].numel() and bool(getattr(first[1], "ds_numel", False)):
        raise ConfigError(
            f"{first[0]} is empty here: DeepSpeed's ZeRO-3 has its values in parts, in all processes. Do it inside of "
            "deepspeed.zero.GatheredParameters(list(model.parameters())), or use the engine's save_checkpoint."
        )


def _offloaded(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Tensor], str]]:
    """The name of each offloaded tensor, the mapping that has its value, and its key there."""
    for path, module in model.named_modules(remove_duplicate=False):
        hook = module.__dict__.get("_hf_hook")
        for each in getattr(hook, "hooks", [hook] if hook is not None else []):
            weights = getattr(each, "weights_map", None)
            if not getattr(each, "offload", False) or weights is None:
                continue
            deep = each.place_submodules
            tensors = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
            yield from ((f"{path}.{key}".lstrip("."), weights, key) for key, tensor in tensors if tensor.is_meta)
