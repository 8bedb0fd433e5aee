"""Which classes are wrappers, and what each wraps.

A wrapper is a module that holds the real model as a child and adds that child's name to every parameter. They are known by
qualified class name, so recognising one imports nothing; a subclass of a known wrapper is one too. FSDP2 (``fully_shard``) and
``module.compile()`` are not here: they change a module in place and add no name.
"""

from __future__ import annotations

from torch import nn

from onym.errors import ConfigError

# Qualified class name -> the attribute that holds the wrapped module.
_WRAPPERS: dict[str, str] = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    # CheckpointWrapper and OffloadWrapper
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    # A second model (EMA, SWA) rather than a wrapper: it has the names of the first, and a counter of its own.
    "torch.optim.swa_utils.AveragedModel": "module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    # A linear layer with LoRA's two matrices, which stand beside its own weight and bias.
    "onym.adapters.layer.LoRALinear": "base_layer",
}

# Attributes through which a wrapper reaches the same model a second time, and which named_parameters() may go by.
_SECOND_WAYS = {"_forward_module"}  # Fabric

AVERAGE_COUNTER = "n_averaged"
"""The one tensor that ``AveragedModel`` has besides the model's."""


def register_wrapper(cls: type[nn.Module], inner: str) -> None:
    """Teach Onym a wrapper class.

    Args:
        cls: the wrapper; its subclasses count too.
        inner: the attribute, a registered submodule, that holds the wrapped module. What else the wrapper has of parameters
            and buffers is stored beside the model's.

    Raises:
        ConfigError: ``cls`` is not a module class, or ``inner`` no attribute name.

    >>> class Timed(nn.Module):
    ...     def __init__(self, model):
    ...         super().__init__()
    ...         self.timed_model = model
    >>> register_wrapper(Timed, "timed_model")
    >>> import onym
    >>> list(onym.state_dict(Timed(nn.Linear(1, 1))))
    ['weight', 'bias']
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"register_wrapper takes a class derived from torch.nn.Module, not {cls!r}.")
    if not (isinstance(inner, str) and inner.isidentifier()):
        raise ConfigError(f"register_wrapper takes the name of one attribute of {cls.__name__}, not {inner!r}.")
    _WRAPPERS[_qualified_name(cls)] = inner


def wrapper_of(module: nn.Module) -> str | None:
    """The attribute that holds what this module wraps, or None where it is a real one."""
    if not module._modules:
        return None
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return None
        inner = _WRAPPERS.get(_qualified_name(cls))
        if inner is not None and module._modules.get(inner) is not None:
            return inner
    return None


def inner_module(wrapper: nn.Module) -> nn.Module:
    """What one wrapper holds; itself perhaps a wrapper."""
    attribute = wrapper_of(wrapper)
    assert attribute is not None
    inner = wrapper._modules[attribute]
    assert inner is not None
    return inner


def wrapper_prefixes() -> frozenset[str]:
    """The attribute names that wrappers put into parameter names."""
    return frozenset(_WRAPPERS.values()) | _SECOND_WAYS


def unwrap(model: nn.Module) -> nn.Module:
    """The real module inside a wrapped root: ``model`` itself where nothing wraps it.

    Only the root is peeled; wrapped submodules stay as they are, because the model calls them.

    Raises:
        ConfigError: ``model`` is no module.

    >>> model = nn.Linear(1, 1)
    >>> unwrap(nn.DataParallel(model)) is model
    True
    """
    require_module(model)
    while wrapper_of(model) is not None:
        model = inner_module(model)
    return model


def require_module(model: object) -> None:
    """Refuse what has no state.

    Raises:
        ConfigError: saying what to pass instead.
    """
    if isinstance(model, nn.Module):
        return
    if callable(model):
        raise ConfigError(
            f"This is a {type(model).__name__}, not a module. torch.compile applied twice, or to a function, gives a "
            "function that has no state: pass the module that was compiled."
        )
    raise ConfigError(f"This is a {type(model).__name__}, not a torch.nn.Module: pass the model itself.")


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
