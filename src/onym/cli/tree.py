"""Tensor names as a tree, with equal layers that follow each other in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_DEEPEST = 40  # segments of a name; a file may have names of any depth


@dataclass
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    description: tuple[str, str] | None = None
    """Of a tensor: what it is, or which one it is tied to."""


def tree(tensors: Mapping[str, str], ties: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of a table: an indented name, and its description.

    Args:
        tensors: the description of each, by its full name.
        ties: further names -> the name of the tensor that they are tied to.

    >>> for row in tree({"x.0.w": "[2]", "x.0.b": "[1]", "x.1.w": "[2]", "x.1.b": "[1]"}, {"head.w": "x.0.w"}):
    ...     print("  ".join(row).rstrip())
    x.0 … x.1  (2x)
      w  [2]
      b  [1]
    head.w  = x.0.w
    """
    root = _Node()
    for name, what in tensors.items():
        _place(root, name).description = (what, "")
    for name, target in ties.items():
        _place(root, name).description = ("", target)
    return list(_rows(root, "", "", 0))


def _place(node: _Node, name: str) -> _Node:
    for segment in name.split(".", _DEEPEST):
        node = node.children.setdefault(segment, _Node())
    return node


def _rows(node: _Node, path: str, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    for first, last, child in _runs(node, path):
        inner = f"{path}{first}."
        label = prefix + first
        if last != first:
            label = f"{prefix}{first} … {prefix}{last}  ({int(last) - int(first) + 1}x)"
        elif child.description is None and (len(child.children) == 1 or all(map(_is_number, child.children))):
            yield from _rows(child, inner, f"{label}.", depth)
            continue
        what, tie = child.description or ("", "")
        yield "  " * depth + label, f"= {tie}" if tie else what
        yield from _rows(child, inner, "", depth + 1)


def _runs(node: _Node, path: str) -> Iterator[tuple[str, str, _Node]]:
    """Children as (first name, last name, the first one): those that are numbered on and are equal are one."""
    run: tuple[str, str, _Node] | None = None
    form: Any = None
    for name, child in node.children.items():
        its_form = _form(child, f"{path}{name}.") if _is_number(name) else None
        if run is not None and its_form is not None and its_form == form and int(name) == int(run[1]) + 1:
            run = (run[0], name, run[2])
            continue
        if run is not None:
            yield run
        run, form = (name, name, child), its_form
    if run is not None:
        yield run


def _form(node: _Node, path: str) -> Any:
    """Equal for layers that differ in nothing but their number; ``path`` is the layer's, with a dot behind."""
    what, tie = node.description or ("", "")
    inside = tie.startswith(path)
    return (what, inside, tie.removeprefix(path), [(name, _form(child, path)) for name, child in node.children.items()])


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10
