"""Any state made of tensors, numbers, text, lists and dicts <-> named tensors and plain JSON.

What a scheduler's, a gradient scaler's or an optimizer's ``state_dict()`` holds. The JSON has the structure; where a tensor
stood it says under which name the tensor is stored. What JSON cannot say by itself is an object with one key that begins with
``$``: ``$tensor`` (a name), ``$tuple``, ``$dict`` (pairs: keys that are no strings), ``$counter``, ``$ordered``, ``$float``
(``"nan"``, ``"inf"``, ``"-inf"``), ``$bytes`` (the name of a tensor of uint8), ``$bytesio`` (that, and the position),
``$array`` (a numpy array, the name of its tensor), ``$generator`` (a device, and the state), ``$dtype``,
``$device``, ``$size`` (torch's), ``$composite`` (a tensor that is made of others: :mod:`onym.state.composite`).
"""

from __future__ import annotations

import io
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onym.errors import CheckpointError
from onym.state.composite import is_composite, is_subclass, put_together, take_apart


def flatten(
    value: Any, prefix: str, suffix: str = "", *, subclasses: bool = False, arrays: bool = True
) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of a structure.

    Args:
        value: nested dicts, lists and tuples of tensors, arrays, numbers, strings, bytes, booleans, generators and None.
        prefix: what its tensors' names begin with; the path inside the structure follows.
        suffix: what their names end with.
        subclasses: tensors of a subclass may be in it: :func:`unflatten` returns an :class:`onym.state.composite.Unbuilt` for
            one, and the caller has a live tensor that builds it.
        arrays: numpy's arrays may be in it.

    Returns:
        The tensors (live, not copied) by name, and the structure as JSON values.

    Raises:
        CheckpointError: something else is in it; says where, what and what to do.

    >>> import torch
    >>> tensors, structure = flatten({"step": 3, "pair": (1.5, torch.zeros(2))}, "scheduler")
    >>> structure
    {'step': 3, 'pair': {'$tuple': [1.5, {'$tensor': 'scheduler.pair.1'}]}}
    >>> unflatten(structure, tensors)
    {'step': 3, 'pair': (1.5, tensor([0., 0.]))}
    """
    tensors: dict[str, Tensor] = {}

    def pairs(items: Mapping[Any, Any], path: str) -> list[Any]:
        return [[encode(key, path), encode(item, f"{path}.{key}")] for key, item in items.items()]

    def encode(item: Any, path: str) -> Any:
        if is_composite(item):
            if is_subclass(item) and not subclasses:
                raise CheckpointError(
                    f"{path}{suffix} is a {type(item).__name__}, a tensor made of others, which only a live one can restore. "
                    "It is kept where it is a model's own tensor or an optimizer's state; elsewhere save the tensors in it."
                )
            about, parts = take_apart(item)
            return {"$composite": {**about, "parts": {key: encode(part, f"{path}.{key}") for key, part in parts.items()}}}
        if isinstance(item, Tensor):
            name = path + suffix
            if name in tensors:
                raise CheckpointError(f"Two tensors would be stored under the name {name!r}: rename one of the keys.")
            tensors[name] = item.detach()
            return {"$tensor": name}
        if isinstance(item, np.generic):
            item = item.item()
        kind = type(item)  # a subclass (an Enum, a namedtuple) would come back as something else
        if kind is float and not math.isfinite(item):
            return {"$float": str(item)}
        if item is None or kind in (bool, int, float, str):
            return item
        if kind is bytes:
            content = torch.frombuffer(bytearray(item), dtype=torch.uint8) if item else torch.empty(0, dtype=torch.uint8)
            return {"$bytes": encode(content, path)["$tensor"]}
        if kind is io.BytesIO:
            return {"$bytesio": [encode(item.getvalue(), path)["$bytes"], item.tell()]}
        if kind is np.ndarray and arrays and item.dtype.kind in "biufc":
            plain = np.array(item, item.dtype.newbyteorder("="), order="C")
            return {"$array": encode(torch.from_numpy(plain), path)["$tensor"]}
        if kind is torch.Size:
            return {"$size": list(item)}
        if kind in (torch.dtype, torch.device):
            return {f"${kind.__name__}": str(item)}
        if kind is torch.Generator:
            return {"$generator": [str(item.device), encode(item.get_state(), path)["$tensor"]]}
        if kind is list:
            return [encode(part, f"{path}.{index}") for index, part in enumerate(item)]
        if kind is tuple:
            return {"$tuple": [encode(part, f"{path}.{index}") for index, part in enumerate(item)]}
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in item):
            return {key: encode(part, f"{path}.{key}") for key, part in item.items()}
        if kind in _MAPPINGS:
            return {_MAPPINGS[kind]: pairs(item, path)}
        raise CheckpointError(
            f"{path}{suffix} is a {kind.__name__}, which cannot be saved: only tensors, numbers, text, bytes, booleans, None, "
            f"and lists, tuples and dicts of them can. {_remedy(item)}"
        )

    try:
        return tensors, encode(value, prefix)
    except RecursionError as error:
        raise CheckpointError(f"{prefix}{suffix} cannot be saved: it is nested too deep, or holds itself.") from error
    finally:
        # They refer to each other, and would keep the tensors until the garbage collector runs.
        encode = pairs = None  # type: ignore[assignment]


def unflatten(structure: Any, tensors: Mapping[str, Tensor], convert: Callable[[str, Tensor], Tensor] | None = None) -> Any:
    """Put the tensors back.

    Args:
        structure: as :func:`flatten` returned it, perhaps through a JSON file.
        tensors: by name; further ones are not used.
        convert: called with a tensor's last key (``"step"``) and the tensor; what it returns is put in.

    Raises:
        CheckpointError: a tensor is missing, or the structure is none of ours.
    """

    def tensor(name: str, key: str) -> Tensor:
        if name not in tensors:
            raise CheckpointError(f"The tensor {name!r} is named in the stored state but is not there.")
        return convert(key, tensors[name]) if convert else tensors[name]

    def decode(item: Any, key: str) -> Any:
        if isinstance(item, list):
            return [decode(part, key) for part in item]
        if not isinstance(item, dict):
            return item
        tag = next(iter(item)) if len(item) == 1 else ""
        if not tag.startswith("$"):
            return {name: decode(part, name) for name, part in item.items()}
        content = item[tag]
        if tag == "$tensor":
            return tensor(content, key)
        if tag == "$bytes":
            return tensor(content, key).numpy().tobytes()
        if tag == "$bytesio":
            stream = io.BytesIO(tensor(content[0], key).numpy().tobytes())
            stream.seek(content[1])
            return stream
        if tag == "$array":
            return tensor(content, key).numpy()
        if tag == "$size":
            return torch.Size(content)
        if tag == "$device":
            return torch.device(content)
        if tag == "$dtype":
            return torch_dtype(content)
        if tag == "$generator":
            generator = torch.Generator(str(content[0]))
            return generator.set_state(tensor(content[1], key).cpu())
        if tag == "$composite":
            return put_together(content, {name: decode(part, name) for name, part in content["parts"].items()})
        if tag == "$float":
            return float(content)
        if tag == "$tuple":
            return tuple(decode(part, key) for part in content)
        if tag not in _KINDS:
            raise CheckpointError(
                f"The stored state has a value of the kind {tag!r}, which this version of Onym does not know."
            )
        return _KINDS[tag]({decode(name, key): decode(part, str(name)) for name, part in content})

    try:
        return decode(structure, "")
    finally:
        decode = None  # type: ignore[assignment]  # as above: the files of the tensors would stay open


_MAPPINGS: dict[type, str] = {dict: "$dict", Counter: "$counter", OrderedDict: "$ordered"}
_KINDS: dict[str, Callable[[Mapping[Any, Any]], Any]] = {tag: kind for kind, tag in _MAPPINGS.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype with this name (``torch.float32``)."""
    found = next((each for each in vars(torch).values() if isinstance(each, torch.dtype) and str(each) == name), None)
    if found is None:
        raise CheckpointError(f"The stored state has the dtype {name!r}, which torch {torch.__version__} does not have.")
    return found


def _remedy(value: object) -> str:
    if callable(value):
        return "Build it anew in the program that restores, and leave it out of state_dict()."
    if isinstance(value, np.ndarray):
        return "Make it a tensor (torch.from_numpy), or a list."
    if isinstance(value, set | frozenset):
        return "Make it a sorted list."
    return "Leave it out of state_dict(), or make it one of these."
