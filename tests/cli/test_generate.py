"""``onym generate``: several texts, JSON, stops, and what cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import onym
from onym.cli.main import main
from onym.data.tokenizer import Tokenizer
from tests.conftest import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the lamp was lit and the cat sat on the mat " * 9], 290)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = onym.GPTConfig(**{**TINY.to_dict(), "vocab_size": tokenizer.vocab_size})
    made = onym.GPT(config)
    with torch.no_grad():
        made.out_head.weight.mul_(4)  # logits so far apart that rounding them shows
    onym.save(made, path)
    (path.parent / "tokenizer.json").write_text(tokenizer.to_json())
    return path


def generate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments), "--tokenizer", str(Path(str(arguments[0])).parent)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_text_as_it_comes_and_how_fast(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = generate(capsys, model, "--prompt", "the lamp", "--seed", 3, "--max-new-tokens", 9)
    assert code == 0
    assert out.startswith("the lamp")
    assert "tokens/s" in err
    assert "of the memory's" in err


def test_several_texts_are_those_of_their_seeds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (model, "--prompt", "the", "--max-new-tokens", 12, "--json", "--dtype", "fp32")
    _, out, _ = generate(capsys, *asked, "--n", 3, "--seed", 5)
    texts = [json.loads(line) for line in out.splitlines()]
    assert [text["seed"] for text in texts] == [5, 6, 7]
    assert len({text["text"] for text in texts}) == 3
    _, again, _ = generate(capsys, *asked, "--n", 3, "--seed", 5)
    assert again == out
    code, plain, _ = generate(capsys, *asked[:-3], "--n", 3, "--seed", 5, "--dtype", "fp32")
    assert code == 0
    assert plain.count("--- ") == 3
    assert all(f"the{text['text']}\n" in plain for text in texts)


def test_prompts_from_a_file_and_everything_that_json_has_a_place_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text("the lamp\n\nthe cat sat\n")
    code, out, _ = generate(
        capsys, model, "--prompts", tmp_path / "prompts", "--json", "--logprobs", 2, "--prompt-logprobs", "--max-new-tokens", 4
    )
    assert code == 0
    texts = [json.loads(line) for line in out.splitlines()]
    assert [text["prompt"] for text in texts] == ["the lamp", "the cat sat"]
    for text in texts:
        assert len(text["tokens"]) == len(text["logprobs"]) == len(text["top_logprobs"]) == 4
        assert all(len(best) == 2 and best[0]["logprob"] >= best[1]["logprob"] for best in text["top_logprobs"])
        assert text["prompt_logprobs"][0] is None
        assert len(text["prompt_logprobs"]) == len(text["prompt_tokens"])
        assert text["finish_reason"] == "length"


def test_stops_and_biases(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (model, "--prompt", "the", "--json", "--seed", 1, "--max-new-tokens", 20)
    free = json.loads(generate(capsys, *asked)[1])
    stop = free["text"][4:6]
    stopped = json.loads(generate(capsys, *asked, "--stop", stop)[1])
    assert (stopped["text"], stopped["finish_reason"]) == (free["text"].partition(stop)[0], "stop")
    token = free["tokens"][3]
    ended = json.loads(generate(capsys, *asked, "--stop-ids", token)[1])
    assert ended["tokens"] == free["tokens"][: free["tokens"].index(token)]
    assert token not in json.loads(generate(capsys, *asked, "--logit-bias", f"{token}=-100")[1])["tokens"]


def test_what_int8_costs_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = generate(capsys, model, "--dtype", "int8", "--max-new-tokens", 2)
    assert code == 0
    rounded, exact = re.search(r"int8: loss ([\d.]+), fp32 ([\d.]+), on 8,192 bytes of the held-out part", err).groups()  # type: ignore[union-attr]
    assert 0 < abs(float(rounded) - float(exact)) < 0.05


def test_a_prompt_beyond_the_context_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = generate(capsys, model, "--prompt", "the lamp was lit " * 20, "--max-new-tokens", 2)
    assert code == 0
    assert "the model reads 32: it sees the last ones alone" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n", 0), "--n must be at least 1"),
        (("--top-p", 0), "--top-p must be above 0"),
        (("--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("--stop", ""), "A stop string is empty"),
        (("--stop", *["x"] * 100), "at most 64"),
        (("--logprobs", 2), "need --json"),
        (("--logprobs", 50, "--json"), "--logprobs must be from 0 to 20"),
        (("--logit-bias", "a=b"), "--logit-bias 'a=b' is not of the form"),
        (("--logit-bias", "5000=1"), "--logit-bias has token 5000"),
        (("--prompts", "gone"), "gone"),
        (("--prompts", "x", "--prompt", "y"), "exclude each other"),
    ],
)
def test_what_cannot_be_done(
    model: Path, arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = generate(capsys, model, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
