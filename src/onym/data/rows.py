"""Rows with fields: JSON lines, one JSON array, .csv, .tsv, .parquet, .arrow, a folder that ``datasets`` saved.

For fine-tuning, whose files fit into memory. Nothing here knows what the fields mean.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onym.data.readers import MAX_LINE, decode, open_bytes
from onym.data.tables import TABLES, read_columns, saved_dataset
from onym.errors import DataError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and its value: a mapping, if it is one; or the DataError that says why it cannot be read.

    Args:
        path: its ending says what it is; texts also with .gz or .zst behind.
        names: columns of tables that are of use; by default all.

    Raises:
        DataError: there is no such file, or it is damaged as a whole.
    """
    if path.is_dir():
        files = saved_dataset(path)
        if files is None:
            raise DataError(f"'{path}' is a folder: name a file of rows (.jsonl, .json, .csv, .parquet or .arrow).")
        for file in files:
            yield from read_rows(file, names)
        return
    kind = path.suffixes[-2] if path.suffix in (".gz", ".zst") and len(path.suffixes) > 1 else path.suffix
    if path.suffix in TABLES:
        for number, row in read_columns(path, str(path), names):
            yield f"{path}:{number}", row
    elif kind in _SEPARATORS:
        yield from _table(path, _SEPARATORS[kind])
    elif _is_array(path):
        values = _parsed(_text(path), str(path))
        if isinstance(values, DataError):
            raise values
        for number, row in enumerate(values, start=1):
            yield f"{path}, row {number:,}", row
    else:
        yield from _lines(path)


def _table(path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table with the columns' names in its first line, under the numbers of their lines."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator, strict=True)
    try:
        columns = next(reader, None)
        if not columns:
            raise DataError(f"'{path}' is empty: its first line names the columns.")
        for values in reader:
            source = f"{path}:{reader.line_num}"
            if len(values) == len(columns):
                yield source, dict(zip(columns, values, strict=True))
            elif values:
                yield (
                    source,
                    DataError(
                        f"'{source}' has {len(values)} values for {len(columns)} columns ({', '.join(columns)}): put a text "
                        f"with {separator!r} in it into quotation marks."
                    ),
                )
    except csv.Error as error:
        raise DataError(f"'{path}:{reader.line_num}' is no row of a table: {error}. Is a quotation mark missing?") from error


def _is_array(path: Path) -> bool:
    """Whether a text begins as one JSON array does."""
    with open_bytes(path, str(path)) as file:
        while block := file.read(1 << 10):
            if stripped := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                return stripped.startswith(b"[")
    return False


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_bytes(path, str(path)) as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            source = f"{path}:{number}"
            if len(raw) > MAX_LINE:
                raise DataError(f"'{source}' is a line of more than {MAX_LINE:,} bytes: '{path}' is not JSON lines.")
            if line := decode(raw, source).strip():
                yield source, _parsed(line, source)


def _text(path: Path) -> str:
    with open_bytes(path, str(path)) as file:
        return decode(file.read(), str(path))


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"'{source}' is not JSON: {error}. Rows are JSON objects, one a line, or one array of them.")
