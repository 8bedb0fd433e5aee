"""/v1/completions and chat: what the engine writes, in the shape that clients read; streamed and whole are the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onym
from onym.data.chat_template import CHATML, ChatTemplate
from onym.data.conversations import Message
from onym.generation.opening import open_model
from tests import chat_model
from tests.serve.serving import Server, wait_for


def test_the_text_is_that_of_the_engine(served: Server, runs_folder: Path) -> None:
    """Eight slots there and one here: the same tokens, where logits are far apart."""
    answer = served.complete(model="talker", prompt="the lamp", max_tokens=20, temperature=0, return_token_ids=True)
    tokens = list(
        onym.generate(runs_folder / "talker", "the lamp", max_new_tokens=20, temperature=0, dtype="fp32", compile="off")
    )
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [token.id for token in tokens]
    assert choice["text"] == "".join(token.text for token in tokens)
    assert answer["usage"] == {
        "prompt_tokens": len(choice["prompt_token_ids"]),
        "completion_tokens": 20,
        "total_tokens": len(choice["prompt_token_ids"]) + 20,
    }
    assert choice["finish_reason"] == "length"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=4),
    prompt=st.text(max_size=12),
    bias=st.sampled_from([None, {str(token): 100 for token in range(130, 258)}]),  # bytes that are parts of characters alone
)
def test_streamed_and_whole_texts_are_equal(
    served: Server, seed: int, stops: list[str], prompt: str, bias: dict[str, int] | None
) -> None:
    body: dict[str, Any] = {
        "model": "talker",
        "prompt": prompt,
        "max_tokens": 24,
        "seed": seed,
        "stop": stops,
        "logit_bias": bias,
    }
    (whole,) = served.complete(**body, logprobs=1)["choices"]
    chunks = [chunk["choices"][0] for chunk in served.stream(**body, logprobs=1)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["finish_reason"]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "top_token_ids"):
        assert [each for chunk in chunks if chunk["logprobs"] for each in chunk["logprobs"][name]] == whole["logprobs"][name]
    assert not any(stop in whole["text"] for stop in stops)
    plain = "".join(chunk["choices"][0]["text"] for chunk in served.stream(**body))
    assert plain == whole["text"]


def test_a_seed_gives_the_same_text_whatever_is_written_beside_it(served: Server) -> None:
    body: dict[str, Any] = {"model": "talker", "prompt": "the river", "max_tokens": 30, "seed": 11}
    alone = served.complete(**body)["choices"][0]["text"]
    beside = [served.begin(model="talker", prompt=f"{number} stones", max_tokens=100, seed=number) for number in range(12)]
    assert served.complete(**body)["choices"][0]["text"] == alone
    for connection in beside:
        connection.close()
    assert served.complete(**body, n=3)["choices"][0]["text"] == alone
    served.wait_until_idle()


def test_several_prompts_and_samples_come_in_order(served: Server) -> None:
    body: dict[str, Any] = {"model": "talker", "max_tokens": 12, "seed": 5}
    prompts = ["the lamp", [100, 101, 102], "the garden"]
    answer = served.complete(**body, prompt=prompts, n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 6
    streamed = [""] * 6
    for chunk in served.stream(**body, prompt=prompts, n=2):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    for place, prompt in enumerate(prompts):  # the seed of each is one higher than of the one before
        alone = served.complete(**{**body, "seed": 5 + 2 * place}, prompt=prompt)
        assert alone["choices"][0]["text"] == texts[2 * place]


def test_echo_scores_the_prompt(served: Server, runs_folder: Path) -> None:
    """What lm-eval asks for: each token of the prompt with its log-probability, and one more at the end."""
    text = "the lamp and the river, the stone"
    (choice,) = served.complete(model="talker", prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0)["choices"]
    logprobs = choice["logprobs"]
    ids = chat_model.TOKENIZER.encode(text)
    assert choice["text"].startswith(text)
    assert logprobs["token_ids"][:-1] == ids
    assert logprobs["token_logprobs"][0] is None
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    model = open_model(runs_folder / "talker").model
    with torch.no_grad():
        every = model(torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)
    expected = every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs["token_logprobs"][1:-1]), expected, atol=1e-4, rtol=0)
    likeliest = torch.tensor([max(best.values()) for best in logprobs["top_logprobs"][1:-1]])
    torch.testing.assert_close(likeliest, every.max(dim=-1).values, atol=1e-4, rtol=0)
    for logprob, best in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert max(best.values()) >= logprob
        assert logprob in best.values()
    (scored,) = served.complete(model="talker", prompt=text, max_tokens=0, echo=True, logprobs=1)["choices"]
    assert scored["text"] == text
    assert scored["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]


def test_a_token_that_ends_the_text_is_reported_and_adds_no_text(served: Server) -> None:
    end = chat_model.TOKENIZER.end_of_text
    body: dict[str, Any] = {"model": "talker", "prompt": "the", "max_tokens": 5, "logit_bias": {str(end): 100}, "logprobs": 2}
    answer = served.complete(**body)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["token_ids"] == [end]
    assert answer["usage"]["completion_tokens"] == 0
    assert len(served.complete(**body, ignore_eos=True, return_token_ids=True)["choices"][0]["token_ids"]) == 5
    (stopped,) = served.complete(**{**body, "logit_bias": {"100": 100}}, stop_token_ids=[100])["choices"]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


def test_a_text_longer_than_the_context_is_refused_or_slides(served: Server) -> None:
    body: dict[str, Any] = {"model": "talker", "prompt": "the lamp " * 100, "max_tokens": 10}
    answer = served.post("/v1/completions", body)
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    assert str(chat_model.CONTEXT) in answer.error["message"]
    assert str(len(chat_model.TOKENIZER.encode("the lamp " * 100))) in answer.error["message"]
    assert served.complete(**body, slide=True)["usage"]["completion_tokens"] == 10
    long = served.post("/v1/completions", {"model": "talker", "prompt": "the", "max_tokens": 10**9})
    assert (long.status, long.error["code"], long.error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert served.post("/v1/completions", {"model": "talker", "max_tokens": 10**9, "slide": True}).status == 400
    without = served.complete(model="talker", prompt="the lamp", logit_bias={str(chat_model.TOKENIZER.end_of_text): -100})
    assert without["usage"]["total_tokens"] == chat_model.CONTEXT


def test_a_conversation_is_answered_by_the_template(served: Server) -> None:
    messages = [{"role": "system", "content": "the lamp"}, {"role": "user", "content": [{"type": "text", "text": "the river"}]}]
    body: dict[str, Any] = {
        "model": "talker",
        "messages": messages,
        "max_tokens": 20,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = served.post("/v1/chat/completions", body).json
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    prompt = open_prompt(messages[0]["content"], "the river")
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    (text,) = served.complete(model="talker", prompt=prompt, max_tokens=20, seed=3, stop_token_ids=end_of_turn())["choices"]
    assert text["text"] == choice["message"]["content"]
    chunks = list(served.stream("/v1/chat/completions", **body, stream_options={"include_usage": True}))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == text["text"]
    assert chunks[-1]["usage"] == answer["usage"]
    content = choice["logprobs"]["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    assert [each for chunk in chunks[:-1] for each in chunk["choices"][0]["logprobs"]["content"]] == content


def open_prompt(system: Any, user: str) -> list[int]:
    return ChatTemplate(CHATML, chat_model.TOKENIZER).prompt([Message("system", system), Message("user", user)])


def end_of_turn() -> list[int]:
    return [chat_model.TOKENIZER.special_tokens["<|im_end|>"]]


def test_a_model_without_a_template_does_not_converse(served: Server) -> None:
    answer = served.post("/v1/chat/completions", {"model": "first", "messages": [{"role": "user", "content": "x"}]})
    assert answer.status == 404
    assert "chat template" in answer.error["message"]


def test_runs_and_their_steps_are_opened_when_they_are_asked_for(served: Server) -> None:
    texts = {
        name: served.complete(model=name, prompt="the lamp was", max_tokens=20, temperature=0)["choices"][0]["text"]
        for name in ("first", "first@10", "first@30")
    }
    assert texts["first"] == texts["first@30"] != texts["first@10"]
    listed = {model["id"]: model for model in served.get("/v1/models").json["data"]}
    assert set(listed) == {"talker", "first"}
    assert (listed["first"]["step"], listed["first"]["run"], listed["first"]["chat"]) == (30, "first", False)
    assert listed["talker"]["chat"] is True
    assert served.get("/v1/models/first").json == listed["first"]
    for name in ("fist", "first@11", "first@latest", "../first", "first@", "@10", "a" * 301, "talker/../first"):
        answer = served.post("/v1/completions", {"model": name})
        assert answer.status in (400, 404), name
        assert answer.error["param"] == "model"


BAD: dict[str, list[Any]] = {
    "temperature": [-1, "warm", True, 1e9],
    "top_p": [0, 1.5],
    "top_k": [-2, 1.5],
    "min_p": [2],
    "repetition_penalty": [0, 1e-300],
    "presence_penalty": ["x"],
    "logit_bias": [[1], {"a": 1}, {"1": 1000}, {"100000": 1}],
    "seed": [2**63, 1.5],
    "stop": [3, ["a"] * 5, [""], "", ["x" * 1001]],
    "n": [0, 129, True],
    "logprobs": [21, -1],
    "max_tokens": [-1, 0, "many"],
    "prompt": [[10**4000], [], [""] * 129, [["a"]], [1, "a"], [[]], {"text": "a"}, [-1], [10**9], "\ud800"],
    "stream": ["yes"],
    "stream_options": [True],
    "suffix": ["after"],
    "best_of": [3],
    "response_format": [{"type": "json_object"}],
    "model": [7, ""],
}


@pytest.mark.parametrize("name", BAD)
def test_a_field_that_cannot_be_is_one_sentence(served: Server, name: str) -> None:
    for value in BAD[name]:
        body = {"model": "talker", "prompt": "the", "max_tokens": 2, name: value}
        answer = served.post("/v1/completions", body)
        assert answer.status == 400, (name, value)
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["param"] in (name, "prompt"), answer.error


BAD_MESSAGES: list[Any] = [
    *(None, [], "hello", [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"content": "x"}], [7]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": "x " * 500}],
    [{"role": "user", "content": "\ud800"}],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES)
def test_a_conversation_that_cannot_be_is_one_sentence(served: Server, messages: Any) -> None:
    answer = served.post("/v1/chat/completions", {"model": "talker", "messages": messages})
    assert answer.status == 400
    assert answer.error["message"]


def test_fields_that_ask_for_nothing_are_accepted_and_unknown_ones_reported_once(served: Server) -> None:
    nothing = {"user": "me", "best_of": 1, "suffix": None, "response_format": {"type": "text"}, "tools": [], "top_k": -1}
    for _ in range(2):
        served.complete(model="talker", prompt="a secret prompt", max_tokens=1, sparkle=3, **nothing)
    assert served.log.count("'sparkle'") == 1
    assert "secret prompt" not in served.log


def test_tokens_and_text(served: Server) -> None:
    tokens = served.post("/tokenize", {"model": "talker", "prompt": "the lamp ☃", "add_special_tokens": False}).json
    assert tokens["tokens"] == chat_model.TOKENIZER.encode("the lamp ☃")
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), chat_model.CONTEXT)
    assert served.post("/detokenize", {"model": "talker", "tokens": tokens["tokens"]}).json == {"prompt": "the lamp ☃"}
    end = served.post("/tokenize", {"model": "talker", "prompt": "<|endoftext|>"}).json["tokens"]
    assert end == [chat_model.TOKENIZER.end_of_text]
    within = served.post("/tokenize", {"model": "talker", "prompt": "the <|endoftext|>"}).json["tokens"]
    assert end[0] not in within
    assert served.post("/detokenize", {"tokens": [320]}).status == 400
    assert served.post("/tokenize", {"prompt": "\ud800"}).status == 400
    info = served.get("/tokenizer_info").json
    assert (info["eos_token"], info["chat_template"]) == ("<|im_end|>", CHATML)


def test_a_client_that_leaves_ends_its_text(runs_folder: Path, tmp_path: Path) -> None:
    """Running or in the queue. All of them would take many times as long as is waited for."""
    with Server(tmp_path, runs_folder / "talker", "--slots", "1", "--queue", "39") as server:
        endless = {"max_tokens": 32_000, "slide": True, "ignore_eos": True, "n": 10}
        connections = [server.begin(**endless) for _ in range(4)]
        wait_for(lambda: server.metric("onym_requests_waiting") == 39, "a full queue")
        assert server.metric("onym_requests_running") == 1
        for connection in reversed(connections):
            connection.close()
        server.wait_until_idle()
        assert server.metric("onym_requests_cancelled_total") == 4


def test_a_request_with_strange_settings_ends_no_other_text(served: Server) -> None:
    """Every setting that is accepted keeps logits finite: what is not would end the texts beside it."""
    body: dict[str, Any] = {"model": "talker", "prompt": "the river", "max_tokens": 60, "seed": 7}
    alone = served.complete(**body)["choices"][0]["text"]
    chunks = served.stream(**body)
    begun = [next(chunks)]
    for strange in ({"repetition_penalty": 0.01}, {"temperature": 1e-40}, {"presence_penalty": -100, "top_p": 1e-9}):
        assert served.complete(model="talker", prompt="the river", max_tokens=8, **strange)["usage"]
    assert "".join(chunk["choices"][0]["text"] for chunk in [*begun, *chunks]) == alone
