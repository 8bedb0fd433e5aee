"""A model put back as it was, where loading into it fails half-way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onym.errors import CheckpointError
from onym.state.composite import is_subclass, resize_sparse
from onym.state.dtensor import local


@contextmanager
def own_code_or_nothing(plain: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Undo what a model's own loading code has done where it fails half-way, and say so.

    Raises:
        CheckpointError: it failed.
    """
    try:
        with undone_on_failure(plain, given):
            yield
    except Exception as error:  # the user's code may raise anything
        advice = ""
        if (made := next(filter(is_subclass, chain(plain.parameters(), plain.buffers())), None)) is not None:
            advice = f" It has tensors of the class {type(made).__name__}: load first and convert (quantise) the model then."
        raise CheckpointError(f"The model's own loading code failed, and nothing was changed: {error}{advice}") from error


@contextmanager
def undone_on_failure(plain: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Put a model back as it was where the block fails; where it has no loading code, nothing is left that could fail."""
    tensors = list(chain(plain.parameters(), plain.buffers()))
    ordinary = all(
        not is_lazy(tensor) and (has_memory(local(tensor)) or tensor.numel() == 0)
        for tensor in (*tensors, *given.values())
        if isinstance(tensor, Tensor)
    )
    if ordinary and not any(map(has_loading_code, plain.modules())):
        yield
        return
    lazy: list[tuple[Any, type, Tensor]] = [(tensor, type(tensor), tensor.data) for tensor in tensors if is_lazy(tensor)]
    before = [(tensor, tensor.detach().clone()) for tensor in tensors if not is_lazy(tensor)]
    tables: list[tuple[Any, Any]] = [
        (table, dict(table)) for module in plain.modules() for table in (module._parameters, module._buffers)
    ]
    extra = [(module, _copied(module.get_extra_state())) for module in plain.modules() if _has_extra_state(module)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for table, entries in tables:
                table.clear()
                table.update(entries)
            for tensor, kind, data in lazy:
                tensor.data, tensor.__class__ = data, kind
            for tensor, value in before:
                if tensor.is_nested or tensor.shape == value.shape:
                    resize_sparse(tensor, value)
                    tensor.copy_(value)
                else:  # its own code has resized it
                    tensor.data = value
            for module, state in extra:
                module.set_extra_state(state)
        raise


def _copied(state: Any) -> Any:
    try:
        return copy.deepcopy(state)
    except Exception:  # a lock, a file: it is held as it is
        return state


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).set_extra_state is not nn.Module.set_extra_state


def has_loading_code(module: nn.Module) -> bool:
    cls = type(module)
    return bool(
        any(not _cannot_fail(hook) for hook in module._load_state_dict_pre_hooks.values())
        or module._load_state_dict_post_hooks
        or _has_extra_state(module)
        or cls._load_from_state_dict is not nn.Module._load_from_state_dict
        or cls.load_state_dict is not nn.Module.load_state_dict
        or cls.state_dict is not nn.Module.state_dict
    )


def _cannot_fail(hook: Any) -> bool:
    """Whether a hook says of itself that it changes nothing but the dict it is given, so that nothing has to be undone."""
    return bool(getattr(getattr(hook, "hook", hook), "changes_the_dict_alone", False))


def has_memory(tensor: Tensor) -> bool:
    """Whether its values are one block of memory: not those of a sparse tensor, or of one that is made of others."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested or tensor.numel() == 0:
        return False
    return tensor.data_ptr() != 0
