"""A chat template: a conversation -> the tokens that a model sees, and which of them are the assistant's.

The template is Jinja, as in everybody's ``tokenizer_config.json``, and is rendered as transformers' ``apply_chat_template``
does (transformers/utils/chat_template_utils.py; tests/data/test_chat_template.py compares). Two things are done that rendering
alone does not do:

- **No text becomes a special token.** Those of the template are inserted by id; one that is spelled out in a message is text.
- **It is known which tokens are the assistant's**: its words, and the token that ends its turn.

Both rest on noncharacters of Unicode, which no text contains: before rendering, they are put around the content of each message
and into each special token's name in it; after it they are looked for, and removed. That a template renders the same with them
as without is checked for each conversation.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from onym.data.conversations import Message
from onym.data.tokenizer import TURN_TOKENS, Tokenizer
from onym.errors import CheckpointError, ConfigError
from onym.format.manifest import parse_json

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's ChatML: every turn between two special tokens. What a model is taught where it has no template of its own."""
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}"
    "{% endif %}"
    "{{ '### Instruction:\\n' + message['content'] }}"
    "{% else %}{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
"""Stanford Alpaca's, as in chapter 7 of the book; each reply ends with the end-of-text token."""
INPUT_HEADING = "### Input:\n"
"""What the book puts before the input of a row, for :meth:`onym.data.conversations.Conversations.conversations`."""
NAMED = {"chatml": CHATML, "alpaca": ALPACA}

CONFIG, JINJA = "tokenizer_config.json", "chat_template.jinja"
_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens."""

    ids: list[int]
    counts: list[bool]
    """Of each token, whether it is the assistant's: a word of a reply, or the token that ends one."""


class _Marks(NamedTuple):
    """Three noncharacters that a conversation does not contain."""

    apart: str
    """Inside the name of a special token, and around contents: no special token reaches over it."""
    begin: str
    """Before the first character of an assistant's content that is no white space."""
    end: str


class _Segment(NamedTuple):
    """A part of the rendered text that is encoded by itself."""

    start: int
    end: int
    token: int | None
    """Of a special token, its id."""


class ChatTemplate:
    """A template, with the tokenizer of the model.

    Args:
        source: Jinja.
        tokenizer: of the model; it has the special tokens that the template writes.
        special: the texts of ``bos_token``, ``eos_token`` and others that the template may name; by default the tokenizer's
            end-of-text token, and its begin-of-text token where it has one.

    Raises:
        ConfigError: the template has a mistake, or fails for a question and its answer.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, special: Mapping[str, str] | None = None) -> None:
        self.source, self.tokenizer = source, tokenizer
        end = tokenizer.end_of_text_token
        begin = next((token for token in _BEGINNINGS if token in tokenizer.special_tokens), end)
        self.special: dict[str, str] = {"bos_token": begin, "eos_token": end, **(special or {})}
        """What the template may call by these names."""
        tokens = {**tokenizer.special_tokens, end: tokenizer.end_of_text}
        # One of a single character could not be distinguished from text.
        self._of_text = {name: number for name, number in tokens.items() if len(name) > 1}
        names = sorted(self._of_text, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._stripped = tokenizer.special_tokens_that_strip
        self._template = _compiled(source)
        self.end_of_turn, self.end_of_turn_token = self._find_end_of_turn()
        """The token that ends a reply, and its text; the end-of-text token where the template writes none."""
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.end_of_turn, tokenizer.end_of_text)))
        """The tokens that end a reply."""

    @classmethod
    def named(cls, name: str, tokenizer: Tokenizer) -> ChatTemplate:
        """``"chatml"``, ``"alpaca"``, or the template in a file.

        Raises:
            ConfigError: there is no such template, or it has a mistake.
        """
        if name.lower() == "chatml" and (missing := [each for each in TURN_TOKENS if each not in tokenizer.special_tokens]):
            raise ConfigError(
                f"ChatML needs the special tokens {' and '.join(missing)}, which the tokenizer lacks: add them with "
                "Tokenizer.with_special_tokens, or take another template."
            )
        if name.lower() in NAMED:
            return cls(NAMED[name.lower()], tokenizer)
        path = Path(name).expanduser()
        try:
            return cls(path.read_text(encoding="utf-8"), tokenizer)
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
            raise ConfigError(
                f"The chat template '{name}' {reason}. Name {' or '.join(NAMED)}, or a file with a Jinja template."
            ) from error

    @classmethod
    def of_texts(cls, texts: Mapping[str, str], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a model, from the texts beside its weights by file name; None where it has none.

        Raises:
            ConfigError: it has a mistake.
            CheckpointError: ``tokenizer_config.json`` is damaged.
        """
        source = template_of(texts)
        return None if source is None else cls(source, tokenizer, named_tokens(texts))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text that transformers' ``apply_chat_template(tokenize=False)`` gives.

        Raises:
            ConfigError: the template fails for this conversation.
        """
        return self._render([message.content for message in messages], messages, add_generation_prompt)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The tokens of a whole conversation, which begin with those of :meth:`prompt` for all turns before the last reply.

        Where the template writes no special token after the last reply, the end of text follows, and counts.

        Raises:
            ConfigError: the template fails for this conversation, or changes what its messages say.
        """
        return self._encode(messages, add_generation_prompt=False)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that a reply follows.

        Raises:
            ConfigError: as :meth:`encode`.
        """
        return self._encode(messages, add_generation_prompt=True).ids

    # -- rendering

    def _render(self, contents: Sequence[str], messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": each.role, "content": content} for each, content in zip(messages, contents, strict=True)]
        values = {"messages": turns, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return str(self._template.render(**self.special, **values))
        except Exception as error:  # a template is a program, and may raise anything
            raise ConfigError(
                f"The chat template refuses this conversation ({', '.join(each.role for each in messages) or 'no messages'}): "
                f"{_sentence(error)}. Correct the conversation, or take another template."
            ) from error

    def _find_end_of_turn(self) -> tuple[int, str]:
        probe = (Message("system", "a"), Message("user", "b"), Message("assistant", "c"))
        try:
            encoded = self._encode(probe[1:], add_generation_prompt=False)
        except ConfigError as error:
            try:  # some want a system message
                encoded = self._encode(probe, add_generation_prompt=False)
            except ConfigError:
                raise error from error.__cause__
        token = [token for token, counts in zip(encoded.ids, encoded.counts, strict=True) if counts][-1]
        return token, next(
            (name for name, number in self._of_text.items() if number == token), self.tokenizer.end_of_text_token
        )

    # -- encoding

    def _encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Encoded:
        marks = self._marks_for(messages)
        marked = self._render([self._marked(each, marks) for each in messages], messages, add_generation_prompt)
        text, special, replies = self._without_marks(marked, marks)
        if text != self.render(messages, add_generation_prompt=add_generation_prompt):
            raise ConfigError(
                "The chat template does other things with a message depending on what it says, so its special tokens cannot be "
                "distinguished from text: change the message, or take another template."
            )
        assistants = [number for number, each in enumerate(messages) if each.role == "assistant"]
        if replies is None or len(replies) != len(assistants):
            if add_generation_prompt:  # nobody asks which tokens are the assistant's
                assistants, replies = [], []
            else:
                raise ConfigError(
                    "The chat template drops or rewrites what the assistant says in this conversation, so which tokens are the "
                    "assistant's is not known: take another template, or leave out what it rewrites."
                )
        spans, is_closed = list[tuple[int, int]](), False
        for number, (start, end) in zip(assistants, replies, strict=True):
            following = next((each for each in special if each.start >= end), None)
            place = following.start if following else len(text)
            is_closed = False
            if not text[end:place].strip():  # white space before the token that ends the turn has to be written to reach it
                end, is_closed = (following.end, True) if following else (place, False)
            spans.append((self._begin(text, messages, number, start), end))
        ids, counts = list[int](), list[bool]()
        for segment in _segments(len(text), special, spans):
            tokens = self._tokens_of(text, segment, special)
            ids += tokens
            counts += [any(start <= segment.start < end for start, end in spans)] * len(tokens)
        if not add_generation_prompt and messages and messages[-1].role == "assistant" and not is_closed:
            ids.append(self.tokenizer.end_of_text)
            counts.append(True)
        return Encoded(ids, counts)

    def _marks_for(self, messages: Sequence[Message]) -> _Marks:
        text = "".join([self.source, *(each.content for each in messages)])
        free = _NONCHARACTERS if text.isascii() else [mark for mark in _NONCHARACTERS if mark not in text]
        if len(free) < 3:
            raise ConfigError("The conversation has the noncharacters U+FDD0 to U+FDEF in it, which are no text: remove them.")
        return _Marks(*free[:3])

    def _marked(self, message: Message, marks: _Marks) -> str:
        """The content with marks around it, inside its outer white space, which templates may strip."""
        content = message.content
        while self._names.search(content):  # again, where two names overlap
            content = self._names.sub(lambda found: found[0][0] + marks.apart + found[0][1:], content)
        core = content.strip()
        before, core, after = content.partition(core) if core else (content, "", "")
        if message.role == "assistant":
            core = marks.begin + core + marks.end
        elif core:
            core = marks.apart + core + marks.apart
        return before + core + after

    def _without_marks(self, marked: str, marks: _Marks) -> tuple[str, list[_Segment], list[tuple[int, int]] | None]:
        """The rendered text; the special tokens in it; and where the assistant's contents are, in order, or None where one is
        not there as a whole."""
        parts, length, special = list[str](), 0, list[_Segment]()
        places = list[tuple[str, int]]()
        for part in re.split(f"([{''.join(marks)}]|{self._names.pattern})", marked):
            if part in (marks.begin, marks.end):
                places.append((part, length))
            elif part and part != marks.apart:
                if (token := self._of_text.get(part)) is not None:
                    special.append(_Segment(length, length + len(part), token))
                parts.append(part)
                length += len(part)
        begins, ends = places[::2], places[1::2]
        whole = [mark for mark, _ in begins] == [marks.begin] * len(ends) and {mark for mark, _ in ends} <= {marks.end}
        replies = [(start, end) for (_, start), (_, end) in zip(begins, ends, strict=True)] if whole else None
        return "".join(parts), special, replies

    def _begin(self, text: str, messages: Sequence[Message], number: int, mark: int) -> int:
        """Where the reply of a message begins, its leading white space included as far as the template leaves it."""
        content = messages[number].content
        if leading := len(content) - len(content.lstrip()):
            with suppress(ConfigError):  # a template that renders no conversation so short
                before = self.render(messages[:number], add_generation_prompt=True)
                if text.startswith(before) and mark - leading <= len(before) <= mark:
                    return len(before)
        return mark

    def _tokens_of(self, text: str, segment: _Segment, special: Sequence[_Segment]) -> list[int]:
        if segment.token is not None:
            return [segment.token]
        piece = text[segment.start : segment.end]
        for each in special if self._stripped else ():  # such a token takes the white space beside it
            before, after = self._stripped.get(each.token or 0, (False, False))
            if after and each.end == segment.start:
                piece = piece.lstrip()
            if before and each.start == segment.end:
                piece = piece.rstrip()
        return self.tokenizer.encode(piece) if piece else []


def _segments(length: int, special: Sequence[_Segment], spans: Sequence[tuple[int, int]]) -> Iterator[_Segment]:
    """The text cut at special tokens, and where replies begin and end."""
    cuts = {0, length, *(place for start, end in spans for place in (start, end))}
    cuts |= {place for each in special for place in (each.start, each.end)}
    tokens = {each.start: each.token for each in special}
    for start, end in pairwise(sorted(cuts)):
        yield _Segment(start, end, tokens.get(start))


# -- files


def template_of(texts: Mapping[str, str]) -> str | None:
    """The template in the texts beside a model's weights, by file name; of several by name, the one called default.

    Raises:
        CheckpointError: ``tokenizer_config.json`` is damaged.
    """
    if (text := texts.get(JINJA)) is not None:
        return text
    template = _settings(texts).get("chat_template")
    if isinstance(template, list):  # several by name
        template = next(
            (each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"chat_template in {CONFIG} is not a text.")
    return template


def tokenizer_config(tokenizer: Tokenizer, template: ChatTemplate | None, context_length: int) -> str:
    """The text of a ``tokenizer_config.json``. With a template, its ``eos_token`` is what ends a turn, so that every program
    stops there."""
    end = tokenizer.end_of_text_token
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    if template is not None:
        special |= {**template.special, "eos_token": template.end_of_turn_token}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": template.source} if template is not None else {}),
    }
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def _settings(texts: Mapping[str, str]) -> Mapping[str, Any]:
    values = parse_json(texts.get(CONFIG, "{}"), CONFIG)
    return values if isinstance(values, dict) else {}


def named_tokens(texts: Mapping[str, str]) -> dict[str, str]:
    """The special tokens that the ``tokenizer_config.json`` of these texts names, by what they are for, as ``eos_token``.

    Raises:
        CheckpointError: it is damaged.
    """
    settings, named = _settings(texts), dict[str, str]()
    for name in _SPECIAL:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value  # a text, or an object with its content
        if isinstance(value, str):
            named[name] = value
    return named


# -- Jinja


def _compiled(source: str) -> Any:
    try:
        return _environment().from_string(source)
    except Exception as error:  # TemplateSyntaxError and its like; a RecursionError for one that is nested too deep
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if line else ""
        raise ConfigError(f"The chat template is not valid Jinja{place}: {_sentence(error)}. Correct it.") from error


@functools.cache
def _environment() -> Any:
    """As transformers makes it."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` … ``{% endgeneration %}``, by which some templates mark replies; here it has no effect."""

        tags = {"generation"}  # noqa: RUF012  # as the base class declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        """A namespace that takes no names that lead into Python."""

        def __init__(*given: Any, **named: Any) -> None:  # without a name for self: namespace(self=…) is legal
            for name in dict(*given[1:], **named):
                _require_plain(name)
            Namespace.__init__(*given, **named)

        def __setitem__(self, name: str, value: Any) -> None:
            _require_plain(name)
            super().__setitem__(name, value)

    def _require_plain(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": PlainNamespace}
    return environment


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
