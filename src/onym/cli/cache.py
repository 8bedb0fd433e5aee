"""``onym tools cache``: what is cached for the next start, compiled code and tokenised text."""

from __future__ import annotations

from pathlib import Path

from onym.cli.arguments import CacheArguments
from onym.cli.report import print_facts, print_heading, print_json, print_table
from onym.cli.text_cache import describe_text, print_text, prune_text
from onym.compile import cache
from onym.compile.archive import export_cache, import_cache
from onym.compile.cache_key import facts, key_of
from onym.errors import ConfigError
from onym.units import format_age, format_size, plural, utc


def run(given: CacheArguments) -> int:
    """``onym tools cache``."""
    moves = given.action in ("export", "import")
    if moves != bool(given.file):
        wanted = "needs a file, as in" if moves else "takes no file; to move compiled code there are"
        example = "onym tools cache export FILE.tar.gz, onym tools cache import FILE.tar.gz"
        raise ConfigError(f"onym tools cache {given.action} {wanted} {example}.")
    if given.limit and given.action != "prune":
        raise ConfigError(f"onym tools cache {given.action} takes no --limit; onym tools cache prune does.")
    file = Path(given.file)
    if given.action == "export":
        count = export_cache(file)
        written = file.stat().st_size
        if given.json:
            print_json({"file": file, "files": count, "bytes": written})
        else:
            print(f"{plural(count, 'file')}, {format_size(written)}, in '{file}'.")
            print("It is code: whoever imports it runs it with their own rights. Give it only to machines that trust this one.")
    elif given.action == "import":
        added = import_cache(file, trusted=given.i_trust_it)
        message = f"{plural(added, 'file')} imported from '{file}'; existing files are unchanged."
        print_json({"file": file, "added": added}) if given.json else print(message)
    elif given.action == "clear":
        freed, busy = cache.clear()
        left = f" Left alone, because another process is compiling: {', '.join(busy)}." if busy else ""
        stays = "Tokenised text stays: onym tools cache prune --limit 0 deletes it."
        message = f"{format_size(freed)} of compiled code freed.{left} {stays}"
        print_json({"bytes": freed, "in_use": busy}) if given.json else print(message)
    elif given.action == "prune":
        report, message = prune_text(given.cache_dir.expanduser(), given.limit)
        print_json(report) if given.json else print(message)
    else:
        _list(given.cache_dir.expanduser(), as_json=given.json)
    return 0


def _list(cache_dir: Path, *, as_json: bool) -> None:
    here = facts()
    key, there = key_of(here), cache.entries()
    total, text = sum(entry.size for entry in there), describe_text(cache_dir)
    if as_json:
        print_json(
            {
                "path": cache.root(),
                "bytes": total,
                "limit_bytes": cache.LIMIT_BYTES,
                "this_machine": {"key": key, "about": here},
                "keys": [
                    {"key": k.key, "bytes": k.size, "used": utc(k.used_at), "this_machine": k.key == key, "about": k.facts}
                    for k in there
                ],
                "text": text,
            }
        )
        return
    print_heading(f"Compiled code in '{cache.root()}'")
    print_facts({"size": f"{format_size(total)} of {format_size(cache.LIMIT_BYTES)} at most", "this machine": key})
    rows = [("", "key", "size", "used", "for")]
    for entry in there:
        about = ", ".join(entry.facts.get(fact, "?").partition(",")[0] for fact in ("torch", "Python", "processor", "GPU"))
        rows.append(
            ("*" if entry.key == key else "", entry.key, format_size(entry.size), format_age(utc(entry.used_at)), about)
        )
    print_table(rows) if there else print("Nothing is there yet: onym train caches what it compiles.")
    print_text(text)
