"""What a pickle would build, found out without building it.

torch's ``weights_only`` unpickler runs no code, but it builds every object that a pickle asks for: a few hundred bytes can ask
for gigabytes, or for a tuple whose hash takes for ever or more stack than there is. So a file is read once before: the size of
each object is counted, and what the functions that torch allows are given is compared with what ``torch.save`` gives them.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from onym.errors import CheckpointError

_MOST_PARTS = 20_000_000
_MOST_WORK = 10 * _MOST_PARTS  # the sizes of all objects, each counted in every one that it is in
_DEEPEST = 1000  # tuples in each other: the hash of one takes stack for each
_WIDE_INT = 1000  # parts of an integer of more than 64 bits: many of these can have one hash
_EXTENSIONS = ("EXT1", "EXT2", "EXT4")  # classes that a process has registered by number: no list of names shows them
_IGNORED = ("PROTO", "STOP", "FRAME")
_KEPT, _AGAIN = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")


def require_bounded(file: BinaryIO | bytes, path: object, pickles: int = 1) -> None:
    """Read pickles through and count what they would build.

    Args:
        file: where they follow each other, from its present position.
        path: for messages.
        pickles: how many.

    Raises:
        CheckpointError: it would be out of all proportion to the file.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    for _ in range(pickles):
        _Count(path).read(stream)


def named_in(file: BinaryIO, pickles: int) -> list[str]:
    """Everything that pickles that follow each other ask for by name, sorted; as far as they can be read."""
    found: set[str] = set()
    try:
        for _ in range(pickles):
            words: list[str] = []
            memo: dict[int, str] = {}
            kept, last = 0, ""
            for opcode, argument, _place in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    found.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.add(".".join(words[-2:]))
                elif opcode.name in _KEPT:
                    memo[kept if argument is None else int(argument)] = last
                    kept += 1
                    continue
                if opcode.name in _AGAIN and argument is not None:
                    argument = memo.get(int(argument), "")
                last = argument if isinstance(argument, str) else ""
                if last:
                    words.append(last)
    except Exception:  # it need not even be a complete pickle
        pass
    return sorted(found)


@dataclass(slots=True)
class _Item:
    """What is known of an object."""

    parts: int
    depth: int = 0
    what: str | list[_Item] = ""
    """The items of a tuple; ``{}``, ``[]``; a short text or a name (``torch Size``); ``()`` and a name: what that returned."""


def _is_as_written(function: str, arguments: str | list[_Item]) -> bool:
    """Whether ``torch.save`` calls a function so. Many iterate over what they get; of a tensor, each row would be another."""
    if not isinstance(arguments, list) or _ALLOCATES.fullmatch(function):
        return False
    kinds = [each.what for each in arguments]
    if function in ("torch._tensor _rebuild_from_type_v2", "torch.tensor _rebuild_from_type_v2"):
        return len(kinds) == 4 and isinstance(kinds[0], str) and _is_as_written(kinds[0], kinds[2])
    if function == "torch._utils _rebuild_sparse_tensor":
        return len(kinds) == 2 and isinstance(kinds[1], list)
    if function in _BYTEARRAY:  # otherwise of any size that it is asked for
        return kinds in ([], ["bytes"], ["()_codecs encode"]) or (len(kinds) == 2 and kinds[1] == "latin-1")
    if function == "_codecs encode":  # other encodings make more of a text, or take for ever
        return len(kinds) == 2 and kinds[1] == "latin1"
    if function == "torch Size":
        return len(kinds) == 1 and (isinstance(kinds[0], list) or kinds[0] == "[]")
    if function in ("builtins set", "__builtin__ set"):
        return len(kinds) == 1 and kinds[0] in ("[]", "[()]")
    return function not in _FILLED or not kinds or kinds == [_FILLED[function]]


_BYTEARRAY = ("builtins bytearray", "__builtin__ bytearray")
_ALLOCATES = re.compile(r"torch(\.cuda|\.storage)? \w*(Tensor|Storage)")
_FILLED = {
    "collections OrderedDict": "[]",
    "collections Counter": "{}",
}


class _Count:
    """A stack machine over sizes; objects that are mutable are counted by reference, as they are built."""

    def __init__(self, path: object) -> None:
        self._path = path
        self._stack: list[_Item] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Item] = {}
        self._work = 0

    def read(self, stream: BinaryIO) -> None:
        for opcode, argument, _ in pickletools.genops(stream):
            self._step(opcode, argument)

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack, name = self._stack, opcode.name
        if name in _AGAIN:
            stack.append(self._memo[int(argument)])
        elif name in _KEPT:
            place = len(self._memo) if argument is None else int(argument)
            if place > 2 * len(self._memo) + 1000:  # Python's unpickler has an array of that length
                self._refuse("keeps an object at a place far from all others")
            self._memo[place] = stack[-1]
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP" and self._marks and self._marks[-1] == len(stack):
            self._marks.pop()
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self._grow(self._since_mark())
        elif name in ("APPEND", "BUILD"):
            added = stack.pop()
            if name == "BUILD" and not _is_state(stack[-1].what, added.what):
                self._refuse("sets what torch.save does not")
            self._grow([added])
        elif name == "SETITEM":
            self._grow([stack.pop(), stack.pop()])
        elif name in _EXTENSIONS:
            raise CheckpointError(f"'{self._path}' is a pickle that only its own program can read: it was not read.")
        elif name not in _IGNORED:
            taken, given = opcode.stack_before, opcode.stack_after
            marked = pickletools.markobject in taken
            items = self._since_mark() if marked else []
            count = taken.index(pickletools.markobject) if marked else len(taken)
            items = stack[len(stack) - count :] + items
            del stack[len(stack) - count :]
            if given:
                self._push(_made(name, argument, items, self._refuse))

    def _since_mark(self) -> list[_Item]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _push(self, item: _Item) -> None:
        self._stack.append(item)
        self._require(item, item.parts)

    def _grow(self, added: list[_Item]) -> None:
        if any(each.what in _BYTEARRAY for each in added):
            self._refuse("holds the class bytearray")
        item, parts = self._stack[-1], sum(each.parts for each in added)
        item.parts += parts
        if item.what == "[]" and any(_is_call(each) for each in added):
            item.what = "[()]"
        self._require(item, parts)

    def _require(self, item: _Item, work: int) -> None:
        self._work += work
        if item.parts > _MOST_PARTS or self._work > _MOST_WORK or item.depth > _DEEPEST:
            raise CheckpointError(f"'{self._path}' would unfold to more than {_MOST_PARTS:,} parts: it is no weight file.")

    def _refuse(self, why: str) -> NoReturn:
        raise CheckpointError(
            f"'{self._path}' is not a plain state dict: it {why}, so it was not read. Where it was made, save again with "
            "onym.save(model, path)."
        )


def _made(name: str, argument: Any, items: list[_Item], refuse: Callable[[str], NoReturn]) -> _Item:
    """What an opcode makes of the items that it takes."""
    parts = 1 + sum(each.parts for each in items)
    what: str | list[_Item] = _EMPTY.get(name, "")
    depth = 0
    if isinstance(argument, str | bytes):
        parts += len(argument) // 1000
        if len(argument) < 100 or isinstance(argument, bytes):
            what = argument if isinstance(argument, str) else "bytes"
    elif isinstance(argument, int) and argument.bit_length() > 64:
        parts += _WIDE_INT
    if name == "STACK_GLOBAL":
        what = " ".join(each.what for each in items if isinstance(each.what, str))
    elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        function = items[0].what
        if isinstance(function, str):
            if not _is_as_written(function, items[1].what):
                refuse(f"calls {function.replace(' ', '.')} as torch.save does not")
            what = f"(){function}"
    elif name.startswith("TUPLE"):
        what = items
    if name.startswith("TUPLE") or name in ("REDUCE", "FROZENSET"):
        depth = 1 + max((each.depth for each in items), default=0)
    return _Item(parts, depth, what)


_EMPTY: dict[str, Any] = {
    "EMPTY_TUPLE": [],
    "EMPTY_LIST": "[]",
    "LIST": "[]",
    "EMPTY_DICT": "{}",
    "DICT": "{}",
    "BINPERSID": "()",
    "PERSID": "()",
}


def _is_call(item: _Item) -> bool:
    return isinstance(item.what, str) and item.what.startswith("()")


def _is_state(of: str | list[_Item], state: str | list[_Item]) -> bool:
    """Whether ``torch.save`` gives such a state to what a function returned."""
    function = of.removeprefix("()") if isinstance(of, str) else ""
    if function in _FILLED:
        return state == "{}"
    return not (function.startswith("torch._") and isinstance(state, str) and state not in ("", "{}", "[]"))
