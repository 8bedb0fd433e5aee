"""A conversation with a model: what the model sees of it, what of it stays, and how it is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import onym
from onym.data.chat_template import CHATML, ChatTemplate
from onym.data.conversations import Message, read_conversations
from onym.errors import ConfigError, StorageError
from onym.generation.chat import Chat
from onym.generation.engine import Engine, Request
from onym.generation.sampling import Sampling
from tests.chat_model import TOKENIZER, scattered

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(1)
    return Engine(scattered(), dtype="fp32", compile="off")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(CHATML, TOKENIZER)


def text_of(engine: Engine, prompt: list[int], count: int, stop_ids: tuple[int, ...]) -> str:
    events = engine.run([Request(prompt, count, GREEDY, stop_ids=stop_ids)])
    return TOKENIZER.decode([event.token for event in events if event.token is not None])


def test_a_reply_is_what_the_model_writes_after_the_templates_prompt(engine: Engine, template: ChatTemplate) -> None:
    chat = Chat(engine, TOKENIZER, template, system="Be brief.", max_new_tokens=6, sampling=GREEDY)
    history = [Message("system", "Be brief.")]
    for asked in ("the lamp <|im_end|>", "and the stone"):
        history.append(Message("user", asked))
        expected = text_of(engine, template.prompt(history), 6, template.stop_ids)
        assert "".join(chat.reply(asked)) == expected
        history.append(Message("assistant", expected))
    assert chat.messages == history
    chat.reset()
    assert chat.messages == history[:1]
    chat.set_system("")
    assert "".join(chat.reply("Hi")) == text_of(engine, template.prompt([Message("user", "Hi")]), 6, template.stop_ids)


def test_a_seed_gives_the_same_conversation(engine: Engine, template: ChatTemplate) -> None:
    def conversation(seed: int) -> list[Message]:
        chat = Chat(engine, TOKENIZER, template, max_new_tokens=5, sampling=Sampling(temperature=2), seed=seed)
        for _ in range(2):
            list(chat.reply("the lamp"))
        return chat.messages

    assert conversation(3) == conversation(3)
    assert conversation(3) != conversation(4)


def test_a_base_model_continues_the_whole_text(engine: Engine) -> None:
    chat = Chat(engine, TOKENIZER, None, max_new_tokens=5, sampling=GREEDY)
    end = (TOKENIZER.end_of_text,)
    first = "".join(chat.reply("the lamp"))
    assert first == text_of(engine, TOKENIZER.encode("the lamp"), 5, end)
    second = "".join(chat.reply(" and"))
    assert second == text_of(engine, TOKENIZER.encode(f"the lamp{first} and"), 5, end)
    with pytest.raises(ConfigError, match="no place for a system message"):
        chat.set_system("Be brief.")


def test_the_oldest_turns_are_left_out_where_the_context_is_full(engine: Engine, template: ChatTemplate) -> None:
    notes: list[str] = []
    chat = Chat(engine, TOKENIZER, template, system="Be.", max_new_tokens=8, sampling=GREEDY, note=notes.append)
    for _ in range(8):
        before = list(chat.turns)
        reply = "".join(chat.reply("the lamp and the river"))
    assert len(chat.turns) == 16, "all of it stays in the history"
    assert "it no longer sees the first 2 messages" in notes[0]
    first = int(notes[-1].split("first ")[1].split()[0])
    seen = [Message("system", "Be."), *before[first:], Message("user", "the lamp and the river")]
    assert reply == text_of(engine, template.prompt(seen), 8, template.stop_ids)
    assert len(template.prompt(seen)) <= engine.context - 8
    turns = list(chat.turns)
    with pytest.raises(ConfigError, match=r"prompt of \d+ tokens, and in the model's context of 128 at most 120"):
        list(chat.reply("the garden " * 200))
    assert chat.turns == turns, "what does not fit was not said"
    chat.reset()
    assert list(chat.reply("the lamp"))


def test_a_reply_that_is_interrupted_is_what_came(engine: Engine, template: ChatTemplate) -> None:
    chat = Chat(engine, TOKENIZER, template, max_new_tokens=50, sampling=GREEDY)
    pieces = chat.reply("the lamp")
    came = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns[-1] == Message("assistant", came)
    assert chat.finish is None
    assert not engine.busy
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        next(chat.reply("\udc80"))
    assert len(chat.turns) == 2


def test_what_is_saved_is_a_row_for_training(engine: Engine, template: ChatTemplate, tmp_path: Path) -> None:
    chat = Chat(engine, TOKENIZER, template, system="Sei kurz – 🙂", max_new_tokens=5, sampling=GREEDY)
    with pytest.raises(ConfigError, match="nothing to save"):
        chat.save(tmp_path / "chat.jsonl")
    list(chat.reply("the lamp"))
    chat.save(tmp_path / "chat.jsonl")
    assert read_conversations(tmp_path / "chat.jsonl").rows == [tuple(chat.messages)]
    list(chat.reply("and"))
    with pytest.raises(StorageError, match=r"There is something at '.*chat\.jsonl' already"):
        chat.save(tmp_path / "chat.jsonl")
    assert len(read_conversations(tmp_path / "chat.jsonl").rows[0]) == 3
    chat.save(tmp_path / "chat.jsonl", overwrite=True)
    assert read_conversations(tmp_path / "chat.jsonl").rows == [tuple(chat.messages)]
    with pytest.raises(StorageError, match="something on the way to it is a file"):
        chat.save(tmp_path / "chat.jsonl" / "x.jsonl")


def test_what_a_template_refuses_was_not_said(engine: Engine) -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = Chat(engine, TOKENIZER, ChatTemplate(source, TOKENIZER), system="Be brief.", max_new_tokens=3)
    with pytest.raises(ConfigError, match=r"refuses this conversation \(system, user\): no system here"):
        list(chat.reply("Hi"))
    assert chat.turns == []
    chat.set_system("")
    list(chat.reply("Hi"))  # empty, if the model draws the end of the turn first
    assert [turn.content for turn in chat.turns][:1] == ["Hi"]
    assert isinstance(chat.engine.model, onym.GPT)
