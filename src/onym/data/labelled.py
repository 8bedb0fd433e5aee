"""Texts with labels, to train a classifier on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from onym.data.rows import read_rows
from onym.errors import DataError, nearest

_FEWEST = 2  # rows of a label: one to learn from, one to be held out
_MOST_LABELS = 1000


class Labelled(NamedTuple):
    """A text and what it is."""

    text: str
    label: str


def read_labelled(path: Path, text_field: str, label_field: str) -> list[Labelled]:
    """All rows of a file; see :func:`onym.data.rows.read_rows`.

    Args:
        path: the file.
        text_field, label_field: names of the columns or fields.

    Raises:
        DataError: a column is missing, a text or a label is empty, or there is a label that cannot be learned.
    """
    rows = []
    for source, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        rows.append(Labelled(_value(row, text_field, source), _value(row, label_field, source)))
    counts = Counter(label for _, label in rows)
    if len(counts) < 2:
        have = f"the label {next(iter(counts))!r} alone" if counts else "no rows"
        raise DataError(f"'{path}' has {have}: a classifier tells at least two labels apart.")
    if rare := [label for label, count in counts.items() if count < _FEWEST]:
        others = f", and {len(rare) - 1:,} others too" if len(rare) > 1 else ""
        raise DataError(
            f"The label {rare[0]!r} occurs once in '{path}'{others}, so it cannot be learned and tested: add rows of it, take "
            "it out, or name the column that holds the label with --label."
        )
    if len(counts) > _MOST_LABELS:
        raise DataError(
            f"'{path}' has {len(counts):,} labels in its column {label_field!r}: name that of the label with --label."
        )
    return rows


def _value(row: Any, field: str, source: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"'{source}' is no row with fields: it needs a text and a label.")
    if field not in row:
        raise DataError(
            f"'{source}' has no field {field!r}{nearest(field, map(str, row))} (its fields: {', '.join(map(str, row))}): name "
            "the text's with --text-field, and the label's with --label."
        )
    value = row[field]
    text = str(value) if isinstance(value, str | int | float) else ""
    if not text.strip():
        raise DataError(f"'{source}' has nothing in its field {field!r}. Correct the row, or remove it.")
    return text
