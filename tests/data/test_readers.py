"""Kinds of files: all give the same documents, none is held in memory, and what is wrong with one is said."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from onym.data import readers
from onym.data.corpus import Corpus, LongDocument
from onym.errors import DataError

ROWS = ["one", "", "zwei\nzeilen\r\n", "🙂 ünï", "   \n", "last" * 1000]
DOCUMENTS = [row for row in ROWS if row.strip()]


def texts(*data: object, field: str = "text", **options: Any) -> list[str]:
    corpus = Corpus(tuple(map(str, data)), field, **options)
    return [
        "".join(document.blocks()) if isinstance(document, LongDocument) else document.text for document in corpus.documents()
    ]


def zstd(content: bytes) -> bytes:
    compressed = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    assert isinstance(compressed, bytes)
    return compressed


def lines(rows: list[str] = ROWS) -> bytes:
    return "\n".join(json.dumps({"n": 1, "text": row}) for row in rows).encode() + b"\n\n"


def table(kind: pyarrow.DataType | None = None) -> pyarrow.Table:
    column = pyarrow.array([*ROWS, None])
    if kind is not None and pyarrow.types.is_dictionary(kind):
        column = column.dictionary_encode()
    elif kind is not None:
        column = pyarrow.array([None if row is None else row.encode() for row in column.to_pylist()], pyarrow.binary())
        column = column.cast(kind)
    return pyarrow.table({"n": [1] * len(column), "text": column, "m": [0.5] * len(column)})


def write_arrow(path: Path, rows: pyarrow.Table, form: str = "stream", compression: str | None = None) -> None:
    opened = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with opened(str(path), rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=2)


def save_dataset(folder: Path, rows: pyarrow.Table = None) -> None:
    """As save_to_disk of datasets 5.2 does; its own folders are read below, where it is installed."""
    rows = table() if rows is None else rows
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
    write_arrow(folder / names[0], rows.slice(0, 3))
    write_arrow(folder / names[1], rows.slice(3))
    write_arrow(folder / "cache-1234.arrow", rows)  # of a map(), not of the dataset
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def save_splits(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        save_dataset(folder / name, table() if number == 0 else pyarrow.table({"text": ["of another split"] * 4}))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": names}))


KINDS: dict[str, Callable[[Path], object]] = {
    "x.jsonl": lambda path: path.write_bytes(lines()),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "members.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:]))),
    "x.json.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "x.jsonl.zst": lambda path: path.write_bytes(zstd(lines())),
    "frames.jsonl.zst": lambda path: path.write_bytes(zstd(lines(ROWS[:2])) + zstd(lines(ROWS[2:]))),
    "x.parquet": lambda path: parquet.write_table(table(), path, row_group_size=2),
    "large.parquet": lambda path: parquet.write_table(table(pyarrow.large_string()), path),
    "view.parquet": lambda path: parquet.write_table(table(pyarrow.string_view()), path),
    "dictionary.parquet": lambda path: parquet.write_table(table(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())), path),
    "binary.parquet": lambda path: parquet.write_table(table(pyarrow.binary()), path),
    "stream.arrow": lambda path: write_arrow(path, table()),
    "file.arrow": lambda path: write_arrow(path, table(), "file"),
    "compressed.arrow": lambda path: write_arrow(path, table(), "file", "zstd"),
    "large.arrow": lambda path: write_arrow(path, table(pyarrow.large_string())),
    "view.arrow": lambda path: write_arrow(path, table(pyarrow.string_view())),
    "dictionary.arrow": lambda path: write_arrow(path, table(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))),
    "binary.arrow": lambda path: write_arrow(path, table(pyarrow.large_binary()), "file"),
    "dataset": save_dataset,
    "one_split": lambda path: save_splits(path, "validation"),
    "splits": lambda path: save_splits(path, "train", "test"),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    assert texts(tmp_path / name) == DOCUMENTS
    assert texts(tmp_path) == DOCUMENTS, "and the folder that it is in is searched for it"


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.py", "x.rst", "x.txt.gz", "x.rst.gz", "x.txt.zst"])
def test_a_text_file_is_a_document_also_compressed(tmp_path: Path, name: str) -> None:
    content = ROWS[2].encode()
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert texts(tmp_path / name) == [ROWS[2]]
    assert texts(tmp_path, suffixes=("rst",)) == [ROWS[2]], "further suffixes, with or without a dot"


def test_a_row_and_a_line_say_where_they_are(tmp_path: Path) -> None:
    for name in ("x.jsonl.gz", "x.parquet", "stream.arrow"):
        KINDS[name](tmp_path / name)
        sources = [document.source for document in Corpus((str(tmp_path / name),)).documents()]
        assert sources == [f"{tmp_path / name}:{number}" for number in (1, 3, 4, 6)]


def test_files_have_names_and_sizes_and_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("ccc")
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    corpus = Corpus((f"file://{tmp_path}", str(tmp_path / "c.txt")))
    first, bad, last = corpus.files()
    assert [(file.name, file.size) for file in (first, last)] == [(f"{tmp_path}/a.txt", 1), (f"{tmp_path}/c.txt", 3)]
    with pytest.raises(DataError, match=r"b\.txt' is not UTF-8"):
        list(corpus.read(bad))
    assert [document.source for file in (first, last) for document in corpus.read(file)] == [first.name, last.name]


def test_a_folder_of_token_files_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(10))
    with pytest.raises(DataError, match=r"holds no \.txt, \.md, \.py, \.jsonl, \.parquet, \.arrow files"):
        texts(tmp_path)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 7, 1000])
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst"])
def test_a_long_text_is_the_same_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    text = "\r\n 🙂é\u2028ß€ \ufeff" * 20  # with characters of one to four bytes, at every place of a block
    content = b"\xef\xbb\xbf" + text.encode()
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert texts(tmp_path / name) == [text]
    monkeypatch.setattr(readers, "LONG_TEXT", 10)
    monkeypatch.setattr(readers, "BLOCK", block)
    (document,) = Corpus((str(tmp_path / name),)).documents()
    assert isinstance(document, LongDocument)
    assert document.source == str(tmp_path / name)
    for _ in range(2):  # anew each time
        blocks = list(document.blocks())
        assert "".join(blocks) == text
        assert all(blocks)
        assert (len(blocks) > 1) == (len(content) > block)
    for content, message in (
        (b"a" * 40 + "é".encode()[:1] + b"b", r"is not UTF-8 text: byte 0xc3 at offset 40"),
        (b"\xef\xbb\xbf" + b"a" * 40 + "🙂".encode()[:3], r"is not UTF-8 text: byte 0xf0 at offset 43"),
        (b"a" * 40 + b"\0", "looks like a binary file"),
    ):
        (tmp_path / name).write_bytes(pack(content))
        with pytest.raises(DataError, match=message):
            texts(tmp_path / name)
        with monkeypatch.context() as short:
            short.setattr(readers, "LONG_TEXT", 1000)
            with pytest.raises(DataError, match=message):
                texts(tmp_path / name)
    (tmp_path / name).write_bytes(pack(b" \n" * 100))
    assert texts(tmp_path / name) == [], "white space is no text, however long"


def test_memory_does_not_grow_with_a_file(tmp_path: Path, in_fresh_process: Callable[[str], str]) -> None:
    line = "The same words, again and again, in a line of some length.\n"
    rows = [line * 200] * 12_000  # 142 MB
    (tmp_path / "long.txt").write_text("".join(rows))
    with gzip.open(tmp_path / "long.txt.gz", "wt", compresslevel=1) as text:
        text.writelines(rows)
    with gzip.open(tmp_path / "long.jsonl.gz", "wt", compresslevel=1) as packed:
        packed.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    column = pyarrow.table({"text": rows, "n": range(len(rows))})
    parquet.write_table(column, tmp_path / "long.parquet", row_group_size=len(rows), use_dictionary=False, compression="none")
    # Of Python's own and Arrow's memory the most that is held at once. Not the process's: that begins with its parent's peak.
    program = """
import tracemalloc
import pyarrow.parquet
from onym.data.corpus import Corpus, LongDocument
tracemalloc.start()
for name in ("long.txt", "long.txt.gz", "long.jsonl.gz", "long.parquet"):
    tracemalloc.reset_peak()
    size = 0
    for document in Corpus((name,)).documents():
        size += sum(map(len, document.blocks())) if isinstance(document, LongDocument) else len(document.text)
    assert size > 140e6, (name, size)
    print(name, (tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory()) // 1_000_000)
"""
    most = {name: int(megabytes) for name, megabytes in map(str.split, in_fresh_process(program).splitlines())}
    # Of compressed text the first 64 MB are read to see whether there are more.
    limits = {"long.txt": 40, "long.txt.gz": 100, "long.jsonl.gz": 10, "long.parquet": 60}
    assert {name: most[name] for name in limits if most[name] > limits[name]} == {}


PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def cut(pack: Callable[[bytes], bytes]) -> bytes:
    whole = pack(lines([f"{n * n}" for n in range(5000)]))
    return whole[: len(whole) * 2 // 3]


BAD: list[tuple[str, Callable[[], bytes], str]] = [
    ("image.txt", lambda: PNG, r"image\.txt' is not UTF-8 text: byte 0x89 at offset 0"),
    ("image.jsonl", lambda: PNG, r"image\.jsonl:1' is not UTF-8 text"),
    ("image.parquet", lambda: PNG, r"image\.parquet' is not a readable \.parquet file"),
    ("image.arrow", lambda: PNG, r"image\.arrow' is not a readable \.arrow file"),
    ("image.txt.gz", lambda: PNG, r"image\.txt\.gz' is not a readable \.gz file: Not a gzipped file"),
    ("image.txt.zst", lambda: zstd(b"") and PNG, r"image\.txt\.zst' is not a readable \.zst file"),
    ("cut.txt.gz", lambda: cut(gzip.compress), r"cut\.txt\.gz' is truncated"),
    ("cut.jsonl.gz", lambda: cut(gzip.compress), r"cut\.jsonl\.gz' is truncated"),
    ("cut.txt.zst", lambda: cut(zstd), r"cut\.txt\.zst' is truncated"),
    ("cut.jsonl.zst", lambda: cut(zstd), r"cut\.jsonl\.zst' is truncated"),
    (
        "lists.jsonl.gz",
        lambda: gzip.compress(b"[1]\n[2]\n"),
        r"lists\.jsonl\.gz:1' has no text in a field 'text'.*--text-field",
    ),
    ("array.json.gz", lambda: gzip.compress(b'[\n{"text": "a"}]\n'), r"array\.json\.gz:1' is not a JSON object"),
    ("other.jsonl", lambda: b'{"body": "a", "n": 1}\n', r"other\.jsonl:1' .*\(its fields: body, n\).*--text-field"),
    ("latin.jsonl.gz", lambda: gzip.compress(b'{"text": "caf\xe9"}\n'), r"latin\.jsonl\.gz:1' is not UTF-8 text: byte 0xe9"),
    ("latin.md.zst", lambda: zstd(b"caf\xe9"), r"latin\.md\.zst' is not UTF-8 text: byte 0xe9 at offset 3"),
    ("empty.parquet", lambda: b"", r"empty\.parquet' is not a readable \.parquet file"),
    ("empty.arrow", lambda: b"", r"empty\.arrow' is not a readable \.arrow file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, *_ in BAD])
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: Callable[[], bytes], message: str) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz", "x.jsonl.gz", "x.txt.zst", "x.jsonl.zst"])
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str) -> None:
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(b"")
    assert texts(tmp_path / name) == []


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_a_table_that_is_bad_is_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(**columns: object) -> None:
        rows = pyarrow.table(columns)
        form = name.partition(".")[0]
        parquet.write_table(rows, path) if path.suffix == ".parquet" else write_arrow(path, rows, form)

    write(body=["a"], n=[1])
    with pytest.raises(DataError, match=r"has no column 'text' \(its columns: body, n\).*--text-field"):
        texts(path)
    write(text=[1, 2], n=[1, 2])
    with pytest.raises(DataError, match=r"Column 'text' of .* holds int64, not text \(its columns: text, n\).*--text-field"):
        texts(path)
    write(text=[b"fine", b"caf\xe9"])
    with pytest.raises(DataError, match=r":2' is not UTF-8 text: byte 0xe9 at offset 3"):
        texts(path)
    write(text=pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"fine", b"caf\xe9"]).buffers()))
    with pytest.raises(DataError, match=r"is damaged after row 0: .*UTF8"):
        texts(path)
    write(text=["", None, " "])
    assert texts(path) == []
    write(text=pyarrow.nulls(3))
    assert texts(path) == []
    write(text=[f"row {number}" * 20 for number in range(1000)])
    whole = path.read_bytes()
    for share in (0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=rf"{name}' is (not a readable|damaged after row)"):
            texts(path)


def test_a_damaged_table_never_ends_the_process(tmp_path: Path) -> None:
    """Offsets in an .arrow file are used as they are, unless they are checked."""
    path = tmp_path / "x.arrow"
    write_arrow(path, pyarrow.table({"text": [f"row {number}" for number in range(40)]}))
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        content = bytearray(whole)
        content[place] ^= 0xC0
        path.write_bytes(content)
        try:
            texts(path)
        except DataError as error:
            assert "x.arrow" in str(error)


def test_what_is_wrong_with_a_saved_dataset_is_said(tmp_path: Path) -> None:
    save_splits(tmp_path / "splits", "validation", "test")
    with pytest.raises(DataError, match=r"several splits.*Name one: '.*splits/validation', '.*splits/test'"):
        texts(tmp_path / "splits")
    assert texts(tmp_path / "splits" / "validation") == DOCUMENTS
    assert len(texts(tmp_path / "splits" / "test")) == 4
    save_dataset(tmp_path / "old")
    for content, message in (
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"old' is not complete: gone\.arrow is missing"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "old version of datasets"),
        ("{", r"state\.json' is damaged"),
        ([], r"state\.json' is damaged"),
    ):
        (tmp_path / "old" / "state.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(DataError, match=message):
            texts(tmp_path / "old")


def test_what_the_datasets_library_saves_is_read_as_it_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [*ROWS * 300, None], "n": list(range(len(ROWS) * 300 + 1))})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    rows.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("one", "shuffled", "splits/train", "splits/test"):
        theirs = [text for text in datasets.load_from_disk(tmp_path / name)["text"] if text and text.strip()]
        assert texts(tmp_path / name) == theirs
    assert texts(tmp_path / "splits") == texts(tmp_path / "one")


@pytest.mark.parametrize(("package", "name", "extra"), [("zstandard", "x.txt.zst", "zstd"), ("pyarrow", "x.arrow", "parquet")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=rf"needs {package}: pip install 'onym\[{extra}\]'"):
        texts(tmp_path / name)


def test_a_run_is_called_after_its_data_in_whatever_form() -> None:
    for entry, name in (
        ("book.txt.gz", "book"),
        ("s3://bucket/notes/**/*.md", "notes"),
        ("https://host/wiki.jsonl.zst?download=true", "wiki"),
        ("file:///data/book.txt", "book"),
    ):
        assert Corpus((entry,)).name == name
