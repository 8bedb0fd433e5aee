"""Text in: what is read, in which order, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from onym.data.corpus import Corpus, python_documentation
from onym.errors import DataError


def texts(*data: object, field: str = "text") -> list[str]:
    return [document.text for document in Corpus(tuple(map(str, data)), field).documents()]


def test_pythons_own_documentation_is_a_corpus() -> None:
    documents = python_documentation()
    assert len(documents) > 3000
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert any("with statement" in document.text for document in documents)
    assert list(Corpus().documents()) == list(documents)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "sub/d.rst", ".hidden/e.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    assert texts(tmp_path) == ["text of a.md", "text of b.txt", "text of sub/c.py"]
    assert texts(tmp_path / "*.txt") == ["text of b.txt"]
    assert texts(tmp_path / "**" / "*.py") == ["text of sub/c.py"]
    assert texts(tmp_path / "sub" / "d.rst") == ["text of sub/d.rst"], "a file that is named is read whatever its suffix"
    assert texts(tmp_path / "b.txt", tmp_path) == ["text of b.txt", "text of a.md", "text of sub/c.py"], "each once"


def test_a_json_line_and_a_parquet_row_are_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = ["one", "", "zwei\nzeilen", "🙂"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"body": row, "n": 1}) for row in rows) + "\n\n", encoding="utf-8")
    parquet.write_table(pyarrow.table({"body": [*rows, None], "n": [1] * 5}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert texts(tmp_path / name, field="body") == ["one", "zwei\nzeilen", "🙂"]
        with pytest.raises(DataError, match=r"--text-field"):
            texts(tmp_path / name)


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert texts(tmp_path / "x.txt") == ["a\r\nb\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9".encode("latin1"), r"latin\.txt' is not UTF-8 text: byte 0xe9 at offset 3"),
        ("zeros.txt", bytes(100), r"zeros\.txt' looks like a binary file"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2' is not a JSON object"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl:1' has no text in a field 'text'"),
        ("half.jsonl", b'{"text": "a\\ud83d b"}\n', r"half\.jsonl:1' has half of a surrogate pair at character 1"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", r"deep\.jsonl:1' is not a JSON object"),
        ("bad.parquet", b"PAR1 no PAR1", r"bad\.parquet' is not a readable"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        texts(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="No file matches"):
        texts(tmp_path / "*.txt")
    with pytest.raises(DataError, match="holds no"):
        texts(tmp_path)
    for path in ("x" * 5000, "~nobody-of-this-name/x"):
        with pytest.raises(DataError, match="given to --data cannot be followed"):
            texts(path)


def test_a_parquet_file_damaged_inside_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": [f"row {n}" * 50 for n in range(5000)]}), tmp_path / "x.parquet")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[100:4000] = bytes(3900)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet' is damaged after row 0"):
        texts(tmp_path / "x.parquet")


def test_a_folder_whose_name_looks_like_a_file_is_searched_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "notes.md").mkdir()
    (tmp_path / "notes.md" / "a.txt").write_text("inside")
    assert texts(tmp_path) == ["inside"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("book.txt", "book"),
        ("notes/**/*.md", "notes"),
        ("my texts/*.txt", "my texts"),
        ("src/", "src"),
    ],
)
def test_a_run_is_called_after_its_data(data: str, name: str) -> None:
    assert Corpus((data,)).name == name


def test_a_file_is_read_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"text {number}")
    (folder / "loop").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    data = ("t", "t/../t", "./t", str(folder), "t/**/*.txt")
    assert [document.text for document in Corpus(data).documents()] == [f"text {number}" for number in range(6)]


def test_a_link_that_leads_nowhere_is_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    corpus = Corpus((str(tmp_path),))
    good, *bad = corpus.files()
    assert [document.text for document in corpus.read(good)] == ["text"]
    for file in bad:
        with pytest.raises(DataError, match="cannot be read"):
            list(corpus.read(file))


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "secret").mkdir()
    plain = os.scandir

    def scandir(path: str) -> object:  # as for everybody but root, who may read every folder
        if path.endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"secret' cannot be read: Permission denied"):
        Corpus((str(tmp_path),)).files()
