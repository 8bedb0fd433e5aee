"""Pages that are generated from the code, so that they are true of it: options.md and modules.md. ``make reference``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onym
from onym.train.finetune_options import FinetuneOptions
from onym.train.options import DEFAULT_STEPS, DataOptions, ModelOptions, OptimizationOptions, RunOptions, flag
from onym.train.run_folder import CHANGEABLE

_SECTIONS = {
    "data": DataOptions,
    "model": ModelOptions,
    "finetune": FinetuneOptions,
    "optimization": OptimizationOptions,
    "run": RunOptions,
}
_UNSAID = {
    "steps": str(DEFAULT_STEPS),
    "cache_dir": "the system's folder for caches",
    **dict.fromkeys((field.name for field in dataclasses.fields(ModelOptions)), "the preset's"),
    "start_from": "none",
}


def options() -> str:
    """The page, as Markdown."""
    lines = [
        "# Options of `onym train`",
        "",
        "Made from the code by `make reference`. Each is also a key of a `--config` file, without its dashes, at the top or in",
        "the table named here. Those with a * may change when a run goes on ([resume.md](resume.md)).",
    ]
    for section, subject in _SECTIONS.items():
        hints = get_type_hints(subject, include_extras=True)
        docstrings = _docstrings(subject)
        lines += [
            "",
            f"## [{section}]: {inspect.getdoc(subject)}".rstrip("."),
            "",
            "| option | value | default | |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(subject):
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


_ROOMS = {
    "names": "One parameter, one name: what a tensor is called, whatever wraps the model, and why a file does not match.",
    "state": "Live objects <-> named tensors and plain JSON values.",
    "storage": "Where bytes become durable: the only room that changes a disk or an object store.",
    "format": "What the bytes mean: files are hashed while they are written, and checked before they are used.",
    "checkpoint": "A training loop's checkpoints: capture, write, commit, verify, prune; and restore.",
    "convert": "Other programs' checkpoints: recognised, understood, written. It knows formats only by their registration.",
    "adapters": "LoRA: matrices beside a frozen model's layers, their files, and the model that both make.",
    "integrations": "The same promises under other people's trainers, each an extra.",
    "gpt": "The GPT, and its registration with the library.",
    "gpt/formats": "Other programs' layouts of GPT-2, one adapter a file.",
    "data": "Text -> tokens -> batches in an exact order.",
    "generation": "Text out, and how likely a text is.",
    "compile": "torch.compile: in place, where it pays, with a cache of its own.",
    "train": "The trainer: the loop, and a file for each thing that it needs.",
    "serve": "`onym serve`: trained models behind the interface that everybody's clients speak, and the pages.",
    "tools": "What helps before and after a run.",
    "tools/doctor": "This machine, examined.",
    "tools/ladder": "The book's ladder of techniques, measured here.",
    "cli": "The command: arguments are parsed before torch is imported; one thin file a command.",
}


def modules() -> str:
    """The page of all modules, as Markdown."""
    lines = [
        "# Modules",
        "",
        "Generated by `make reference`: the first paragraph of each module. The rooms are in the order of imports,",
    ]
    lines += ["from the library's ground to the command; [architecture.md](architecture.md) says why they stand so."]
    source = Path(onym.__file__).parent
    for room, idea in _ROOMS.items():
        lines += ["", f"## {room}/", "", idea, "", "| module | |", "|---|---|"]
        for path in sorted((source / room).glob("*.py")):
            if path.name != "__init__.py":
                first = " ".join(
                    (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split()
                )
                text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", first).replace("``", "`").replace("|", "\\|")
                lines.append(f"| `{path.name}` | {text} |")
    return "\n".join(lines) + "\n"


PAGES = {"options.md": options, "modules.md": modules}

if __name__ == "__main__":
    for name, page in PAGES.items():
        Path(__file__).with_name(name).write_text(page(), encoding="utf-8")
