"""``onym chat``: by a pipe, at a terminal, and what it cannot do."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import onym
from onym.cli import chat as command
from onym.cli.main import main
from onym.data.chat_template import CHATML
from onym.data.conversations import Message, read_conversations
from tests.chat_model import TOKENIZER, save, scattered

Chat = Callable[..., tuple[int, str, str]]
QUICK = ("--max-new-tokens", 6, "--seed", 1, "--dtype", "fp32", "--compile", "off")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("chat")
    save(folder / "run", CHATML, scattered())
    return folder / "run"


@pytest.fixture
def chat(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    """The command with lines from a pipe."""

    def run(lines: str | bytes, *options: object, path: Path = model) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        content = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        code = main(["chat", *map(str, (path, *QUICK, *options))])
        out, error = capsys.readouterr()
        return code, out, error

    return run


@pytest.fixture
def terminal(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    """The command at a terminal, at which somebody has typed these lines, and then Ctrl-D."""

    def run(typed: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        keyboard, screen = os.openpty()
        try:
            os.write(keyboard, typed.encode() + b"\x04")
            with os.fdopen(screen, encoding="utf-8") as stdin:
                monkeypatch.setattr(sys, "stdin", stdin)
                code = main(["chat", *map(str, (model, *QUICK, *options))])
        finally:
            os.close(keyboard)
        out, error = capsys.readouterr()
        return code, out, error

    return run


def test_a_pipe_gives_a_reply_a_line(chat: Chat, tmp_path: Path) -> None:
    code, out, error = chat("the lamp\n\n/system Be brief.\nand\n//quit\n/save talk.jsonl\n/quit\nnever read\n")
    assert (code, error.count("Saved to 'talk.jsonl'.")) == (0, 1)
    (row,) = read_conversations(tmp_path / "talk.jsonl").rows
    assert [each.content for each in row if each.role != "assistant"] == ["Be brief.", "the lamp", "and", "/quit"]
    assert out == "".join(f"{each.content}\n" for each in row if each.role == "assistant")
    assert "The reply was cut: --max-new-tokens is 6, the context 128." in error
    assert out.startswith(chat("the lamp")[1]), "the same seed, the same reply"


def test_what_is_typed_besides_messages(terminal: Chat, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    typed = "/help\nthe lamp\n/save there.jsonl\n/save\n/svae x\n/reset\n/save! x.jsonl\nand\n/system\n/save! there.jsonl\n"
    code, out, error = terminal(typed, "--system", "Be brief.")
    assert code == 0
    assert out.endswith("> \n"), "Ctrl-D leaves a clean line"
    for said in (
        "/reset         forget",
        "onym: There is something at 'there.jsonl' already",
        "onym: /save needs the name of a file.",
        "onym: There is no command '/svae' (did you mean '/save'?): /help lists them.",
        "Forgotten.",
        "onym: Nothing was said yet",
        "There is no system message now.",
        "Saved to 'there.jsonl'.",
    ):
        assert said in error
    (row,) = read_conversations(tmp_path / "there.jsonl").rows
    assert row[0] == Message("user", "and")
    assert not (tmp_path / "x.jsonl").exists()


def test_ctrl_c_stops_a_reply_and_nothing_else(terminal: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put, pieces = command._put, list[str]()

    def pressed(text: str) -> None:
        put(text)
        pieces.append(text)
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "_put", pressed)
    code, _, _ = terminal("the lamp\n/save talk.jsonl\n", "--max-new-tokens", 100)
    assert code == 0
    assert read_conversations(tmp_path / "talk.jsonl").rows[0][1].content == "".join(pieces[:2])
    assert pieces[2] == "\n"


def test_a_base_model_says_what_it_does(chat: Chat, tmp_path: Path) -> None:
    onym.save(scattered(), tmp_path / "base")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    options = ("--tokenizer", tmp_path / "tokenizer.json")
    code, out, error = chat("the lamp\n", *options, path=tmp_path / "base")
    assert code == 0
    assert len(out) > 3
    assert "The model has no chat template: it was not taught to converse. It continues your text as it stands." in error
    assert "--max-new-tokens" not in error
    code, _, error = chat("the lamp\n", *options, "--system", "Be brief.", path=tmp_path / "base")
    assert (code, "no place for a system message" in error) == (2, True)
    code, _, error = chat("the lamp\n", *options, "--chat-template", "chatml", path=tmp_path / "base")
    assert (code, "no chat template" in error) == (0, False)


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ("/sytem x\n", (), "There is no command '/sytem' (did you mean '/system'?)"),
        (b"\xff\n", (), "Line 1 of standard input is not UTF-8 text."),
        ("the garden " * 200, (), "shorten it"),
        ("x", ("--chat-template", "chatlm"), "The chat template 'chatlm' cannot be read"),
        ("x", ("--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        ("x", ("--temperature", -1), "--temperature must be 0 or more"),
        ("x", ("--tokenizer", "gone.json"), "There is no tokenizer file 'gone.json'"),
        ("x", ("--step", 7), "7"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(chat: Chat, lines: str | bytes, options: tuple[object, ...], said: str) -> None:
    code, out, error = chat(lines, *options)
    assert (code, out) == (2, "")
    assert said in error
    assert len(error.strip().splitlines()) == 1
