"""An optimizer's state by parameter name.

PyTorch numbers the state by the order in which parameters were handed to the optimizer, so a regrouped optimizer restores
wrongly without a word. Here each tensor is ``state.<slot>.<name>``, and each parameter's hyperparameters are found by its
name too. Reading never steps the optimizer; restoring is checked as a whole before anything is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from origo.errors import CheckpointError
from origo.naming.canonical import canonical_names


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as named tensors and JSON values.

    Args:
        model: the module whose parameters the optimizer updates, plain or wrapped.
        optimizer: its state may hold tensors, numbers, strings and None.

    Returns:
        ``{"state.<slot>.<parameter name>": tensor}`` (live, not copied), and a JSON object with the groups' hyperparameters
        and the values that are no tensors.
    """
    names = _parameter_names(model)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, slots in optimizer.state.items():
        name = _name_of(parameter, names)
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"state.{slot}.{name}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                values.setdefault(name, {})[slot] = value
            else:
                raise CheckpointError(
                    f"The optimizer keeps a {type(value).__name__} as {slot!r} of {name}; only tensors and plain values can "
                    "be stored."
                )
    groups = [
        {
            "params": [_name_of(parameter, names) for parameter in group["params"]],
            **{key: _json_value(value) for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": values}


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Restore what :func:`optimizer_state` returned, into an optimizer over the same parameters.

    Raises:
        CheckpointError: parameters differ, or parameters of one group were stored with unequal hyperparameters; nothing has
            been changed.
    """
    names = _parameter_names(model)
    live = [_name_of(parameter, names) for group in optimizer.param_groups for parameter in group["params"]]
    stored_group = {name: group for group in description["groups"] for name in group["params"]}
    if set(live) != set(stored_group):
        absent, extra = sorted(set(live) - set(stored_group)), sorted(set(stored_group) - set(live))
        raise CheckpointError(
            "The stored optimizer state is of other parameters: "
            f"{len(absent)} of this optimizer's are not stored {absent[:3]}, {len(extra)} stored ones it does not have "
            f"{extra[:3]}. Restore the model alone to start with a fresh optimizer."
        )
    state: dict[str, dict[str, Any]] = {name: dict(description["values"].get(name, {})) for name in live}
    for key, tensor in tensors.items():
        _, slot, name = key.split(".", 2)
        state[name][slot] = tensor
    groups = []
    position = 0
    for number, group in enumerate(optimizer.param_groups):
        members = live[position : position + len(group["params"])]
        hyperparameters = [{k: v for k, v in stored_group[name].items() if k != "params"} for name in members]
        if any(other != hyperparameters[0] for other in hyperparameters):
            raise CheckpointError(
                f"The parameters of group {number} were stored in groups with unequal hyperparameters: group them as they "
                "were, or restore the model alone."
            )
        stored = hyperparameters[0] if hyperparameters else {}
        restored = {key: _like(value, group.get(key)) for key, value in stored.items()}
        groups.append({**restored, "params": list(range(position, position + len(members)))})
        position += len(members)
    optimizer.load_state_dict(
        {"state": {index: state[name] for index, name in enumerate(live) if state[name]}, "param_groups": groups}
    )


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """Canonical name by parameter; a tied one has the first of its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    for raw, canonical in canonical_names(model, parameters).items():
        names.setdefault(id(parameters[raw]), canonical)
    return names


def _name_of(parameter: Tensor, names: Mapping[int, str]) -> str:
    if id(parameter) not in names:
        raise CheckpointError(
            f"The optimizer updates a parameter of shape {list(parameter.shape)} that is not the model's: pass the model "
            "that the optimizer was made for."
        )
    return names[id(parameter)]


def _json_value(value: Any) -> Any:
    """Hyperparameters as JSON holds them: a tuple becomes a list, a 0-d tensor its number."""
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(value: Any, live: Any) -> Any:
    """A stored hyperparameter in the type that the live optimizer has it in."""
    if isinstance(live, Tensor):
        return torch.full_like(live, value)
    return tuple(value) if isinstance(live, tuple) else value
