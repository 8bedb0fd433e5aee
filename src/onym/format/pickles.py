"""What a pickle would build, found out without building it.

torch's ``weights_only`` unpickler runs no code, but it builds every object that a pickle asks for: a few hundred bytes can ask
for gigabytes, or for a tuple whose hash takes for ever. So a file is read once before, and the size of each object is counted.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any, BinaryIO

from onym.errors import CheckpointError

_MOST_PARTS = 20_000_000
_EXTENSIONS = ("EXT1", "EXT2", "EXT4")  # classes that a process has registered by number: no list of names shows them
_IGNORED = ("PROTO", "STOP", "FRAME")
_KEPT, _AGAIN = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_REFUSED = ("builtins bytearray", "__builtin__ bytearray")  # of any size that it is asked for


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


class _Count:
    """A stack machine over sizes; objects that are mutable are counted by reference, as they are built."""

    def __init__(self, path: object) -> None:
        self._path = path
        self._stack: list[list[int]] = []
        self._marks: list[int] = []
        self._memo: dict[int, list[int]] = {}

    def read(self, stream: BinaryIO) -> None:
        for opcode, argument, _ in pickletools.genops(stream):
            self._step(opcode, argument)

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack, name = self._stack, opcode.name
        if name in _AGAIN:
            stack.append(self._memo[int(argument)])
        elif name in _KEPT:
            self._memo[len(self._memo) if argument is None else int(argument)] = stack[-1]
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP" and self._marks and self._marks[-1] == len(stack):
            self._marks.pop()
        elif name == "BINPERSID":
            stack.pop()
            self._push(0)
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self._grow(self._since_mark())
        elif name in ("APPEND", "BUILD"):
            self._grow(stack.pop()[0])
        elif name == "SETITEM":
            self._grow(stack.pop()[0] + stack.pop()[0])
        elif name in _EXTENSIONS:
            raise CheckpointError(f"'{self._path}' is a pickle that only its own program can read: it was not read.")
        elif name == "GLOBAL" and argument in _REFUSED:
            raise CheckpointError(
                f"'{self._path}' is not a plain state dict: it asks for a bytearray, so it was not read. Where it was made, "
                "save again with onym.save(model, path)."
            )
        elif name not in _IGNORED:
            taken, given = opcode.stack_before, opcode.stack_after
            marked = pickletools.markobject in taken
            parts = self._since_mark() if marked else 0
            parts += sum(stack.pop()[0] for _ in range(taken.index(pickletools.markobject) if marked else len(taken)))
            parts += len(argument) // 1000 if isinstance(argument, str | bytes) else 0
            for _ in given:
                self._push(parts)

    def _since_mark(self) -> int:
        start = self._marks.pop()
        total = sum(size[0] for size in self._stack[start:])
        del self._stack[start:]
        return total

    def _push(self, parts: int) -> None:
        self._stack.append([1 + parts])
        self._require(self._stack[-1])

    def _grow(self, parts: int) -> None:
        self._stack[-1][0] += parts
        self._require(self._stack[-1])

    def _require(self, size: list[int]) -> None:
        if size[0] > _MOST_PARTS:
            raise CheckpointError(f"'{self._path}' would unfold to more than {_MOST_PARTS:,} parts: it is no weight file.")
