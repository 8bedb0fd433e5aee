"""Rows of conversations: three kinds, several containers, and what is wrong with a row is said in one sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from onym.data.conversations import Instruction, Message, read_conversations
from onym.errors import DataError

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 🙂"}
SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = {"messages": [SYSTEM, ASK, ANSWER]}
PAIR = {"prompt": "Hi", "completion": " Hello\n"}
BOOK = {"instruction": "Name the opposite.", "input": "hot", "output": "cold"}


def write(path: Path, *rows: Any, text: str | None = None) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if text is None else text, encoding="utf-8")
    return path


def test_three_kinds_of_rows(tmp_path: Path) -> None:
    found = read_conversations(write(tmp_path / "a.jsonl", MESSAGES))
    assert (found.kind, found.sources) == ("messages", [f"{tmp_path / 'a.jsonl'}:1"])
    assert found.rows == [(Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello 🙂"))]
    found = read_conversations(write(tmp_path / "b.jsonl", PAIR))
    assert found.kind == "prompt and completion"
    assert found.rows == found.conversations("### Input:\n") == [(Message("user", "Hi"), Message("assistant", " Hello\n"))]
    found = read_conversations(write(tmp_path / "c.jsonl", BOOK, {**BOOK, "input": ""}))
    assert found.kind == "instruction, input and output"
    assert found.instructions == [Instruction(*BOOK.values()), Instruction("Name the opposite.", "", "cold")]
    assert [row[0].content for row in found.rows] == ["Name the opposite.\n\nhot", "Name the opposite."]
    asked = [row[0].content for row in found.conversations("### Input:\n")]
    assert asked == ["Name the opposite.\n\n### Input:\nhot", "Name the opposite."]


def test_every_container_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [BOOK, {"instruction": "Say hi.", "output": "hi"}, BOOK]
    expected = read_conversations(write(tmp_path / "rows.jsonl", *rows)).rows
    assert len(expected) == 3
    array = write(tmp_path / "array.json", text="\ufeff  \n" + json.dumps(rows, indent=1))
    table = pyarrow.Table.from_pylist([{**row, "n": 1} for row in rows])
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(array.read_bytes()))
    for name in ("array.json", "rows.parquet", "rows.arrow", "rows.json.gz"):
        assert read_conversations(tmp_path / name).rows == expected, name
    assert read_conversations(array).sources[2] == f"{array}, row 3"


def test_messages_in_a_table(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([MESSAGES]), tmp_path / "rows.parquet")
    assert read_conversations(tmp_path / "rows.parquet").rows[0][2] == Message("assistant", "Hello 🙂")


def test_what_follows_the_last_reply_is_ignored(tmp_path: Path) -> None:
    found = read_conversations(write(tmp_path / "a.jsonl", {"messages": [ASK, ANSWER, ASK]}, MESSAGES))
    assert [len(row) for row in found.rows] == [2, 3]
    assert found.shortened == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [SYSTEM, ASK]}, "no turn by the assistant"),
        ({"messages": []}, "no turn by the assistant"),
        (
            {"messages": [ASK, {"role": "asistant", "content": "Hello"}]},
            "message 2 is by 'asistant' (did you mean 'assistant'?)",
        ),
        ({"messages": [ASK, {"role": "tool", "content": "Hello"}]}, "the roles known here are system, user, assistant"),
        ({"messages": [ASK, {"role": ["user"], "content": "Hello"}]}, "message 2 is by ['user']"),
        ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "message 2 has nothing in its field 'content'"),
        ({"messages": [ASK, {"role": "assistant"}]}, "message 2 has no field 'content' (its fields: role)"),
        ({"messages": [ASK, {"content": "Hello"}]}, "message 2 has no field 'role'"),
        ({"messages": [{"role": "user", "content": ["Hi"]}, ANSWER]}, "message 1 has a field 'content' that is a JSON list"),
        ({"messages": [ASK, None]}, "message 2 is a JSON null"),
        ({"messages": "Hi"}, "messages is a JSON text"),
        ({"messages": [ASK, SYSTEM, ANSWER]}, "message 2 is by the system"),
        ({"messages": [SYSTEM, SYSTEM, ASK, ANSWER]}, "message 2 is by the system"),
        ({"messages": [ASK, {"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
        (PAIR, "has no field 'messages' (its fields: prompt, completion), and the rows before it have messages"),
        ([ASK, ANSWER], "is a JSON list"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path / "rows.jsonl", MESSAGES, row)
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert said in str(error.value)
    assert f"'{path}:2'" in str(error.value)
    found = read_conversations(path, on_bad_row="skip")
    assert len(found.rows) == 1
    assert found.skipped == [str(error.value)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no conversation: it has no rows."),
        ("[]", "holds no conversation: it has no rows."),
        ('{"text": "Hi"}', "is no conversation (its fields: text)"),
        ('{"prompt": "Hi"}', "is no conversation (its fields: prompt)"),
        ('{"prompt": "", "completion": "x"}', "has nothing in its field 'prompt'"),
        ('{"prompt": 3, "completion": "x"}', "a JSON number"),
        ('{"instruction": "a", "input": 1, "output": "x"}', "field 'input' that is a JSON number"),
        ('{\n "messages": []\n}', "rows.json:1' is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "rows.json", text=text)
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_nothing_left_to_learn_from(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": [ASK]}, {"messages": []})
    with pytest.raises(DataError, match=r"none of its 2 rows can be used; the first: .*no turn by the assistant"):
        read_conversations(path, on_bad_row="skip")
    with pytest.raises(DataError, match="is a folder: name a file"):
        read_conversations(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "missing.jsonl")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match=r"is not a readable \.parquet file"):
        read_conversations(tmp_path / "rows.parquet")
