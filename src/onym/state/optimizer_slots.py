"""The state that an optimizer gives a parameter at its first step: it builds stored tensors of its own classes (8-bit moments).

A fresh optimizer has no state yet. So its step is called on a twin, with its settings and hyperparameters, over a parameter
and a gradient of zeros. The optimizer itself is not stepped, and the random number generators stay as they are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onym.errors import CheckpointError
from onym.state.composite import Unbuilt
from onym.state.dtensor import is_sharded


class SlotBuilder:
    """Builds the subclass tensors in stored slots, for one optimizer's parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._fresh: dict[Any, Mapping[str, Any]] = {}  # by the group and the shape of a parameter

    def build(self, slots: dict[str, Any], name: str, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The slots of a parameter; as they are where nothing has to be built.

        Raises:
            CheckpointError: the optimizer has another class of tensor there, or none.
        """
        if not _has_unbuilt(slots):
            return slots
        if is_sharded(parameter):
            raise CheckpointError(
                f"The optimizer's state of {name} is of tensors made of others, which cannot be restored into sharded ones: "
                "restore the model alone."
            )
        live: Mapping[str, Any] = self._optimizer.state.get(parameter, {})
        if not slots.keys() <= live.keys():
            key = (id(group), parameter.shape, parameter.dtype, parameter.device)
            if key not in self._fresh:
                self._fresh[key] = _first_state(self._optimizer, group, parameter, name)
            live = self._fresh[key]
        return {slot: _built(value, live.get(slot), slot, name) for slot, value in slots.items()}


def _first_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, name: str) -> Mapping[str, Any]:
    twin = object.__new__(type(optimizer))
    twin.__dict__ |= {
        key: value for key, value in vars(optimizer).items() if key != "step"
    }  # a scheduler's, bound to the other
    zeros = nn.Parameter(torch.zeros_like(parameter))
    zeros.grad = torch.zeros_like(parameter)
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    twin.param_groups, twin.state = [{**settings, "params": [zeros]}], defaultdict(dict)
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            type(optimizer).step(twin)
    except Exception as error:  # its own code
        raise CheckpointError(
            f"{type(optimizer).__name__} does not make the state that was stored of {name}: {error}. Call its step() once "
            "before it is restored, or restore the model alone."
        ) from error
    made: Mapping[str, Any] = twin.state[zeros]
    return made


def _has_unbuilt(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_unbuilt, value.values()))
    return any(map(_has_unbuilt, value)) if isinstance(value, list | tuple) else isinstance(value, Unbuilt)


def _built(value: Any, live: Any, slot: str, name: str) -> Any:
    """A stored value with its subclass tensors built by those at the same places in a live one."""
    if isinstance(value, Unbuilt):
        return value.built_by(live, f"The optimizer's {slot} of {name}")
    if type(value) is dict:
        inside = live if isinstance(live, Mapping) else {}
        return {key: _built(each, inside.get(key), f"{slot}.{key}", name) for key, each in value.items()}
    if type(value) in (list, tuple):
        inside = dict(enumerate(live)) if isinstance(live, list | tuple) else {}
        return type(value)(_built(each, inside.get(index), f"{slot}.{index}", name) for index, each in enumerate(value))
    return value
