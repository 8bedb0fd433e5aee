"""A conversation with a model: its history, and one reply after another as its tokens come.

    messages -> what still fits the context -> the template's prompt -> the engine -> a reply -> messages

A base model has no template. With one, all that was said so far is one text, which the model continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path

from onym.convert.sources import template_texts
from onym.data.chat_template import ChatTemplate
from onym.data.conversations import Message
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError, StorageError
from onym.format.reader import Checkpoint
from onym.generation.engine import Engine, Finish, Request
from onym.generation.sampling import Sampling
from onym.generation.write import prompt_ids, write
from onym.storage.paths import replace_file

_ROOM = 4  # of the context, a part of one in so many is left for a reply


def template_of_model(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that a model was trained with; None for a base model.

    Raises:
        ConfigError: the template has a mistake.
        CheckpointError: its file is damaged.
    """
    return ChatTemplate.of_texts(template_texts(checkpoint), tokenizer)


class Chat:
    """One conversation.

    Args:
        engine: of the model; it has nothing else to do while a reply is written.
        tokenizer: of the model.
        template: None for a base model, which continues the whole text as it stands.
        system: the system message, which comes first: what the model is.
        max_new_tokens: of a reply.
        sampling: how its tokens are chosen.
        stop: a reply ends before the first of these strings.
        stop_ids: and before one of these tokens, besides those that end a turn or a text.
        seed: for the same conversation again; each further reply's is one higher.
        note: called with a sentence where something happened that the user should know: turns that no longer fit.

    Raises:
        ConfigError: a base model has no place for a system message.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_ids: Collection[int] = (),
        seed: int | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.max_new_tokens, self.sampling, self.stop, self.seed, self._note = max_new_tokens, sampling, stop, seed, note
        ends = (tokenizer.end_of_text,) if template is None else template.stop_ids
        self.stop_ids = frozenset((*ends, *stop_ids))
        self.turns: list[Message] = []
        """What was said, in order, without the system message; what no longer fits the context included."""
        self.system = ""
        """Empty where there is none."""
        self.finish: Finish | None = None
        """How the last reply ended; None while it is written, or where it was interrupted."""
        self._seen_from, self._replies = 0, 0  # the first turn that still fits
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def set_system(self, text: str) -> None:
        """Replace the system message, from the next reply on; an empty text removes it."""
        if text and self.template is None:
            raise ConfigError("The model has no chat template, so it has no place for a system message: leave it out.")
        self.system = text

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns, self._seen_from, self._replies = [], 0, 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Say something, and take the reply in pieces. Where the iterator is closed before its end, the pieces so far are the
        reply.

        Raises:
            ConfigError: the message is no text, does not fit the context, or the template refuses it; it is not part of the
                conversation then. Before the first piece.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("The message is not valid UTF-8 text.") from error
        self.turns.append(Message("user", text))
        try:
            prompt = self._prompt()
            room = self.max_new_tokens if self.template is None else min(self.max_new_tokens, self.engine.context - len(prompt))
            seed = None if self.seed is None else self.seed + self._replies
            request = Request(prompt, room, self.sampling or Sampling(), seed, self.stop, self.stop_ids)
            tokens = write(self.engine, self.tokenizer, [request])
        except BaseException:
            self.turns.pop()
            raise
        self._replies += 1
        self.finish = None
        pieces: list[str] = []
        try:
            for token in tokens:
                self.finish = token.finish
                if token.text:
                    pieces.append(token.text)
                    yield token.text
        finally:
            self.turns.append(Message("assistant", "".join(pieces)))

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write the conversation, durably, as a row that :func:`onym.data.conversations.read_conversations` reads.

        Raises:
            ConfigError: nothing was said yet.
            StorageError: there is something at the path already and ``overwrite`` is not given, or the disk refused.
        """
        if not self.turns:
            raise ConfigError("Nothing was said yet, so there is nothing to save.")
        path = Path(path).expanduser()
        if not overwrite and (path.exists() or path.is_symlink()):
            raise StorageError(f"There is something at '{path}' already: give another name.")
        row = {"messages": [{"role": each.role, "content": each.content} for each in self.messages]}
        replace_file(path, json.dumps(row, ensure_ascii=False) + "\n")

    def _prompt(self) -> list[int]:
        """The tokens that the reply follows: of the oldest turns, as many are left out as do not fit."""
        if self.template is None:
            return prompt_ids(self.tokenizer, "".join(each.content for each in self.turns))
        context = self.engine.context
        most = context - min(self.max_new_tokens, max(1, context // _ROOM))
        system = [Message("system", self.system)] if self.system else []
        questions = [number for number, each in enumerate(self.turns) if each.role == "user" and number >= self._seen_from]
        for first in questions:
            prompt = self.template.prompt([*system, *self.turns[first:]])
            if len(prompt) <= most:
                if first > self._seen_from:
                    self._seen_from = first
                    self._note(
                        f"The conversation is longer than the model's context of {context:,} tokens: it no longer sees the "
                        f"first {first} messages."
                    )
                return prompt
        raise ConfigError(
            f"The message makes a prompt of {len(prompt):,} tokens, and in the model's context of {context:,} at most {most:,} "
            "leave room for a reply: shorten it, or the system message."
        )
