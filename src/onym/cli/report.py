"""What commands that report have in common: where a run's steps are, plain tables, and JSON output."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onym.checkpoint.steps import CHECKPOINTS, steps
from onym.format.reader import Checkpoint, require_path
from onym.storage import object_store
from onym.storage.paths import is_local
from onym.train.display import Display

if TYPE_CHECKING:
    from onym.convert.registry import Config

_WIDTH = 62  # of a fact beside its name, so that both fit into 80 columns


def checkpoints_folder(path: Path) -> Path | None:
    """The folder with the steps, where the path is a run or that folder itself; None where it is something else."""
    with object_store.translate_errors(path, "look for checkpoints"):
        require_path(path)
        if (path / CHECKPOINTS).is_dir():
            return path / CHECKPOINTS
        return path if steps(path) else None


def as_step(text: str) -> int | str:
    """A step as it was typed: a number, or a name."""
    return int(text) if text.isdecimal() else text


def open_noting(path: str, step: str, *, part: str | None = None, settings: Config | None = None) -> Checkpoint:
    """Open what is at a path; damaged steps that were skipped for an older one are named on standard error."""
    from onym.convert.opening import open_any

    found = open_any(path, as_step(step), part=part, settings=settings)
    for skipped, reason in found.skipped:
        print(f"Passed over '{skipped}': {reason}", file=sys.stderr)
    return found.checkpoint


def print_json(values: Mapping[str, Any]) -> None:
    """One object on standard output; numbers that JSON cannot hold become texts."""
    print(json.dumps(_plain(values), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


SETTINGS = ("n_heads", "rope_base", "context_length", "labels")
"""Options that state what a file does not, as fields of the configuration."""


def stated_settings(given: Any) -> dict[str, Any]:
    """These options of a command, as :func:`onym.convert.opening.open_any` takes them."""
    settings = {name: getattr(given, name) for name in SETTINGS}
    return settings | {"labels": None if given.labels is None else given.labels.split(",")}


def shown(text: object) -> str:
    """A text from a file that anybody may have made, without what would move the cursor or change colours."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def print_heading(text: str, style: str = "bold") -> None:
    """A line that stands out in a terminal, and is a plain one elsewhere."""
    Display().note(shown(text), style=style)


def print_table(rows: Sequence[Sequence[str]], indent: str = "  ", *, numbers: bool = False) -> None:
    """Columns as wide as they have to be; nothing is cut off. ``numbers``: all but the first are aligned to the right."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.rjust(width) if numbers and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print((indent + "  ".join(padded)).rstrip())


def print_facts(facts: Mapping[str, str | None]) -> None:
    """Names and values, except those that are None; a long value is wrapped between its words."""
    rows = []
    for name, value in facts.items():
        for number, line in enumerate(textwrap.wrap(value or "", _WIDTH, break_long_words=False, break_on_hyphens=False)):
            rows.append(("" if number else name, line))
    print_table(rows)


def found_facts(found: Mapping[str, Any] | None) -> dict[str, str | None]:
    """How a source was understood, for a report."""
    if found is None:
        return {"found": "a checkpoint of Onym's own"}
    wrappers = ", ".join(f"{segment}. in {count}" for segment, count in found["wrappers"].items())
    return {
        "found": found["kind"],
        "known by": found["why"] or None,
        "wrappers": f"{wrappers} names" if wrappers else None,
        "also there": ", ".join(some(found["further"])) or None,
        "not read": ", ".join(some([f"{place}: {kind}" for place, kind in found["foreign"].items()])) or None,
    }


def some(items: list[str], most: int = 5) -> list[str]:
    """The first of a list; names that differ in the number of their layer are one."""
    items = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", item) for item in items))
    return [*items[:most], f"and {len(items) - most} more"] if len(items) > most else items


def bytes_of(path: Path) -> int:
    """How large a file is, or the files of a folder together."""
    if not is_local(path):
        names = object_store.list_names(path) if path.is_dir() else []
        return sum(object_store.size(path / name) for name in names) if names else object_store.size(path)
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
