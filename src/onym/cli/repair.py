"""``onym repair``: a file mended in place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from onym.cli.report import counted, print_facts, print_heading, print_json
from onym.convert.repair import Mended, repair
from onym.train.display import Display


@dataclass(frozen=True)
class _Arguments:
    """Mend a file or folder in place whose names or index alone are wrong. The old one stays beside it until all is checked."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """A file with names that wrappers changed (_orig_mod. and the like), or a folder whose index does not fit its files."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``onym repair``."""
    given = tyro.cli(_Arguments, prog="onym repair", args=arguments)
    with Display(Console(stderr=True)).activity("Repair"):
        mended = repair(given.path, dry_run=given.dry_run)
    print_json(dataclasses.asdict(mended)) if given.json else _say(mended, dry_run=given.dry_run)
    return 0


def _say(mended: Mended, *, dry_run: bool) -> None:
    print_heading(f"{mended.path}{' (nothing was written: --dry-run)' if dry_run else ''}")
    wrappers = ", ".join(f"{segment}. in {count}" for segment, count in mended.wrappers.items())
    print_facts(
        {
            "found": mended.kind,
            "wrappers": f"{wrappers} names" if wrappers else None,
            "done": mended.done,
            "compared": f"{counted(mended.compared, 'tensor')}, equal bit for bit" if mended.compared else None,
        }
    )
