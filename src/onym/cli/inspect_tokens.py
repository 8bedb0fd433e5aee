"""What ``onym inspect`` shows of tokenised text: a folder of tokens, and the sources of a run. No token is read."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from onym.cli.report import bytes_of, print_facts, print_heading, print_table
from onym.data.survey import SPLITS, Split
from onym.data.tokens import TOKENIZER, USED, Shard, shards_of
from onym.errors import DataError
from onym.units import format_age, format_size, plural, utc

_DESCRIPTION, _FILES = "tokens.json", "files.jsonl"
_LARGEST, _SKIPPED = 10, 5  # how many are shown
_WRONG = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def is_token_folder(path: Path) -> bool:
    """Whether it is one, or is to become one."""
    return (path / _DESCRIPTION).is_file() or (path.name.startswith(".writing-") and path.is_dir())


def describe_tokens(folder: Path) -> dict[str, Any]:
    """What the headers of a folder of tokens state.

    Raises:
        DataError: it is not complete, or damaged.
    """
    if not (folder / _DESCRIPTION).is_file():
        raise DataError(
            f"The token folder '{folder}' is not complete: its process was interrupted, or writes still; the same onym train "
            "goes on from there."
        )
    try:
        about = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        dtype, counts = np.dtype(about["dtype"]), {split: int(about["tokens"][split]) for split in SPLITS}
        shards: dict[Split, list[Shard]] = {split: shards_of(folder, about, split) for split in SPLITS}
        text_bytes, files = (None if about.get(name) is None else int(about[name]) for name in ("bytes", "files"))
        skipped = [{"name": str(each["name"]), "reason": str(each["reason"])} for each in about.get("skipped", ())]
        documents, vocab_size = int(about["documents"]), int(about["vocab_size"])
    except _WRONG as error:
        raise _damaged(folder, f"its {_DESCRIPTION} cannot be understood") from error
    for split in SPLITS:
        for shard in shards[split]:
            _require_whole(folder, shard, dtype)
    linked = [shard for split in SPLITS for shard in shards[split] if shard.file.parent != folder]
    total = sum(counts.values())
    used = [folder / name for name in (USED, _DESCRIPTION) if (folder / name).exists()]
    return {
        "kind": "tokenised text",
        "path": folder,
        "bytes": bytes_of(folder),
        "format": about["format"],
        "corpus": str(about.get("corpus")),
        "corpus_fingerprint": about.get("corpus_fingerprint"),
        "text_bytes": text_bytes,
        "files": files,
        "documents": None if linked and not documents else documents,
        "tokens": counts,
        "tokens_per_byte": total / text_bytes if text_bytes else None,
        "shards": {split: len(shards[split]) for split in SPLITS},
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "tokenizer": about.get("tokenizer") or _hash(folder / TOKENIZER),
        "used": utc(used[0].stat().st_mtime) if used else None,
        "skipped": skipped,
        "files_list": folder / _FILES if (folder / _FILES).is_file() else None,
        "largest_files": _largest(folder),
        "linked_files": [{"name": shard.file, "offset": shard.offset, "tokens": shard.tokens} for shard in linked],
    }


def print_tokens(report: Mapping[str, Any]) -> None:
    """The same for people."""
    tokens, shards, text_bytes = report["tokens"], report["shards"], report["text_bytes"]
    print_heading(f"{report['path']}: {report['kind']}")
    text = [f"{format_size(text_bytes)}"] if text_bytes is not None else []
    text += [plural(report["files"], "file")] if report["files"] else []
    text += [plural(report["documents"], "document")] if report["documents"] is not None else []
    rate = report["tokens_per_byte"]
    number = sum(shards.values())
    print_facts(
        {
            "corpus": report["corpus"],
            "text": ", ".join(text) or "its size is not known",
            "tokens": f"{sum(tokens.values()):,}: {tokens['train']:,} to train on, {tokens['held_out']:,} held out",
            "tokens a byte": f"{rate:.3f} ({1 / rate:.2f} bytes a token)" if rate else None,
            "size": f"{format_size(report['bytes'])} in {plural(number, 'shard')}, {report['dtype']}",
            "vocabulary": f"{report['vocab_size']:,}",
            "tokenizer": None if report["tokenizer"] is None else str(report["tokenizer"]),
            "used": format_age(report["used"]),
        }
    )
    _print_skipped(report["skipped"])
    for title, of_kind, count in (
        ("Largest files", report["largest_files"], report["files"] or 0),
        ("Files elsewhere", report["linked_files"], len(report["linked_files"])),
    ):
        if of_kind:
            print_heading(title)
            columns = [name for name in ("bytes", "documents", "tokens", "name") if name in of_kind[0]]
            rows = [
                [f"{each[name]:,}" if isinstance(each[name], int) else str(each[name]) for name in columns] for each in of_kind
            ]
            print_table([[name if name != "name" else "file" for name in columns], *rows[:_LARGEST]])
            _print_more(count - _LARGEST, f": {report['files_list']}" if report["files_list"] else "")


def describe_text(run: Path) -> dict[str, Any] | None:
    """What a run was trained on, as run.json says it; None where it says nothing."""
    try:
        about = json.loads((run / "run.json").read_text(encoding="utf-8"))
        for source in about["sources"]:
            if (rows := source.get("examples")) is not None:
                return {"rows": str(rows), **_rows_of(Path(rows))}
        weights = [float(source["weight"]) for source in about["sources"]]
        sources = [
            {"name": str(source["name"]), "share": weight / sum(weights), **_tokens_of(Path(source["token_cache"]))}
            for source, weight in zip(about["sources"], weights, strict=True)
        ]
        skipped = [{"name": str(each["name"]), "reason": str(each["reason"])} for each in about.get("skipped_files", ())]
    except (*_WRONG, ZeroDivisionError):  # no run of onym train, one of an earlier version, or a file that is damaged
        return None
    if not sources:
        return None
    return {"sources": sources, "skipped_files": skipped}


def print_text(report: Mapping[str, Any]) -> None:
    """The same for people."""
    if "rows" in report:
        print_heading("Trained on rows")
        print_facts({name: str(value) for name, value in report.items()})
        return
    print_heading(f"Trained on {plural(len(report['sources']), 'source')}")
    rows = [("source", "share", "train", "held out", "documents", "text", "tokens a byte")]
    lines: dict[str, str | None] = {}
    for source in report["sources"]:
        name, tokens = source["name"], source["tokens"]
        lines[name] = source["problem"] or f"{source['token_cache']}"
        if tokens is not None:
            documents, text_bytes, rate = tokens["documents"], tokens["text_bytes"], tokens["tokens_per_byte"]
            counts = [f"{tokens['tokens'][split]:,}" for split in SPLITS]
            text = "-" if text_bytes is None else format_size(text_bytes)
            about = ("-" if documents is None else f"{documents:,}", text, f"{rate:.3f}" if rate else "-")
            rows.append((name, f"{source['share']:.1%}", *counts, *about))
        else:
            rows.append((name, f"{source['share']:.1%}", *"-----"))
    print_table(rows)
    print_facts(lines)
    _print_skipped(report["skipped_files"])


def _rows_of(folder: Path) -> dict[str, Any]:
    """What the cache says of the rows that a run was fine-tuned on."""
    try:
        about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        shown = ("source", "kind", "cut", "skipped", "without_reply")
        counts = {f"tokens {split.replace('_', ' ')}": f"{int(about['tokens'][split]):,}" for split in SPLITS}
        return {name.replace("_", " "): about[name] for name in shown if about[name]} | counts
    except _WRONG:
        return {"problem": "the cache was deleted: onym train makes it again when the run goes on"}


def _tokens_of(folder: Path) -> dict[str, Any]:
    tokens, problem = None, None
    if not folder.is_dir():
        problem = f"The token cache '{folder}' was deleted: onym train makes it again when the run goes on."
    else:
        try:
            tokens = describe_tokens(folder)
        except DataError as error:
            problem = str(error)
    return {"token_cache": folder, "tokens": tokens, "problem": problem}


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_skipped(skipped: Sequence[Mapping[str, str]]) -> None:
    if skipped:
        print_heading(f"Skipped, because they could not be read: {plural(len(skipped), 'file')}")
        print_table([(each["name"], each["reason"]) for each in skipped[:_SKIPPED]])
        _print_more(len(skipped) - _SKIPPED)


def _print_more(count: int, where: str = "") -> None:
    if count > 0:
        print(f"  and {count:,} more{where}")


class _File(NamedTuple):
    """A line of files.jsonl; the largest of them is the one with the most bytes."""

    bytes: int
    tokens: int
    documents: int
    name: str


def _largest(folder: Path) -> list[dict[str, Any]]:
    if not (folder / _FILES).is_file():
        return []
    try:
        with (folder / _FILES).open(encoding="utf-8") as lines:
            listed = (_File(**json.loads(line)) for line in lines)  # there may be millions
            return [file._asdict() for file in heapq.nlargest(_LARGEST, listed)]
    except _WRONG as error:
        raise _damaged(folder, f"its {_FILES} cannot be understood") from error


def _require_whole(folder: Path, shard: Shard, dtype: np.dtype[Any]) -> None:
    """Raise a DataError where a shard's files are not as large as they must be."""
    name = shard.file.name if shard.file.parent == folder else str(shard.file)
    try:
        size, end = shard.file.stat().st_size, shard.offset + shard.tokens * dtype.itemsize
        if size < end or (size != end and shard.file.parent == folder):
            raise _damaged(folder, f"'{name}' has {size:,} bytes instead of {end:,}")
        if shard.starts:
            name = shard.starts.name
            np.load(shard.starts, mmap_mode="r")  # reads the header
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _damaged(folder, f"'{name}' is missing") from error
    except _WRONG as error:
        raise _damaged(folder, f"'{name}' cannot be read") from error


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(
        f"The token folder '{folder}' is damaged: {why}. Delete the folder, and onym train tokenises the text again."
    )


def _hash(tokenizer: Path) -> str | None:
    try:
        return blake3(tokenizer.read_bytes()).hexdigest()[:32]
    except OSError:
        return None
