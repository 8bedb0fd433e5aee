"""Model classes that can be built from a stored configuration.

A model family registers itself from outside (:mod:`onym.names.families`); this module knows none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from onym.errors import CheckpointError, ConfigError
from onym.names.families import load_families


@dataclass(frozen=True)
class Architecture:
    """A model class, the dataclass that its constructor takes, and how to build one that is loaded into."""

    model_cls: type[nn.Module]
    config_cls: type[Any]
    build: Callable[[Any], nn.Module]


_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(
    name: str,
    model_cls: type[nn.Module],
    config_cls: type[Any],
    *,
    build: Callable[[Any], nn.Module] | None = None,
) -> None:
    """Let :func:`onym.save` store the structure of your own model class, and :func:`onym.load_model` build it again.

    Args:
        name: what its files call it; the same in the program that saves and the one that loads.
        model_cls: built as ``model_cls(config)``; its instances have that config as ``model.config``.
        config_cls: a dataclass whose fields are plain JSON values. Where it has a class method ``from_dict``, that reads them.
        build: makes a model that is loaded into, from a config; ``model_cls`` by default. It may leave tensors on the meta
            device, which saves the time and memory of initialising them.

    Raises:
        ConfigError: ``model_cls`` is no module class, ``config_cls`` is no dataclass, or the name stands for another class
            already.

    >>> @dataclass(frozen=True)
    ... class Sizes:
    ...     width: int = 2
    >>> class Line(nn.Module):
    ...     def __init__(self, config):
    ...         super().__init__()
    ...         self.config = config
    ...         self.line = nn.Linear(config.width, 1)
    >>> register_architecture("line", Line, Sizes)
    >>> import onym
    >>> onym.save(Line(Sizes(width=3)), "line.safetensors")
    >>> onym.load_model("line.safetensors").config
    Sizes(width=3)
    """
    if not (isinstance(model_cls, type) and issubclass(model_cls, nn.Module)):
        raise ConfigError(f"register_architecture takes a class derived from torch.nn.Module as model_cls, not {model_cls!r}.")
    if not (isinstance(config_cls, type) and dataclasses.is_dataclass(config_cls)):
        raise ConfigError(f"register_architecture takes a dataclass as config_cls, not {config_cls!r}.")
    taken = _ARCHITECTURES.get(name)
    # A reloaded notebook cell defines its classes again: the same name in the same module is the same class to its author.
    if taken is not None and _qualified_name(taken.model_cls) != _qualified_name(model_cls):
        raise ConfigError(f"The architecture {name!r} is {taken.model_cls.__name__} already: take another name.")
    _ARCHITECTURES[name] = Architecture(model_cls, config_cls, build or model_cls)


def describe_model(model: nn.Module) -> tuple[str | None, dict[str, Any] | None]:
    """The architecture's name and the configuration of a model, both None where its class is not registered."""
    load_families()
    config = getattr(model, "config", None)
    for name, architecture in _ARCHITECTURES.items():
        if _author_class(model) is architecture.model_cls and isinstance(config, architecture.config_cls):
            return name, _as_json(config)
    return None, None


def build_model(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """A new model from its stored description, to be loaded into: it may be on the meta device.

    Raises:
        CheckpointError: the architecture is not registered in this program.
        ConfigError: the configuration does not fit it.
    """
    load_families()
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"The model is of the architecture {architecture!r}, which this program does not know: call "
            f"onym.register_architecture({architecture!r}, ModelClass, ConfigClass) before loading it."
        )
    known = _ARCHITECTURES[architecture]
    read = getattr(known.config_cls, "from_dict", None)
    try:
        return known.build(read(config) if read is not None else known.config_cls(**config))
    except TypeError as error:
        raise ConfigError(f"The stored configuration does not fit {known.config_cls.__name__}: {error}.") from error


def _as_json(config: Any) -> dict[str, Any]:
    """The fields of a configuration, each of which has to come back from JSON as it was."""
    says_itself = hasattr(config, "to_dict") and hasattr(config, "from_dict")
    fields: dict[str, Any] = config.to_dict() if says_itself else dataclasses.asdict(config)
    for name, value in fields.items():
        try:
            same = _lists(json.loads(json.dumps(value))) == _lists(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ConfigError(
                f"{type(config).__name__}.{name} is {value!r}, which JSON cannot hold: make it a number, text, a list, or a "
                "dict with keys of text."
            )
    return fields


def _lists(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, list | tuple):
        return [_lists(part) for part in value]
    return {key: _lists(part) for key, part in value.items()} if isinstance(value, dict) else value


def _author_class(model: nn.Module) -> type[nn.Module]:
    """The class that the author wrote: ``fully_shard`` gives a module one of its own, derived from FSDPModule and that."""
    cls = type(model)
    if len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule":
        return cls.__bases__[1]
    return cls


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
