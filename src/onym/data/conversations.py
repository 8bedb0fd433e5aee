"""Conversations in: rows of JSON lines, of one JSON array, or of a table -> messages of a system, a user and an assistant.

Three kinds of rows are known, distinguished by their fields:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…", "output": "…"}        the book's; input may be empty or missing

Whatever is wrong with a row is a DataError that names the file and the row. Nothing here knows a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onym.data.readers import is_blank
from onym.data.rows import read_rows
from onym.errors import ConfigError, DataError, nearest

ROLES = ("system", "user", "assistant")

Kind = Literal["messages", "prompt and completion", "instruction, input and output"]
OnBadRow = Literal["fail", "skip"]

_FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "instruction, input and output": ("instruction", "output"),
}
_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output")
_REMEDY = "Correct the row, or remove it."


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of :data:`ROLES`."""
    content: str


Conversation = tuple[Message, ...]
"""The turns in order. A system message comes first, if there is one; the last turn of a training row is an assistant's."""


@dataclass(frozen=True)
class Instruction:
    """A row of the third kind as it stands, for templates that put the input under a heading of its own."""

    instruction: str
    input: str
    """Empty where there is none."""
    output: str

    def conversation(self, input_heading: str = "") -> Conversation:
        """As two turns; the input follows the instruction after an empty line and ``input_heading``."""
        asked = f"{self.instruction}\n\n{input_heading}{self.input}" if self.input else self.instruction
        return Message("user", asked), Message("assistant", self.output)


@dataclass(frozen=True)
class Conversations:
    """The conversations of a file, in its order."""

    kind: Kind
    rows: list[Conversation]
    sources: list[str]
    """Of each row, where it stands: ``file.jsonl:3``."""
    instructions: list[Instruction] = field(default_factory=list)
    """Of the third kind, the rows' own fields; empty for the others."""
    shortened: int = 0
    """Rows in which turns after the assistant's last one were ignored: there is nothing to learn from them."""
    skipped: list[str] = field(default_factory=list)
    """Of each row that was skipped, the sentence that says why."""

    def conversations(self, input_heading: str = "") -> list[Conversation]:
        """:attr:`rows`, with this text before the input of those that have one, as :data:`~onym.data.chat_template.ALPACA`
        wants ``"### Input:\\n"``."""
        if not input_heading or not self.instructions:
            return self.rows
        return [row.conversation(input_heading) for row in self.instructions]


def read_conversations(path: Path | str, *, on_bad_row: OnBadRow = "fail") -> Conversations:
    """Read all conversations of a file, or of a folder that ``datasets`` saved.

    The kind of all rows is that of the first one. What follows the assistant's last turn is ignored.

    Args:
        path: JSON lines, one JSON array of rows, .csv or .tsv (all also .gz and .zst), .parquet or .arrow.
        on_bad_row: ``"skip"`` passes over rows that cannot be used, and lists why in :attr:`Conversations.skipped`.

    Raises:
        DataError: it cannot be read, has no conversation, or a row cannot be used. A file that is damaged is an error in
            either case.
    """
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row must be 'fail' or 'skip', not {on_bad_row!r}.")
    kind: Kind | None = None
    rows, sources, skipped = list[Conversation](), list[str](), list[str]()
    instructions, shortened, count = list[Instruction](), 0, 0
    for source, row in read_rows(Path(path).expanduser(), _COLUMNS):
        count += 1
        try:
            if isinstance(row, DataError):
                raise row
            kind = kind or _kind_of(row, source)
            _require_kind(row, kind, source)
            place = f"'{source}'"
            if kind == "messages":
                conversation, rest = _from_messages(row["messages"], place)
                shortened += rest > 0
            elif kind == "prompt and completion":
                asked, answered = (_text(row, name, place) for name in _FIELDS[kind])
                conversation = (Message("user", asked), Message("assistant", answered))
            else:
                asked, answered = (_text(row, name, place) for name in _FIELDS[kind])
                instructions.append(Instruction(asked, _optional(row, "input", place), answered))
                conversation = instructions[-1].conversation()
        except DataError as error:
            if on_bad_row == "fail":
                raise
            skipped.append(str(error))
            continue
        rows.append(conversation)
        sources.append(source)
    if not rows or kind is None:
        reason = f"none of its {count:,} rows can be used; the first: {skipped[0]}" if count else "it has no rows."
        raise DataError(f"'{path}' holds no conversation: {reason}")
    return Conversations(kind, rows, sources, instructions, shortened, skipped)


# -- what a row says


def _kind_of(row: Any, source: str) -> Kind:
    _require_object(row, source)
    kinds = [kind for kind, names in _FIELDS.items() if all(name in row for name in names)]
    if kinds:
        return kinds[0]
    raise DataError(
        f"'{source}' is no conversation (its fields: {_names(row)}): "
        "a row has messages, or prompt and completion, or instruction, input and output."
    )


def _require_kind(row: Any, kind: Kind, source: str) -> None:
    _require_object(row, source)
    missing = [name for name in _FIELDS[kind] if name not in row]
    if missing:
        raise DataError(
            f"'{source}' has no field {missing[0]!r} (its fields: {_names(row)}), and the rows before it have {kind}. {_REMEDY}"
        )


def _require_object(row: Any, source: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"'{source}' is a JSON {_json_type(row)}, and a row of conversations is an object. {_REMEDY}")


def _from_messages(values: Any, place: str) -> tuple[Conversation, int]:
    """The turns up to the assistant's last one, and how many follow it."""
    if not isinstance(values, list):
        raise DataError(f"{place}: messages is a JSON {_json_type(values)}, and must be a list of objects. {_REMEDY}")
    messages = [_message(value, number, place) for number, value in enumerate(values, start=1)]
    for number, message in enumerate(messages[1:], start=2):
        if message.role == "system":
            raise DataError(
                f"{place}: message {number} is by the system, and a system message comes first, once. Move it there, join it "
                "with the first, or remove the row."
            )
    length = max((number for number, message in enumerate(messages, start=1) if message.role == "assistant"), default=0)
    if not length:
        raise DataError(f"{place} has no turn by the assistant, so there is nothing to learn from it. {_REMEDY}")
    return tuple(messages[:length]), len(messages) - length


def _message(value: Any, number: int, row: str) -> Message:
    place = f"{row}: message {number}"
    if not isinstance(value, Mapping):
        raise DataError(f"{place} is a JSON {_json_type(value)}, and must be an object with role and content. {_REMEDY}")
    role = value.get("role")
    if "role" in value and role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{place} is by {role!r}{near}; the roles known here are {', '.join(ROLES)}. {_REMEDY}")
    return Message(_text(value, "role", place), _text(value, "content", place))


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    """A field that must be a text."""
    if name not in row:
        raise DataError(f"{place} has no field {name!r} (its fields: {_names(row)}). {_REMEDY}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place} has a field {name!r} that is a JSON {_json_type(value)}, and must be a text. {_REMEDY}")
    if is_blank(value):
        raise DataError(f"{place} has nothing in its field {name!r}. {_REMEDY}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place} has half of a surrogate pair in its field {name!r}, at character {error.start:,}: that is no text. "
                f"{_REMEDY}"
            ) from error
    return value


def _optional(row: Mapping[str, Any], name: str, place: str) -> str:
    """A field that may be missing or empty."""
    value = row.get(name)
    return "" if value is None or (isinstance(value, str) and is_blank(value)) else _text(row, name, place)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
