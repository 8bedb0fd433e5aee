"""The model as its author wrote it: every wrapper peeled off, wherever in the tree it stands.

Names and values then come from PyTorch's own ``state_dict()``, ``load_state_dict()`` and ``named_parameters()``, called on that
plain model: no name is ever repaired, so none can be repaired wrongly, and hooks that look for a tensor under its name find it
there (one that is a bound method of a module still sees that module as it is). What is peeled is decided by the type of the
object that stands in the tree, never by how an attribute is spelled.

The live model is not changed, not even for a moment, so another thread may go on computing with it. Where a child is wrapped,
its parent is seen through a *twin*: an object of the same class that shares the parent's attributes, tensors and hooks, and
differs in its table of children alone.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from onym.errors import ConfigError
from onym.names.wrappers import inner_module, require_module, wrapper_of


def plain_view(model: nn.Module) -> nn.Module:
    """The model without wrappers, for reading its state and copying into it; not for running it.

    Tensors and modules are the live ones. Parameters and buffers that a wrapper has of its own (``n_averaged`` of
    ``AveragedModel``) stand beside those of the module that it wraps.

    Returns:
        ``model`` itself where nothing in it is wrapped.

    Raises:
        ConfigError: something in the model has no stable names: a TorchScript module, or a wrapper with an
            attribute of the same name as the module inside it.

    >>> model = nn.Sequential(torch.compile(nn.Linear(1, 1)))
    >>> list(model.state_dict()), list(plain_view(model).state_dict())
    (['0._orig_mod.weight', '0._orig_mod.bias'], ['0.weight', '0.bias'])
    >>> plain_view(model)[0] is model[0]._orig_mod
    True
    """
    require_module(model)
    try:
        return _Peeling().view(model)
    except RecursionError:
        raise ConfigError("The model is nested too deeply to be walked through, or contains itself.") from None


class _Peeling:
    """One walk through a model; each module is looked at once, however often it is used."""

    def __init__(self) -> None:
        self._views: dict[int, nn.Module] = {}  # by the identity of the live module, so that a shared one stays shared
        self._twins: dict[type[nn.Module], Any] = {}

    def view(self, module: nn.Module) -> nn.Module:
        """``module`` without wrappers, at and below it."""
        if id(module) not in self._views:
            self._views[id(module)] = self._peel(module)
        return self._views[id(module)]

    def _peel(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"The model is, or contains, a TorchScript module ({module.original_name}), whose state is not its own: pass "
                "the module that was scripted."
            )
        if not module._modules:
            return module
        if wrapper_of(module) is not None:
            return self._with_state_of(module, self.view(inner_module(module)))
        children = {name: None if child is None else self.view(child) for name, child in module._modules.items()}
        if all(children[name] is child for name, child in module._modules.items()):
            return module
        return self._twin(module, children, module._parameters, module._buffers)

    def _with_state_of(self, wrapper: nn.Module, inner: nn.Module) -> nn.Module:
        """``inner``, with what ``wrapper`` has of its own."""
        if type(wrapper).get_extra_state is not nn.Module.get_extra_state:
            raise ConfigError(
                f"The wrapper {type(wrapper).__name__} has extra state of its own, which has no place beside the model's: "
                "make it a buffer."
            )
        children = {name: self.view(child) for name, child in _children_of_its_own(wrapper)}
        parameters = {name: parameter for name, parameter in wrapper._parameters.items() if parameter is not None}
        buffers = {name: buffer for name, buffer in wrapper._buffers.items() if name not in wrapper._non_persistent_buffers_set}
        for name in (*parameters, *buffers, *children):
            if name in inner._parameters or name in inner._buffers or name in inner._modules:
                raise ConfigError(
                    f"The wrapper {type(wrapper).__name__} and the {type(inner).__name__} inside it both have {name!r}, so "
                    "both would be stored under one name: rename it in the wrapper."
                )
        if not (parameters or buffers or children):
            return inner
        return self._twin(
            inner, {**inner._modules, **children}, {**inner._parameters, **parameters}, {**inner._buffers, **buffers}
        )

    def _twin(
        self,
        module: nn.Module,
        children: dict[str, nn.Module | None],
        parameters: dict[str, nn.Parameter | None],
        buffers: dict[str, Tensor | None],
    ) -> nn.Module:
        cls = type(module)
        if cls not in self._twins:
            self._twins[cls] = _twin_class(cls)
        twin: nn.Module = object.__new__(self._twins[cls])
        object.__setattr__(twin, "__dict__", module.__dict__)
        tables: dict[str, Any] = {"_modules": children, "_parameters": parameters, "_buffers": buffers}
        # PyTorch binds these to the module that they were registered on.
        hooks = module.__dict__["_load_state_dict_pre_hooks"]
        tables["_load_state_dict_pre_hooks"] = OrderedDict((key, _bound_to(hook, twin)) for key, hook in hooks.items())
        for name, table in tables.items():
            object.__setattr__(twin, name, table)
        return twin


class _Twin:
    """What makes a class one of twins: its tables are its own, found before those in the shared ``__dict__``."""

    __slots__ = ("_buffers", "_load_state_dict_pre_hooks", "_modules", "_parameters")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that registers its subclasses must not register this one."""

    def __del__(self) -> None:
        """What the author's class does at the end of a module is not to be done at the end of a twin."""

    def __getattr__(self, name: str) -> Any:
        # nn.Module looks into the shared __dict__, where the wrapped child is.
        tables: Any = self
        for table in (tables._modules, tables._parameters, tables._buffers):
            if name in table:
                return table[name]
        return super().__getattr__(name)  # type: ignore[misc]


def _twin_class(cls: type[nn.Module]) -> Any:
    def make(metaclass: type, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return type.__new__(metaclass, name, bases, attributes)  # the author's metaclass does not hear of it either

    meta: Any = type(cls)
    if meta is not type:
        meta = type(meta.__name__, (meta,), {"__new__": make, "__init__": lambda *_: None})
    try:
        return meta(cls.__name__, (_Twin, cls), {})
    except TypeError as error:  # its instances have a layout of their own
        raise ConfigError(
            f"{cls.__name__} has __slots__, so what is wrapped inside it cannot be seen through: take the __slots__ out, or "
            "compile in place (module.compile())."
        ) from error


def _bound_to(hook: Any, twin: nn.Module) -> Any:
    return type(hook)(hook.hook, twin) if getattr(hook, "with_module", False) else hook


def _children_of_its_own(wrapper: nn.Module) -> list[tuple[str, nn.Module]]:
    """What else a wrapper holds; a second way to the wrapped model, as Fabric has one, is nothing of its own."""
    if len(wrapper._modules) == 1:
        return []
    wrapped = set(inner_module(wrapper).modules())
    return [
        (name, child)
        for name, child in wrapper._modules.items()
        if child is not None and _has_state(child) and wrapped.isdisjoint(child.modules())
    ]


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))
