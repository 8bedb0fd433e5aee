"""Which classes are wrappers, and what each wraps.

A wrapper is a module that holds the real model as a child and adds that child's name to every parameter. They are known by
qualified class name, so recognising one imports nothing; a subclass of a known wrapper is one too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from origo.errors import ConfigError


@dataclass(frozen=True)
class Wrapper:
    """How to see through a wrapper class."""

    inner: str
    """Name of the attribute that holds the wrapped module."""
    hides_prefix: bool = False
    """Its own state-dict hooks take ``inner`` out of the names already, so names from ``state_dict()`` lack it."""


_WRAPPERS: dict[str, Wrapper] = {
    "torch._dynamo.eval_frame.OptimizedModule": Wrapper("_orig_mod"),
    "torch.nn.parallel.distributed.DistributedDataParallel": Wrapper("module"),
    "torch.nn.parallel.data_parallel.DataParallel": Wrapper("module"),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": Wrapper(
        "_checkpoint_wrapped_module", hides_prefix=True
    ),
}


def register_wrapper(cls: type[nn.Module], inner: str, *, hides_prefix: bool = False) -> None:
    """Teach Origo a wrapper class.

    Args:
        cls: the wrapper; its subclasses count too.
        inner: the attribute, a registered submodule, that holds the wrapped module.
        hides_prefix: ``cls`` has state-dict hooks that take ``inner`` out of the names already.

    Raises:
        ConfigError: ``cls`` is not a module class, or ``inner`` no attribute name.

    >>> class Timed(nn.Module):
    ...     def __init__(self, model):
    ...         super().__init__()
    ...         self.timed_model = model
    >>> register_wrapper(Timed, "timed_model")
    >>> import origo
    >>> list(origo.state_dict(Timed(nn.Linear(1, 1))))
    ['weight', 'bias']
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"register_wrapper takes a class derived from torch.nn.Module, not {cls!r}.")
    if not inner.isidentifier():
        raise ConfigError(f"register_wrapper takes the name of one attribute of {cls.__name__}, not {inner!r}.")
    _WRAPPERS[_qualified_name(cls)] = Wrapper(inner, hides_prefix)


def wrapper_of(module: nn.Module) -> Wrapper | None:
    """How to see through this module, or None where it is a real one."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return None
        wrapper = _WRAPPERS.get(_qualified_name(cls))
        if wrapper is not None and wrapper.inner in module._modules:
            return wrapper
    return None


def wrapper_prefixes() -> frozenset[str]:
    """The attribute names that wrappers put into parameter names."""
    return frozenset(wrapper.inner for wrapper in _WRAPPERS.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The real module inside a wrapped root: ``model`` itself where nothing wraps it.

    Only the root is peeled; wrapped submodules stay as they are, because the model calls them.
    """
    while (wrapper := wrapper_of(model)) is not None:
        inner = model._modules[wrapper.inner]
        assert inner is not None
        model = inner
    return model


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
