"""``onym cache``: compiled code that is kept for the next start."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from onym.cli.report import age, counted, print_facts, print_heading, print_json, print_table
from onym.compile import cache
from onym.compile.archive import export_cache, import_cache
from onym.compile.cache_key import facts, key_of
from onym.errors import ConfigError
from onym.train.display import size


@dataclass(frozen=True)
class _Arguments:
    """Say where compiled code is kept and what for; move it to an equal machine (it is code), or delete it."""

    action: Annotated[
        tyro.conf.Positional[Literal["list", "export", "import", "clear"]], tyro.conf.arg(help_behavior_hint="(default: list)")
    ] = "list"
    """list what is there; export this machine's into a file; import such a file; clear all of it."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.tar.gz", help_behavior_hint="")] = ""
    """The file to export into, or to import."""
    i_trust_it: bool = False
    """Import the file, which is code that will run with your rights."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``onym cache``."""
    given = tyro.cli(_Arguments, prog="onym cache", args=arguments)
    moves = given.action in ("export", "import")
    if moves != bool(given.file):
        wanted = "needs a file, as in" if moves else "takes no file; to move compiled code there are"
        raise ConfigError(f"onym cache {given.action} {wanted} onym cache export FILE.tar.gz, onym cache import FILE.tar.gz.")
    file = Path(given.file)
    if given.action == "export":
        count = export_cache(file)
        written = file.stat().st_size
        if given.json:
            print_json({"file": file, "files": count, "bytes": written})
        else:
            print(f"{counted(count, 'file')}, {size(written)}, in '{file}'.")
            print("It is code: whoever imports it runs it with their own rights. Give it only to machines that trust this one.")
    elif given.action == "import":
        added = import_cache(file, trusted=given.i_trust_it)
        told = f"{counted(added, 'file')} taken over from '{file}'; what was there already stayed."
        print_json({"file": file, "added": added}) if given.json else print(told)
    elif given.action == "clear":
        freed, busy = cache.clear()
        left = f" Left alone, because another process is compiling: {', '.join(busy)}." if busy else ""
        print_json({"bytes": freed, "in_use": busy}) if given.json else print(f"{size(freed)} freed.{left}")
    else:
        _list(as_json=given.json)
    return 0


def _list(*, as_json: bool) -> None:
    here = facts()
    key, there = key_of(here), cache.all_kept()
    total = sum(kept.size for kept in there)
    if as_json:
        print_json(
            {
                "path": cache.root(),
                "bytes": total,
                "limit_bytes": cache.LIMIT_BYTES,
                "this_machine": {"key": key, "about": here},
                "keys": [
                    {"key": k.key, "bytes": k.size, "used": _utc(k.used_at), "this_machine": k.key == key, "about": k.facts}
                    for k in there
                ],
            }
        )
        return
    print_heading(f"Compiled code in '{cache.root()}'")
    print_facts({"size": f"{size(total)} of {size(cache.LIMIT_BYTES)} at most", "this machine": key})
    rows = [("", "key", "size", "used", "for")]
    for kept in there:
        about = ", ".join(kept.facts.get(fact, "?").partition(",")[0] for fact in ("torch", "Python", "processor", "GPU"))
        rows.append(("*" if kept.key == key else "", kept.key, size(kept.size), age(_utc(kept.used_at)), about))
    print_table(rows) if there else print("Nothing is there yet: onym train keeps what it compiles.")


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
