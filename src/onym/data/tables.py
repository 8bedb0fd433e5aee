"""Tables in: the text column of .parquet and .arrow files, and which files a saved dataset consists of.

Rows are read some hundreds at a time. What Hugging Face's ``save_to_disk`` wrote is read without the datasets package: a folder
with ``data-*.arrow`` files, whose order ``state.json`` gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from onym.errors import DataError
from onym.storage.local import can_be_mapped

TABLES = (".parquet", ".arrow")

_ROWS = 500  # converted at a time: texts of 10 kB are 5 MB then
_ARROW_FILE = b"ARROW1"  # what Arrow's file format begins with; its stream format does not
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
MARKERS = frozenset((_DICT, _STATE))
"""One of these files is in every folder of a saved dataset."""


def read_table(path: Path, source: str, text_field: str) -> Iterator[tuple[int, str]]:
    """Each row's number, from 1, and its text; "" where it has none.

    Raises:
        DataError: it is no such file, is damaged, or has no text in that column.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"Reading '{source}' needs pyarrow: pip install 'onym[parquet]'.") from error
    with ExitStack() as stack:
        try:
            schema, columns = (_open_parquet if path.suffix == ".parquet" else _open_arrow)(path, text_field, stack)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"'{source}' is not a readable {path.suffix} file: {_sentence(error)}.") from error
        _require_text_column(schema, source, text_field)
        row = 0
        try:
            for column in columns:
                column.validate(full=True)  # offsets that lead out of a damaged file would end the process
                for start in range(0, len(column), _ROWS):
                    for text in column.slice(start, _ROWS).to_pylist():
                        row += 1
                        yield row, _as_text(text, f"{source}:{row}")
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"'{source}' is damaged after row {row:,}: {_sentence(error)}.") from error


def read_columns(path: Path, source: str, names: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's number, from 1, and its values in those of these columns that there are; without ``names``, in all.

    Raises:
        DataError: it is no such file, or is damaged.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"Reading '{source}' needs pyarrow: pip install 'onym[parquet]'.") from error
    row = 0
    with ExitStack() as stack:
        try:
            for batch in (_parquet_batches if path.suffix == ".parquet" else _arrow_batches)(path, names, stack):
                batch.validate(full=True)  # offsets that lead out of a damaged file would end the process
                for start in range(0, batch.num_rows, _ROWS):
                    for values in batch.slice(start, _ROWS).to_pylist():
                        row += 1
                        yield row, values
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            where = f"is damaged after row {row:,}" if row else f"is not a readable {path.suffix} file"
            raise DataError(f"'{source}' {where}: {_sentence(error)}.") from error


def _parquet_batches(path: Path, names: Sequence[str] | None, stack: ExitStack) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    file = stack.enter_context(parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False))
    there = [name for name in file.schema_arrow.names if names is None or name in names]
    return file.iter_batches(_ROWS, columns=there)  # type: ignore[no-any-return]


def _arrow_batches(path: Path, names: Sequence[str] | None, stack: ExitStack) -> Iterator[Any]:
    from pyarrow import ipc

    file, is_file = _open_ipc(path, stack)
    there = [
        number
        for number, name in enumerate((ipc.open_file if is_file else ipc.open_stream)(file).schema.names)
        if names is None or name in names
    ]
    file.seek(0)
    return _ipc_batches(file, is_file, there)


def _open_parquet(path: Path, text_field: str, stack: ExitStack) -> tuple[Any, Iterator[Any]]:
    import pyarrow.parquet as parquet

    # Otherwise a row group's column is read as a whole.
    file = stack.enter_context(parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False))
    return file.schema_arrow, (batch.column(0) for batch in file.iter_batches(_ROWS, columns=[text_field]))


def _open_arrow(path: Path, text_field: str, stack: ExitStack) -> tuple[Any, Iterator[Any]]:
    from pyarrow import ipc

    file, is_file = _open_ipc(path, stack)
    schema = (ipc.open_file if is_file else ipc.open_stream)(file).schema
    if text_field not in schema.names:
        return schema, iter(())
    file.seek(0)
    return schema, (batch.column(0) for batch in _ipc_batches(file, is_file, [schema.names.index(text_field)]))


def _open_ipc(path: Path, stack: ExitStack) -> tuple[Any, bool]:
    """An Arrow file at its beginning, and whether it has the file format; else it is a stream."""
    import pyarrow

    file = stack.enter_context(pyarrow.memory_map(str(path)) if can_be_mapped(path) else pyarrow.OSFile(str(path)))
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    return file, is_file


def _ipc_batches(file: Any, is_file: bool, fields: Sequence[int]) -> Iterator[Any]:
    """The record batches, of these columns alone."""
    from pyarrow import ipc

    reader = (ipc.open_file if is_file else ipc.open_stream)(file, options=ipc.IpcReadOptions(included_fields=list(fields)))
    return (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _require_text_column(schema: Any, source: str, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise DataError(
            f"'{source}' has no column {text_field!r} (its columns: {', '.join(schema.names)}): "
            "name the one that holds the text with --text-field."
        )
    kind = schema.field(schema.names.index(text_field)).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not str(value).startswith(("string", "large_string", "binary", "large_binary", "null")):  # views too
        raise DataError(
            f"Column {text_field!r} of '{source}' holds {kind}, not text (its columns: {', '.join(schema.names)}): "
            "name the one that holds the text with --text-field."
        )


def _as_text(value: str | bytes | None, source: str) -> str:
    if not isinstance(value, bytes):
        return value or ""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{source}' is not UTF-8 text: byte 0x{value[error.start]:02x} at offset {error.start:,}. "
            "Name another column with --text-field, or leave the file out of --data."
        ) from error


def saved_dataset(folder: Path) -> list[Path] | None:
    """The files of a dataset that ``save_to_disk`` wrote, in order; None where the folder is none.

    Of several splits that is the one called train; without it, the only one.

    Raises:
        DataError: its files are damaged or missing, or it has several splits and none is called train.
    """
    if (folder / _DICT).is_file():
        splits = [str(name) for name in _json(folder / _DICT, "splits")]
        if "train" not in splits and len(splits) != 1:
            names = ", ".join(f"'{folder / name}'" for name in splits)
            raise DataError(f"The dataset '{folder}' has several splits, none of them called train. Name one: {names}.")
        split = folder / ("train" if "train" in splits else splits[0])
        if (files := saved_dataset(split)) is None:
            raise DataError(f"The dataset '{folder}' is not complete: '{split}' has no {_STATE}. Save or copy it again.")
        return files
    if not ((folder / _STATE).is_file() and (folder / _INFO).is_file()):
        return None
    if _json(folder / _STATE, "_indices_data_files", "_indices_files"):
        raise DataError(
            f"The dataset '{folder}' was saved by an old version of datasets, as a selection of rows. Save it again: "
            "load_from_disk, then save_to_disk."
        )
    files = [folder / str(entry.get("filename")) for entry in _json(folder / _STATE, "_data_files") if isinstance(entry, dict)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"The dataset '{folder}' is not complete: {', '.join(missing)} is missing. Save or copy it again.")
    return files


def _json(path: Path, *names: str) -> list[Any]:
    """The first of these values that a small JSON file has, which must be a list."""
    try:
        values = json.loads(path.read_bytes())
        found: Any = next((values[name] for name in names if values.get(name)), [])
        if not isinstance(found, list):
            raise TypeError(f"{names[0]} is no list")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"'{path}' is damaged: {error}. Save or copy the dataset again.") from error
    return found
