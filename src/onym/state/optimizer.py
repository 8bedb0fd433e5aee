"""An optimizer's state by parameter name.

PyTorch numbers the state by the order in which parameters were handed to the optimizer, so a regrouped optimizer restores
wrongly without a word. Here each tensor is ``state.<slot>.<name>``, and each parameter's hyperparameters are found by its
name too. Reading never steps the optimizer. Restoring checks everything before it changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from onym.errors import CheckpointError, ConfigError
from onym.names.plain_view import plain_view
from onym.names.wrappers import require_module
from onym.state.dtensor import distribute_like, full_tensor, has_flat_parameters, is_sharded
from onym.state.optimizer_slots import SlotBuilder
from onym.state.patterns import matches, require_patterns
from onym.state.tree import flatten, unflatten

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer]

Difference = Literal["added", "removed", "hyperparameters", "optimizer"]
"""What may differ between the optimizer that was stored and the one that is restored."""

# How a step is computed, not what it computes: the live optimizer's choice, which fits the machine that it is on.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
# The groups' own bookkeeping, said in another way here.
_STRUCTURE = {"params", "param_names"}
# Their state is one long vector over all parameters, in their order.
_ORDER_MATTERS = {"LBFGS"}
# What Accelerate and Fabric put around an optimizer, which they hold as ``optimizer``.
_OPTIMIZER_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning_fabric.wrappers._FabricOptimizer",
    "lightning.fabric.wrappers._FabricOptimizer",
}
_SHOWN = 3


@dataclass(frozen=True)
class OptimizerReport:
    """What a restore did. All names are canonical."""

    restored: list[str]
    fresh: list[str] = field(default_factory=list)
    """Without stored state of this optimizer's class or of their shape: they start as new ones (only with
    ``accept=["added"]``, ``["optimizer"]`` or ``skip_mismatched``)."""
    dropped: list[str] = field(default_factory=list)
    """Stored but not optimised any more: not used (only with ``accept=["removed"]``)."""
    kept: list[str] = field(default_factory=list)
    """``group N: key`` for hyperparameters that stayed the live optimizer's (only with ``accept=["hyperparameters"]``)."""


def optimizer_state(model: nn.Module, optimizers: Optimizers) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of one optimizer, or of several over the same model, as named tensors and JSON values.

    Args:
        model: the module whose parameters the optimizers update, plain or wrapped.
        optimizers: one, a list or a dict of them; no parameter may be in two. Their state may hold tensors, numbers, strings,
            None, and lists and dicts of these.

    Returns:
        ``{"state.<slot>.<parameter name>": tensor}`` (live, not copied), and a JSON object with the groups' hyperparameters
        and the values that are no tensors.

    Raises:
        CheckpointError: something in the state cannot be saved, or belongs to no parameter of the model.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.ones(1, 2)).backward(); optimizer.step()
    >>> tensors, description = optimizer_state(torch.compile(model), optimizer)
    >>> list(tensors), description["groups"][0]["params"]
    (['state.momentum_buffer.weight', 'state.momentum_buffer.bias'], ['weight', 'bias'])
    """
    names = _Names(model)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for optimizer in _as_list(optimizers):
        kind = type(optimizer).__name__
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for key in optimizer.state:
            if id(key) not in held:
                what = (
                    f"of shape {list(key.shape)}, which is in none of its groups" if isinstance(key, Tensor) else f"as {key!r}"
                )
                raise CheckpointError(f"{kind} has state for a parameter {what}: save that beside the optimizer, or delete it.")
        try:
            further = set(optimizer.state_dict()) - {"state", "param_groups"}
        except Exception as error:  # its own code
            raise CheckpointError(f"{kind} does not give its state: {error}") from error
        if further:
            raise CheckpointError(
                f"{kind} has {', '.join(sorted(map(repr, further)))} in its state besides what belongs to its parameters: "
                "save that beside the optimizer."
            )
        for group in optimizer.param_groups:
            members = [names.of(parameter) for parameter in group["params"]]
            for name, parameter in zip(members, group["params"], strict=True):
                if name in parameters:
                    raise CheckpointError(f"{name} is optimised twice, so its state has no single name.")
                found, slots = _flat_slots(optimizer.state.get(parameter, {}), name)
                assert not found.keys() & tensors.keys(), "a slot's name has a dot in it"
                tensors.update(found)
                parameters[name] = {"shape": list(parameter.shape), "state": slots}
            groups.append({"optimizer": kind, "params": members, "hyperparameters": _hyperparameters(group)})
    return tensors, {"groups": groups, "parameters": parameters}


def load_optimizer_state(
    model: nn.Module,
    optimizers: Optimizers,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    accept: Difference | Iterable[Difference] = (),
    skip_mismatched: str | Iterable[str] = (),
) -> OptimizerReport:
    """Restore what :func:`optimizer_state` returned, by name: groups may be split, joined, reordered, the model wrapped anew.

    Hyperparameters are restored too, except ``foreach``, ``fused``, ``capturable`` and ``differentiable``, which say how a step
    is computed.

    Args:
        model: the module whose parameters the optimizers update, plain or wrapped.
        optimizers: one, a list or a dict of them; which of several holds a parameter need not be as it was.
        tensors: copied, so they may be mapped from a file or belong to another optimizer. Dtypes stay as stored.
        description: the JSON object.
        accept: the differences to go on with, each of them refused otherwise. ``"added"``: parameters without stored state
            start fresh. ``"removed"``: stored ones that are not optimised any more are dropped. ``"hyperparameters"``: where a
            group joins parameters with unequal ones, the live group's stay. ``"optimizer"``: parameters whose state is another
            class's start fresh, with the hyperparameters that both classes have.
        skip_mismatched: names, modules or patterns (``["head.*"]``) of parameters that start fresh where they have another
            shape than the one that the state is for; as for :func:`onym.load_state_dict`.

    Returns:
        What was restored, and what was not.

    Raises:
        CheckpointError: it does not fit, in one sentence a difference; nothing has been changed.

    >>> model = nn.Linear(2, 1)
    >>> one = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> two = torch.optim.SGD([{"params": [model.bias]}, {"params": [model.weight]}], lr=9.0)
    >>> report = load_optimizer_state(model, two, *optimizer_state(model, one))
    >>> report.restored, [group["lr"] for group in two.param_groups]
    (['bias', 'weight'], [0.1, 0.1])
    """
    return prepare_optimizer_state(model, optimizers, tensors, description, accept=accept, skip_mismatched=skip_mismatched)()


def prepare_optimizer_state(
    model: nn.Module,
    optimizers: Optimizers,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    accept: Difference | Iterable[Difference],
    skip_mismatched: str | Iterable[str],
) -> Callable[[], OptimizerReport]:
    """:func:`load_optimizer_state` without its last step, which changes the optimizer, cannot fail, and is returned."""
    accepted: set[str] = {accept} if isinstance(accept, str) else set(accept)
    if unknown := accepted - set(get_args(Difference)):
        raise ConfigError(f"accept takes {', '.join(map(repr, get_args(Difference)))}, not {', '.join(map(repr, unknown))}.")
    if not (isinstance(description, Mapping) and {"groups", "parameters"} <= set(description)):
        raise CheckpointError("This is no optimizer state as this version of Onym saves it: start with a fresh optimizer.")
    names = _Names(model)
    # A stored name may be another one of a tied parameter's names here.
    stored = {names.first_of(name): entry for name, entry in description["parameters"].items()}
    stored_groups = {names.first_of(name): group for group in description["groups"] for name in group["params"]}
    groups = [(optimizer, group) for optimizer in _as_list(optimizers) for group in optimizer.param_groups]
    members = [[names.of(parameter) for parameter in group["params"]] for _, group in groups]
    live = {
        name: parameter
        for part, (_, group) in zip(members, groups, strict=True)
        for name, parameter in zip(part, group["params"], strict=True)
    }

    problems = _Problems(accepted)
    for one, other in _joined(description["parameters"], names):
        problems.add(None, f"{one} and {other} are one parameter here, and were stored with a state each: untie them.")
    added, removed = [name for name in live if name not in stored], [name for name in stored if name not in live]
    if added:
        problems.add("added", f"{len(added)} of the parameters to optimise have no stored state: {_listed(added)}.")
    if removed:
        frozen = [name for name in removed if name in names]
        why = "are in the model but not optimised (frozen?)" if len(frozen) == len(removed) else "are not optimised here"
        problems.add("removed", f"{len(removed)} of the stored parameters {why}: {_listed(removed)}.")
    patterns = require_patterns(skip_mismatched, live)
    restored_groups: list[dict[str, Any]] = []
    kept: list[str] = []
    anew: set[str] = set()  # names whose stored state is another class's, or of another shape
    for name, parameter in live.items():
        if name in stored and (was := stored[name]["shape"]) != list(parameter.shape):
            if matches(patterns, name):
                anew.add(name)
                continue
            sentence = f"The state of {name} is for the shape {was}, the parameter has {list(parameter.shape)}"
            problems.add(None, f'{sentence}: skip_mismatched=["{name}"] starts it fresh.')

    for number, ((optimizer, group), part) in enumerate(zip(groups, members, strict=True)):
        kind, known = type(optimizer).__name__, [stored_groups[name] for name in part if name in stored_groups]
        if others := sorted({former["optimizer"] for former in known} - {kind}):
            problems.add("optimizer", f"Group {number} was stored by {_listed(others)}, this is {kind}.")
            anew.update(name for name in part if name in stored_groups and stored_groups[name]["optimizer"] != kind)
        if kind in _ORDER_MATTERS and known and known[0]["params"] != part:
            problems.add(None, f"The state of {kind} is in the order of its parameters, which is another one here.")
        hyperparameters, unequal = _common([former["hyperparameters"] for former in known])
        if unequal:
            shown = sorted({str(former["hyperparameters"].get(unequal[0])) for former in known})
            problems.add(
                "hyperparameters",
                f"Group {number} joins parameters that were stored with unequal {_listed(unequal)} ({_listed(shown)}).",
            )
            kept += [f"group {number}: {key}" for key in unequal]
        restored_groups.append(
            {
                key: _like(unflatten(value, tensors), group.get(key))
                for key, value in hyperparameters.items()
                if key not in _IMPLEMENTATION and (key in group or not others)
            }
        )
    problems.raise_if_any()

    slots: dict[str, dict[str, Any]] = {}
    for (optimizer, group), part in zip(groups, members, strict=True):
        builder = SlotBuilder(optimizer)
        for name in part:
            if name in anew:
                slots[name] = {}
            elif name in stored:
                convert = _Placing(live[name], on_device=bool(group.get("fused") or group.get("capturable")))
                slots[name] = builder.build(unflatten(stored[name]["state"], tensors, convert), name, live[name], group)
    restored = [name for name in live if name in stored and name not in anew]
    report = OptimizerReport(restored, [name for name in live if name in anew or name not in stored], removed, kept)

    def change() -> OptimizerReport:
        filled: set[int] = set()
        for (optimizer, group), hyperparameters, part in zip(groups, restored_groups, members, strict=True):
            for key, value in hyperparameters.items():
                held = group.get(key)
                if isinstance(held, Tensor) and id(held) in filled and torch.equal(held, value):  # groups may share one
                    continue
                if isinstance(held, Tensor) and id(held) not in filled and _fill(held, value):
                    filled.add(id(held))
                else:
                    group[key] = value
            for name in part:
                if slots.get(name):
                    if group.get("capturable"):
                        _fill_state(optimizer.state.get(live[name]), slots[name])
                    optimizer.state[live[name]] = slots[name]
                elif name in slots:
                    optimizer.state.pop(live[name], None)
        return report

    return change


def _common(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What the former groups of some parameters agree on, and the names of what they do not."""
    keys = dict.fromkeys(key for group in groups for key in group)
    equal = [key for key in keys if all(key in group and group[key] == groups[0][key] for group in groups)]
    return {key: groups[0][key] for key in equal}, sorted(set(keys) - set(equal))


class _Names:
    """The canonical names of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        require_module(model)
        if has_flat_parameters(model):
            raise CheckpointError(
                "The state of an optimizer over FSDP1's flat parameters cannot be saved by name: use fully_shard (FSDP2)."
            )
        self._first: dict[int, str] = {}  # by the parameter's identity; a tied one has several names
        self._first_of: dict[str, str] = {}
        for name, parameter in plain_view(model).named_parameters(remove_duplicate=False):
            self._first_of[name] = self._first.setdefault(id(parameter), name)

    def __contains__(self, name: str) -> bool:
        return name in self._first_of

    def of(self, parameter: Tensor) -> str:
        """Its first name."""
        if id(parameter) not in self._first:
            raise CheckpointError(
                f"The optimizer updates a parameter of shape {list(parameter.shape)} that is not the model's: pass the model "
                "that the optimizer was made for."
            )
        return self._first[id(parameter)]

    def first_of(self, name: str) -> str:
        """The first name of the parameter that has this one; of an unknown one, itself."""
        return self._first_of.get(name, name)


class _Problems:
    """The differences that nobody accepted, to be reported together."""

    def __init__(self, accepted: set[str]) -> None:
        self._accepted, self._lines = accepted, list[str]()

    def add(self, difference: Difference | None, sentence: str) -> None:
        if difference is None:
            self._lines.append(sentence)
        elif difference not in self._accepted:
            self._lines.append(f'{sentence} accept=["{difference}"] goes on with that.')

    def raise_if_any(self) -> None:
        if self._lines:
            shown = self._lines[:8] + ([f"And {len(self._lines) - 8} more differences."] if len(self._lines) > 8 else [])
            raise CheckpointError(
                "\n".join(
                    [
                        "The stored optimizer state does not fit this optimizer; nothing was changed.",
                        *shown,
                        "Or restore the model alone, to start with a fresh optimizer.",
                    ]
                )
            )


class _Placing:
    """Puts stored tensors where an optimizer wants to have them, as copies."""

    def __init__(self, parameter: Tensor, on_device: bool) -> None:
        self._parameter, self._on_device = parameter, on_device

    def __call__(self, key: str, value: Tensor) -> Tensor:
        if key == "step":  # a counter: beside the parameter only where the step is one kernel
            return full_tensor(value).to(self._parameter.device if self._on_device else "cpu", copy=True)
        if is_sharded(self._parameter) and value.dim() > 0:
            if value.shape != self._parameter.shape and not is_sharded(value):
                raise CheckpointError(
                    f"The optimizer has a {key!r} of shape {list(value.shape)} for a sharded parameter of another shape, "
                    "which cannot be sharded: restore the model alone."
                )
            return distribute_like(value, self._parameter).clone()
        return full_tensor(value).to(self._parameter.device, copy=True)


def _joined(stored: Iterable[str], names: _Names) -> Iterable[tuple[str, str]]:
    """Stored names that were two parameters' and are one's here."""
    seen: dict[str, str] = {}
    for name in stored:
        first = seen.setdefault(names.first_of(name), name)
        if first != name:
            yield first, name


def _as_list(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers themselves, without what Fabric or Accelerate put around them."""
    if isinstance(optimizers, Mapping):
        given = list(optimizers.values())
    else:
        given = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    return [_innermost(optimizer) for optimizer in given]


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    while any(f"{cls.__module__}.{cls.__qualname__}" in _OPTIMIZER_WRAPPERS for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"This is a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    return optimizer


def _flat_slots(slots: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    structures: dict[str, Any] = {}
    for slot, value in slots.items():
        found, structures[slot] = flatten(value, f"state.{slot}", f".{name}", subclasses=True)
        tensors.update(found)
    return tensors, structures


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _number(value) for key, value in group.items() if key not in _STRUCTURE}
    tensors, structure = flatten(kept, "group")
    if tensors:
        raise CheckpointError(
            f"The hyperparameter {next(iter(tensors))} is a tensor of more than one number, which cannot be saved."
        )
    return dict(structure)


def _number(value: Any) -> Any:
    """A tensor of one number as that number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return tuple(map(_number, value)) if type(value) is tuple else value


def _like(value: Any, live: Any) -> Any:
    """A stored hyperparameter in the type that the live optimizer has it in."""
    if isinstance(live, Tensor):
        return torch.full_like(live, value)
    if isinstance(live, tuple) and isinstance(value, tuple) and len(live) == len(value):
        return tuple(map(_like, value, live))
    return value


def _fill_state(live: Any, restored: Any) -> None:
    """Take the tensors that are there, with the values restored, into a parameter's new state."""
    if isinstance(live, dict) and isinstance(restored, dict):
        for key in live.keys() & restored.keys():
            if isinstance(live[key], Tensor) and _fill(live[key], restored[key]):
                restored[key] = live[key]


@torch.no_grad()
def _fill(live: Tensor, value: Any) -> bool:
    """Set a tensor to a value in place, if it fits: a step that was compiled or captured goes on reading the same memory."""
    fits = isinstance(value, Tensor) and (value.shape, value.dtype, type(value)) == (live.shape, live.dtype, type(live))
    if fits:
        live.copy_(value)
    return fits


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
