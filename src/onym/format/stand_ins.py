"""Pickles with objects of classes that torch does not allow, read without looking up any class.

People save an ``argparse.Namespace``, a config of OmegaConf, a numpy scalar or the whole module beside their tensors. Each such
object becomes a :class:`StandIn`, which stores what the pickle gives it and does nothing; tensors are built here, by code that
checks every number. Nothing that a pickle names is imported or called. Files that name functions that run programs are refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from onym.errors import CheckpointError
from onym.format.pickles import require_bounded
from onym.storage.local import MappedFile

_MOST_CLASSES = 10_000
_MOST_CHARACTERS = 100_000_000  # of the names of a module's tensors
_MOST_EXPANDED = 1 << 24
_DEEPEST = 6
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# Nothing that is kept beside a model has these. They would not be run; the file is refused because somebody meant them to be.
_HARMFUL = re.compile(
    r"(os|posix|nt|sys|subprocess|commands|shutil|socket|pty|runpy|importlib|imp|ctypes|webbrowser|codeop|code|pip|_?pickle|marshal)\."
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint|globals|vars|exit|quit)(\.|$)"
    r"|(_?io|codecs|tempfile)\.open(_code)?$|torch\.(load|serialization\.load|hub|jit|ops|utils\.cpp_extension)(\.|$)"
)


class StandIn(dict[Any, Any]):
    """An object whose class was not looked up. Its items are those that the pickle put into it."""

    __slots__ = ("arguments", "elements", "state")
    arguments: tuple[Any, ...]
    elements: list[Any]
    state: Any
    kind = ""
    """The class's full name, as ``argparse.Namespace``."""

    def __new__(cls, *arguments: Any, **named: Any) -> StandIn:
        made = super().__new__(cls)
        made.arguments, made.elements, made.state = arguments, [], None
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Nothing: ``dict`` would take the arguments as its items."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def is_dict(self) -> bool:
        """Whether it can have been a dict of a class of its own."""
        return not self.elements and not self.arguments

    def append(self, element: Any) -> None:
        """As of a list, a deque or a set."""
        self.elements.append(element)

    add = append

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class _Storage:
    """Some bytes of a file, and the dtype that the file says they have."""

    __slots__ = ("data", "dtype", "nbytes", "start")

    def __init__(self, data: Any, start: int, nbytes: int, dtype: torch.dtype) -> None:
        self.data, self.start, self.nbytes, self.dtype = data, start, nbytes, dtype

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("A storage has no state.")

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in these bytes; ``offset`` and ``stride`` in elements."""
        if not all(type(count) is int and count >= 0 for count in (offset, *size, *stride)) or len(size) != len(stride):
            raise pickle.UnpicklingError("A tensor's shape is none.")
        elements = self.nbytes // dtype.itemsize
        needed = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
        if needed > elements or math.prod(size) > max(elements, _MOST_EXPANDED):  # a buffer can be an expanded one
            raise pickle.UnpicklingError("A tensor is larger than its bytes.")
        if elements == 0 or needed == 0:
            return torch.empty(size, dtype=dtype)
        flat = torch.frombuffer(self.data, dtype=torch.uint8, count=elements * dtype.itemsize, offset=self.start)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).as_strided(size, stride, offset)


class _Unpickler(pickle.Unpickler):
    """What it gives a pickle is its own: BUILD can change what it is given, so nothing of Python's or torch's is."""

    def __init__(self, file: BinaryIO, storage: Callable[[str, int, torch.dtype], _Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._storages: dict[tuple[str, str], _Storage] = {}
        self._classes: dict[tuple[str, str], Any] = _own_functions()
        self._dtypes: dict[type, torch.dtype] = {}
        self.harmful: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self._classes:
            return self._classes[key]
        if module == "torch" and isinstance(value := vars(torch).get(name), torch.dtype):  # getattr imports some modules
            return value
        if len(self._classes) > _MOST_CLASSES:
            raise pickle.UnpicklingError("It names too many classes.")
        if is_harmful(module, name):
            self.harmful.add(f"{module}.{name}"[:80])
        found = type("StandIn", (StandIn,), {"__slots__": (), "kind": f"{module}.{name}"})
        self._classes[key] = found
        if module in ("torch", "torch.cuda", "torch.storage") and name in _DTYPES:
            self._dtypes[found] = _DTYPES[name]
        return found

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":  # with its source, in files from before torch 1.6
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("It refers to something outside itself.")
        _, kind, key, _, count, *view = pid
        dtype = self._dtypes.get(kind)
        if dtype is None or any(view) or not isinstance(key, str) or type(count) is not int or count < 0:
            return StandIn()  # quantised values, or a storage inside another one
        if (key, str(dtype)) not in self._storages:
            self._storages[key, str(dtype)] = self._storage(key, count * dtype.itemsize, dtype)
        return self._storages[key, str(dtype)]


def _own_functions() -> dict[tuple[str, str], Any]:
    """What a pickle may call, made anew for each: to build tensors and built-in containers."""

    def v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            return _no_plain_tensor()
        return storage.tensor(offset, contained(size), contained(stride), dtype)

    def v2(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        return v3(storage, offset, size, stride, False, None, getattr(storage, "dtype", None))

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
        return function(*contained(arguments)) if function in (v2, v3, parameter) else _no_plain_tensor()

    def new(kind: Any, *arguments: Any) -> Any:
        return kind(*arguments)

    def contained(value: Any = ()) -> tuple[Any, ...]:
        if type(value) not in (list, tuple):  # of a tensor, each row would become one
            raise pickle.UnpicklingError("A sequence is none.")
        return tuple(value)

    def ordered(items: Any = ()) -> Any:
        return OrderedDict(contained(each) for each in contained(items))

    own: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor"): v2,
        ("torch._utils", "_rebuild_tensor_v2"): v2,
        ("torch._utils", "_rebuild_tensor_v3"): v3,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): of_type,
        ("torch.tensor", "_rebuild_from_type_v2"): of_type,
        ("copyreg", "_reconstructor"): new,
        ("copy_reg", "_reconstructor"): new,
        ("collections", "defaultdict"): lambda *_: {},
    }
    own |= {("torch", "Size"): contained, ("collections", "OrderedDict"): ordered}
    own |= {(module, "set"): lambda items=(): set(contained(items)) for module in ("builtins", "__builtin__")}
    return own


def _no_plain_tensor() -> StandIn:
    kind: Any = type("StandIn", (StandIn,), {"__slots__": (), "kind": "torch.Tensor of another layout"})
    made: StandIn = kind()
    return made


def is_harmful(module: str, name: str) -> bool:
    """Whether something that a pickle names runs programs, opens files or talks to others.

    >>> is_harmful("posix", "system"), is_harmful("builtins", "eval"), is_harmful("argparse", "Namespace")
    (True, True, False)
    """
    return _HARMFUL.match(f"{module}.{name}") is not None


def read_zip(path: Path) -> Any:
    """The content of a zip of ``torch.save``, which is known to be a plain one. Tensors are mapped.

    Raises:
        CheckpointError: it names what runs programs.
        Exception: it is damaged; of nearly any kind.
    """
    archive = zipfile.ZipFile(path)
    (root,) = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError(f"'{path}' was written on a big-endian machine: save it again on one like this.")
    file = MappedFile(path)
    content = file.map()

    def storage(key: str, nbytes: int, dtype: torch.dtype) -> _Storage:
        part = archive.getinfo(f"{root}data/{key}")
        lengths = file.read(part.header_offset + 26, part.header_offset + 30)
        start = part.header_offset + 30 + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
        if nbytes > part.file_size or start + nbytes > file.nbytes:
            raise pickle.UnpicklingError(f"The bytes of {key} are missing.")
        return _Storage(content, start, nbytes, dtype)

    return _loaded(path, _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage))


def read_stream(path: Path) -> Any:
    """As :func:`read_zip`, of a file from before torch 1.6: pickles, and the bytes of the tensors after them."""
    left = path.stat().st_size
    storages: dict[str, _Storage] = {}

    def storage(key: str, nbytes: int, dtype: torch.dtype) -> _Storage:
        nonlocal left
        left -= nbytes
        if left < 0 or key in storages:
            raise pickle.UnpicklingError("The bytes of its tensors are missing.")
        storages[key] = _Storage(bytearray(nbytes), 0, nbytes, dtype)
        return storages[key]

    with path.open("rb") as file:
        for _ in range(3):  # a magic number, a version, the system
            _loaded(path, _Unpickler(file, storage))
        content = _loaded(path, _Unpickler(file, storage))
        position = file.tell()
        require_bounded(file, path)
        file.seek(position)
        for key in _loaded(path, _Unpickler(file, storage)):
            count = int.from_bytes(file.read(8), "little")
            held = storages[key]
            if count * held.dtype.itemsize != held.nbytes or file.readinto(held.data) != held.nbytes:
                raise pickle.UnpicklingError(f"The bytes of {key} are missing.")
    return content


def _loaded(path: Path, unpickler: _Unpickler) -> Any:
    try:
        return unpickler.load()
    finally:
        if unpickler.harmful:
            raise CheckpointError(
                f"'{path}' is not a plain state dict: reading it would run code that is stored in it (it asks for "
                f"{', '.join(sorted(unpickler.harmful)[:6])}), so it was not read. Where it was made, save again with "
                "onym.save(model, path)."
            )


def with_states(content: Any) -> Any:
    """The content with whole modules, to some depth, as what their ``state_dict()`` was."""
    done: dict[int, Any] = {}

    def converted(value: Any, depth: int) -> Any:
        if id(value) in done:  # also where a dict holds itself
            return done[id(value)]
        done[id(value)] = value
        if isinstance(value, StandIn):
            done[id(value)] = _state_of(value)
        elif type(value) in (dict, OrderedDict) and depth < _DEEPEST:
            inner = [(key, converted(each, depth + 1)) for key, each in value.items()]
            if any(new is not old for (_, new), old in zip(inner, value.values(), strict=True)):
                done[id(value)] = type(value)(inner)
        return done[id(value)]

    return converted(content, 0)


def _state_of(value: StandIn) -> Any:
    """The state of a module; other objects are left. A compiled module is pickled as a call, with the one that it wraps."""
    modules = [each for each in (value, *value.arguments[:1]) if isinstance(each, StandIn)]
    states = [OrderedDict(_module_state(each, "", [_MOST_CHARACTERS], ())) for each in modules]
    return next((state for state in states if state), value)


def _module_state(module: StandIn, prefix: str, left: list[int], above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module.state, dict) else {}
    if id(module) in above or len(above) > 100:
        return
    transient = state.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for name, value in _items(state.get(part), prefix, left):
            if isinstance(value, Tensor) and name not in transient:
                yield f"{prefix}{name}", value
    for name, child in _items(state.get("_modules"), prefix, left):
        if isinstance(child, StandIn):
            yield from _module_state(child, f"{prefix}{name}.", left, (*above, id(module)))


def _items(value: Any, prefix: str, left: list[int]) -> Iterator[tuple[str, Any]]:
    for name, each in value.items() if isinstance(value, dict) else ():
        if isinstance(name, str):
            left[0] -= 1 + len(prefix) + len(name)
            if left[0] < 0:
                raise pickle.UnpicklingError("A module has more tensors than any.")
            yield name, each


def foreign(content: Any) -> dict[str, str]:
    """The objects in a content that are no plain values: their places and classes.

    Returns:
        At most a hundred, as ``{"args": "argparse.Namespace"}``.
    """
    found: dict[str, str] = {}
    visited: set[int] = set()
    waiting: list[tuple[Any, Any]] = [(None, content)]  # with the key, and the place that the key is at
    while waiting and len(found) < 100:
        place, value = waiting.pop()
        if isinstance(value, StandIn):
            found[_said(place)] = value.kind
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in visited:
            visited.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [((key, place), each) for key, each in inner]
    return dict(sorted(found.items()))


def _said(place: Any) -> str:
    """The last keys of a place, each of them short."""
    keys: list[str] = []
    while place is not None and len(keys) < 20:
        key, place = place
        keys.append(key_said(key))
    return ".".join(reversed(keys))


def key_said(key: Any) -> str:
    """A key of a dict in a file, for a sentence."""
    if type(key) is int and key.bit_length() <= 64:
        return str(key)
    return key[:200] if isinstance(key, str) else kind_of(key)


def kind_of(value: Any) -> str:
    """The name of a value's class, for a sentence."""
    return str(getattr(value, "kind", None) or type(value).__name__)
