"""What ``onym tools cache`` shows of tokenised text, and how it is pruned."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onym.cli.report import print_facts, print_heading, print_table, some
from onym.data.cache import HOUR, LIMIT_BYTES, Entry, Kind, Pruned, entries, prune
from onym.units import format_age, format_size, parse_size, plural, utc

_NOUNS: dict[Kind, str] = {
    "tokens": "token folder",
    "tokenizer": "tokenizer",
    "download": "download",
    "interrupted": "unfinished one",
}


def describe_text(cache: Path) -> dict[str, Any]:
    """What there is, for JSON."""
    there = entries(cache)
    return {
        "path": cache,
        "bytes": sum(entry.bytes for entry in there),
        "limit_bytes": LIMIT_BYTES,
        "tokens": [
            {
                "key": entry.path.name,
                **_about(entry),
                "in_use": entry.in_use,
                "tokens": _tokens(entry),
                "corpus": entry.description.get("corpus"),
            }
            for entry in there
            if entry.kind == "tokens"
        ],
        "tokenizers": _summary(entry for entry in there if entry.kind == "tokenizer"),
        "downloads": _summary(entry for entry in there if entry.kind == "download"),
        "interrupted": [{**_about(entry), "in_use": entry.in_use} for entry in there if entry.kind == "interrupted"],
    }


def print_text(report: dict[str, Any]) -> None:
    """The same for people."""
    print_heading(f"Tokenised text in '{report['path']}'")
    if not report["tokens"] and not report["bytes"]:
        print("No text was tokenised yet: onym train does it.")
        return
    interrupted = report["interrupted"]
    running = sum(each["in_use"] for each in interrupted)
    kept = [f"{running} being written"] * bool(running)
    if waiting := len(interrupted) - running:
        kept.append(f"{waiting} left by interrupted processes: within a day, the same command goes on from there")
    print_facts(
        {
            "size": f"{format_size(report['bytes'])}; above {format_size(LIMIT_BYTES)}, onym tools cache prune deletes what "
            "was used longest ago",
            **{
                name: f"{report[name]['count']}, {format_size(report[name]['bytes'])}"
                for name in ("tokenizers", "downloads")
                if report[name]["count"]
            },
            "unfinished": f"{format_size(sum(each['bytes'] for each in interrupted))}, {', '.join(kept)}" if kept else None,
        }
    )
    rows = [("key", "size", "tokens", "used", "corpus")]
    for each in report["tokens"]:
        counted = "?" if each["tokens"] is None else f"{each['tokens']:,}"
        used = "in use" if each["in_use"] else format_age(each["used"])
        rows.append((each["key"], format_size(each["bytes"]), counted, used, str(each["corpus"] or "damaged")))
    if report["tokens"]:
        print_table(rows)


def prune_text(cache: Path, limit: str) -> tuple[dict[str, Any], str]:
    """Prune, and what was done: for JSON, and for people.

    Args:
        cache: the cache folder.
        limit: a size as people write it; 0 for everything that is not in use; empty for the standard one.

    Raises:
        ConfigError: it is no size.
    """
    everything = limit.strip() == "0"
    most = 0 if everything else parse_size(limit, "--limit") if limit else LIMIT_BYTES
    done = prune(cache, most, 0.0 if everything else HOUR)
    report = {
        "path": cache,
        "limit_bytes": most,
        "bytes": done.bytes_freed,
        "bytes_left": done.bytes_left,
        "deleted": [{"kind": entry.kind, **_about(entry)} for entry in done.deleted],
        "in_use": [{"kind": entry.kind, **_about(entry)} for entry in done.in_use],
    }
    return report, _message(done, most)


def _message(done: Pruned, limit: int) -> str:
    counts = {kind: sum(entry.kind == kind for entry in done.deleted) for kind in _NOUNS}
    what = ", ".join(plural(count, _NOUNS[kind]) for kind, count in counts.items() if count)
    freed = f"{format_size(done.bytes_freed)} freed{f': {what}' if what else ''}. {format_size(done.bytes_left)} left."
    if done.bytes_left <= limit:
        return freed
    if done.in_use:
        return f"{freed} Left alone, because another process uses it: {', '.join(some([e.path.name for e in done.in_use]))}."
    if limit:
        return f"{freed} It was used within the last hour, or written within the last day; --limit 0 deletes that too."
    return f"{freed} It is being written, or was within the last hour."


def _about(entry: Entry) -> dict[str, Any]:
    return {"path": entry.path, "bytes": entry.bytes, "used": utc(entry.used_at)}


def _summary(of_kind: Iterable[Entry]) -> dict[str, int]:
    sizes = [entry.bytes for entry in of_kind]
    return {"count": len(sizes), "bytes": sum(sizes)}


def _tokens(entry: Entry) -> int | None:
    try:
        return sum(int(count) for count in entry.description["tokens"].values())
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
