"""Chat templates: rendered as transformers renders them; no text becomes a special token; what counts is the assistant's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onym.data.chat_template import ALPACA, CHATML, INPUT_HEADING, ChatTemplate, template_of, tokenizer_config
from onym.data.conversations import Conversation, Instruction, Message
from onym.data.tokenizer import END_OF_TEXT, TURN_TOKENS, Tokenizer
from onym.errors import CheckpointError, ConfigError

EXAMPLES = settings(max_examples=170 if os.environ.get("ONYM_PROVE") else 20)  # of each of three templates

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- tools | tojson }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501  # as it is
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = [*TURN_TOKENS, "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TOKENIZER = Tokenizer.train(
    ["user assistant system the cat sat on the mat, the cat sat\n\n" * 20, "def f(x):\n    return x\n" * 20], 320
).with_special_tokens(SPECIAL)


def of_transformers(known: Tokenizer) -> PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer.from_str(known.to_json())
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|begin_of_text|>", eos_token=END_OF_TEXT)


THEIRS = of_transformers(TOKENIZER)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA_3, "qwen": QWEN}
OURS = {name: ChatTemplate(source, TOKENIZER) for name, source in TEMPLATES.items()}

USER, REPLY = Message("user", "the cat"), Message("assistant", "sat on the mat")

# Contents as they come and as an attacker writes them: markers, whole and in halves, white space around and alone.
CONTENT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [*SPECIAL, END_OF_TEXT, "<|im_", "end|>", "<|", "|>", " ", "\n", "\n\n", "\ufdd0", "{{ x }}", "cat", "🙂"]
        ),
    ),
    max_size=5,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """A system's message or none, then questions and replies; the last turn is a reply."""
    turns = [Message("system", draw(CONTENT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Message("user", draw(CONTENT)), Message("assistant", draw(CONTENT))]
    return tuple(turns)


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.content} for each in conversation]


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversation=conversations(), asks=st.booleans())
@EXAMPLES
def test_the_text_is_that_of_transformers(name: str, conversation: Conversation, asks: bool) -> None:
    said = {"chat_template": TEMPLATES[name], "tokenize": False, "add_generation_prompt": asks}
    theirs = THEIRS.apply_chat_template(as_dicts(conversation), **said)
    assert OURS[name].render(conversation, add_generation_prompt=asks) == theirs


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversation=conversations())
@EXAMPLES
def test_no_text_becomes_a_special_token_and_none_is_lost(name: str, conversation: Conversation) -> None:
    template = OURS[name]
    encoded = template.encode(conversation)
    assert TOKENIZER.decode(encoded.ids) == template.render(conversation)
    plain = tuple(Message(each.role, "cat") for each in conversation)  # the template's own tokens, and no others
    special = set(TOKENIZER.special_tokens.values())
    assert [i for i in encoded.ids if i in special] == [i for i in template.encode(plain).ids if i in special]


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversation=conversations())
@EXAMPLES
def test_a_conversation_begins_with_its_prompt(name: str, conversation: Conversation) -> None:
    template = OURS[name]
    encoded, prompt = template.encode(conversation), template.prompt(conversation[:-1])
    assert encoded.ids[: len(prompt)] == prompt
    end = encoded.ids.index(template.end_of_turn, len(prompt))
    assert encoded.counts[len(prompt) :] == [number <= end for number in range(len(prompt), len(encoded.ids))]
    content = conversation[-1].content
    assert TOKENIZER.decode(encoded.ids[len(prompt) : end]) == (content.strip() if name == "llama3" else content)


def split_as_llama() -> Tokenizer:
    """The same vocabulary, where ``\\n\\n`` is never cut; GPT-2's way to split cuts it depending on what follows."""
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return Tokenizer(inner)


LLAMA_TOKENIZER = split_as_llama()
THEIR_LLAMA = of_transformers(LLAMA_TOKENIZER)
OUR_LLAMA = ChatTemplate(LLAMA_3, LLAMA_TOKENIZER)


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.lists(st.text("the cat\n.9é🙂", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=4))
@EXAMPLES
def test_the_tokens_are_those_of_transformers(name: str, contents: list[str]) -> None:
    roles = ("user", "assistant")
    conversation = tuple(Message(roles[number % 2], content) for number, content in enumerate(contents))
    ours, theirs = (OUR_LLAMA, THEIR_LLAMA) if name == "llama3" else (OURS[name], THEIRS)
    expected = theirs.apply_chat_template(as_dicts(conversation), chat_template=ours.source, return_dict=False)
    assert ours.encode(conversation).ids == expected


def test_no_special_token_is_made_of_a_text_and_what_stands_beside_it() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.content }}><|im_end|>{% endfor %}", TOKENIZER)
    for content in ("|im_start|", "|im_start|><", "|<|im_start|>", "<|im_<|im_start|>start|>"):
        for conversation in ((Message("user", content), REPLY), (USER, Message("assistant", content))):
            assert TOKENIZER.special_tokens["<|im_start|>"] not in template.encode(conversation).ids
            assert TOKENIZER.decode(template.encode(conversation).ids) == template.render(conversation) + END_OF_TEXT


def counted(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """The texts of the spans that count."""
    encoded = template.encode(conversation)
    spans, before = list[list[int]](), False
    for token, counts in zip(encoded.ids, encoded.counts, strict=True):
        if counts and not before:
            spans.append([])
        if counts:
            spans[-1].append(token)
        before = counts
    return [template.tokenizer.decode(span) for span in spans]


def test_what_counts_is_the_reply_and_its_end() -> None:
    several = (Message("system", "x"), USER, REPLY, USER, Message("assistant", " yes \n"))
    stripped = (*several[:-1], Message("assistant", "yes \n"))
    assert counted(OURS["chatml"], several) == ["sat on the mat<|im_end|>", " yes \n<|im_end|>"]
    assert counted(OURS["llama3"], several) == ["sat on the mat<|eot_id|>", "yes<|eot_id|>"]
    assert counted(ChatTemplate(ALPACA, TOKENIZER), several) == [f"sat on the mat{END_OF_TEXT}", f" yes \n{END_OF_TEXT}"]
    assert counted(ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", TOKENIZER), stripped) == [
        "sat on the mat",
        f"yes \n\n{END_OF_TEXT}",
    ], "without a token that ends a turn, the end of the text follows"
    assert counted(ChatTemplate("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}", TOKENIZER), stripped) == [
        "sat on the mat\n<|im_end|>",
        "yes \n\n<|im_end|>",
    ], "what has to be written to reach the end counts"


def test_what_ends_a_reply() -> None:
    ids = TOKENIZER.special_tokens
    ends = {name: template.stop_ids for name, template in OURS.items()}
    turn, end = ids["<|im_end|>"], ids[END_OF_TEXT]
    assert ends == {"chatml": (turn, end), "qwen": (turn, end), "llama3": (ids["<|eot_id|>"], end)}
    assert OURS["llama3"].end_of_turn_token == "<|eot_id|>"
    assert ChatTemplate(ALPACA, TOKENIZER).stop_ids == (end,)


def test_alpaca_is_the_text_of_the_book() -> None:
    from llms_from_scratch.ch07 import format_input

    template = ChatTemplate.named("alpaca", TOKENIZER)
    for row in (Instruction("Name the opposite.", "hot", "cold"), Instruction("Say hi.", "", "hi")):
        entry = {"instruction": row.instruction, "input": row.input}
        asked, reply = row.conversation(INPUT_HEADING)
        prompt = f"{format_input(entry)}\n\n### Response:\n"
        assert template.render([asked], add_generation_prompt=True) == prompt
        assert template.render([asked, reply]) == f"{prompt}{row.output}{END_OF_TEXT}"
        assert template.encode([asked, reply]).ids[-1] == TOKENIZER.end_of_text


def test_special_tokens_that_strip_white_space_do_it_here_too() -> None:
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    inner.add_special_tokens([tokenizers.AddedToken("<|user|>", rstrip=True), tokenizers.AddedToken("<|end|>", lstrip=True)])
    known, source = Tokenizer(inner), "{% for m in messages %}<|user|>\n{{ m.content }} <|end|>\n{% endfor %}"
    conversation = (USER, REPLY)
    theirs, ours = of_transformers(known), ChatTemplate(source, known)
    expected = theirs.apply_chat_template(as_dicts(conversation), chat_template=source, return_dict=False)
    assert ours.encode(conversation).ids == expected
    assert "\n" not in known.decode(expected[:3])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}{{ m.content }", "is not valid Jinja in line 1"),
        ("{% if x %}{{ messages }}", "is not valid Jinja"),
        ("{{ raise_exception('only tools') }}", r"refuses this conversation \(user, assistant\): only tools"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses this conversation.*__class__.* unsafe"),
        ("{{ namespace(_x=1) }}", "refuses this conversation.*attribute '_x'"),
        ("{% set ns = namespace(a=1) %}{% set ns._a = 2 %}", "refuses this conversation.*attribute '_a'"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "refuses this conversation.*Range too big"),
        ("{{ 1 // 0 }}", "refuses this conversation.*zero"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ messages[7].content.x.y }}", "refuses this conversation.*no element 7"),
        ("{{ messages[0].content }}", "drops or rewrites what the assistant says"),
        ("{{ messages[1].content }}{{ messages[1].content }}", "drops or rewrites"),
    ],
)
def test_a_broken_template_is_one_sentence(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        ChatTemplate(source, TOKENIZER)
    assert "\n" not in str(error.value)


def test_a_template_that_drops_thoughts_is_refused_where_it_does() -> None:
    template = ChatTemplate(THINKING, TOKENIZER)
    thought = Message("assistant", "<think>hm</think>\nyes")
    assert counted(template, (USER, thought)) == ["<think>hm</think>\nyes<|im_end|>"]
    assert counted(template, (USER, REPLY, USER, thought))[0] == "sat on the mat<|im_end|>"
    several = (USER, thought, USER, REPLY)
    with pytest.raises(ConfigError, match="drops or rewrites"):
        template.encode(several)
    prompt = template.prompt(several[:3])  # to go on is possible
    assert TOKENIZER.decode(prompt) == template.render(several[:3], add_generation_prompt=True)


def test_a_template_that_looks_at_contents_is_refused_where_it_matters() -> None:
    source = "{% for m in messages %}{{ 'x' if m.content.startswith('!') else m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate(source, TOKENIZER)
    assert template.encode((USER, REPLY)).ids
    with pytest.raises(ConfigError, match="depending on what it says"):
        template.encode((Message("user", "!"), REPLY))


def test_marks_that_are_all_taken_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"U\+FDD0"):
        OURS["chatml"].encode((Message("user", "".join(map(chr, range(0xFDD0, 0xFDF0)))), REPLY))


def test_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(QWEN, encoding="utf-8")
    assert ChatTemplate.named(str(tmp_path / "own.jinja"), TOKENIZER).render((USER,)) == OURS["qwen"].render((USER,))
    assert ChatTemplate.named("ChatML", TOKENIZER).source == CHATML
    with pytest.raises(ConfigError, match=r"'chatlm' cannot be read.*Name chatml or alpaca"):
        ChatTemplate.named("chatlm", TOKENIZER)
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        ChatTemplate.named(str(tmp_path / "own.jinja"), TOKENIZER)
    with pytest.raises(ConfigError, match=r"ChatML needs the special tokens <\|im_start\|> and <\|im_end\|>"):
        ChatTemplate.named("chatml", Tokenizer.train(["text"], 260))


def test_generation_blocks_have_no_effect() -> None:
    source = (
        "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}<|im_end|>{% endgeneration %}{{ x }}{% endfor %}"
    )
    theirs = THEIRS.apply_chat_template(as_dicts((USER, REPLY)), chat_template=source, tokenize=False)
    assert ChatTemplate(source, TOKENIZER).render((USER, REPLY)) == theirs


def test_a_stored_template_is_found(tmp_path: Path) -> None:
    text = tokenizer_config(TOKENIZER, OURS["llama3"], 128)
    again = ChatTemplate.of_texts({"tokenizer_config.json": text}, TOKENIZER)
    assert again is not None
    assert again.source == LLAMA_3
    assert again.encode((USER, REPLY)) == OURS["llama3"].encode((USER, REPLY))
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert template_of({"tokenizer_config.json": json.dumps({"chat_template": several})}) == "y"
    assert template_of({"tokenizer_config.json": text, "chat_template.jinja": "z"}) == "z"
    assert template_of({"tokenizer_config.json": "{}"}) is template_of({}) is None
    with pytest.raises(CheckpointError, match="is not a text"):
        template_of({"tokenizer_config.json": '{"chat_template": 3}'})
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|eot_id|>"
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert theirs.apply_chat_template(as_dicts((USER,)), **asked) == OURS["llama3"].render((USER,), add_generation_prompt=True)
