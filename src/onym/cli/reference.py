"""docs/options.md, made from the options themselves: ``make reference``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from onym.train.options import DEFAULT_STEPS, DataOptions, ModelOptions, OptimizationOptions, RunOptions, flag
from onym.train.run_folder import CHANGEABLE

_SECTIONS = {"data": DataOptions, "model": ModelOptions, "optimization": OptimizationOptions, "run": RunOptions}
_UNSAID = {
    "steps": str(DEFAULT_STEPS),
    "cache_dir": "the system's folder for caches",
    **dict.fromkeys((field.name for field in dataclasses.fields(ModelOptions)), "the preset's"),
    "start_from": "none",
}


def reference() -> str:
    """The page, as Markdown."""
    lines = [
        "# Options of `onym train`",
        "",
        "Made from the code by `make reference`. Each is also a key of a `--config` file, without its dashes, at the top or in",
        "the table named here. Those with a * may change when a run goes on ([resume.md](resume.md)).",
    ]
    for section, options in _SECTIONS.items():
        hints = get_type_hints(options, include_extras=True)
        docstrings = _docstrings(options)
        lines += [
            "",
            f"## [{section}]: {inspect.getdoc(options)}".rstrip("."),
            "",
            "| option | value | default | |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(options):
            star = " *" if field.name in CHANGEABLE else ""
            cells = (f"`{flag(field.name)}`{star}", _values(hints[field.name]), _default(field), docstrings[field.name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _docstrings(options: type[Any]) -> dict[str, str]:
    """What stands below each field."""
    (body,) = (
        node.body for node in ast.parse(textwrap.dedent(inspect.getsource(options))).body if isinstance(node, ast.ClassDef)
    )
    found = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _values(hint: Any) -> str:
    """What may be given: the choices, the name on the help page, or the type."""
    for extra in getattr(hint, "__metadata__", ()):
        if metavar := getattr(extra, "metavar", None):
            return f"`{metavar}`"
    parts = [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) is not Literal else [hint]
    for part in (hint, *parts, *(inner for each in parts for inner in get_args(each))):
        if get_origin(part) is Literal:
            return ", ".join(f"`{choice}`" for choice in get_args(part))
    return {bool: "switch", int: "`INT`", float: "`FLOAT`", str: "`TEXT`", Path: "`PATH`"}.get(hint, "`TEXT`")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.name in _UNSAID and (field.default is None or field.default is dataclasses.MISSING):
        return _UNSAID[field.name]
    value = field.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in (None, ()) else f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
