"""``onym evaluate``: any models on any text, side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import onym as library
from onym import GPT
from onym.data.tokenizer import Tokenizer
from onym.generation.scoring import Score
from tests.cli.test_train import EAGER
from tests.conftest import TINY, WORDS, Run

ROOT = Path(__file__).parents[2]
TEXT = "the lamp and the river and the stone, "


def told(onym: Run, *arguments: object) -> list[dict[str, Any]]:
    done = onym("evaluate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["models"]  # type: ignore[no-any-return]


@pytest.fixture
def untrained(tmp_path: Path) -> GPT:
    """Saved as m.safetensors, with its tokenizer in t.json, and a text in text.txt."""
    tokenizer = Tokenizer.train([TEXT * 20], 280)
    model = GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    library.save(model, tmp_path / "m.safetensors")
    (tmp_path / "t.json").write_text(tokenizer.to_json())
    (tmp_path / "text.txt").write_text(TEXT * 9)
    return model


def test_a_run_is_evaluated_on_what_it_did_not_train_on_and_beside_its_exports(
    onym: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"The {a} was the {n}th thing, and the {b} knew it."
        for n, (a, b) in enumerate(zip(WORDS * 9, WORDS[1:] * 10, strict=False))
    ]
    (tmp_path / "book.jsonl").write_text("".join(json.dumps({"text": f"{line} " * 6}) + "\n" for line in lines))
    done = onym("train", "--data", "book.jsonl", *EAGER, "--steps", 10, "--save-every", 5, "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert onym("convert", "runs/mine", "hf", "--to", "huggingface").returncode == 0
    assert onym("convert", "runs/mine", "book.pth", "--to", "book").returncode == 0
    tokenizer = ("--tokenizer", "runs/mine/tokenizer.json")

    done = onym("evaluate", "runs/mine", "hf", "book.pth", *tokenizer, "--n-heads", 2)
    assert done.returncode == 0, done.stderr
    first, heading, *rows = done.stdout.splitlines()
    assert re.match(r"The held-out part of '.*book\.jsonl': \d+ documents, ", first)
    assert heading.split() == ["model", "tokens", "stride", "loss", "perplexity", "bits/byte"]
    assert [row.split()[0] for row in rows] == ["runs/mine", "hf", "book.pth", "*"]
    assert len({tuple(row.rstrip("*").split()[1:]) for row in rows[:3]}) == 1, "the same weights, the same figures"
    assert "runs/mine: " in done.stderr

    (mine,) = told(onym, "runs/mine")
    held_out = [row["val_loss"] for row in map(json.loads, (tmp_path / "runs/mine/metrics.jsonl").open()) if "val_loss" in row]
    assert mine["loss"] == pytest.approx(held_out[-1], abs=0.3), "in training, documents follow each other in one stream"
    assert (mine["step"], mine["stride"], mine["context_length"]) == (10, 16, 32)
    assert mine["perplexity"] == pytest.approx(math.exp(mine["loss"]))
    assert mine["bits_per_byte"] == pytest.approx(mine["loss"] * mine["tokens"] / mine["bytes"] / math.log(2))

    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluating.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(program.replace("runs/book", "runs/mine"))
    assert re.fullmatch(r"(-\d+\.\d\d nats, \d+ tokens, \d+\.\d{3} bits a byte\n){2}", capsys.readouterr().out)

    done = onym("evaluate", "runs/mine", "--all-steps", "--plot", "steps.svg")
    assert done.returncode == 0, done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()[1:4]] == ["step", "5", "10"]
    assert (tmp_path / "steps.svg").read_text().startswith("<?xml")
    (fifth,) = told(onym, "runs/mine", "--step", 5)
    assert [each["loss"] for each in told(onym, "runs/mine", "--all-steps")] == [fifth["loss"], mine["loss"]]
    weights = tmp_path / "runs/mine/checkpoints/step-000000005/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    done = onym("evaluate", "runs/mine", "--all-steps")
    assert done.returncode == 0
    assert "Passed over step 5: " in done.stderr

    assert "has changed" not in done.stderr
    with (tmp_path / "book.jsonl").open("a") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    assert "The text has changed since 'runs/mine' was trained" in onym("evaluate", "runs/mine").stderr


def test_figures_of_a_text_are_those_of_score(onym: Run, untrained: GPT, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the lamp – and")
    (texts / "b.jsonl").write_text(json.dumps({"body": TEXT * 5}) + "\n" + json.dumps({"body": "x"}) + "\n")
    given = ("m.safetensors", "--tokenizer", "t.json", "--text-field", "body", "--stride", 7)
    (found,) = told(onym, *given, "--data", "texts")
    expected = library.score(untrained, ["the lamp – and", TEXT * 5, "x"], tokenizer=tmp_path / "t.json", stride=7)
    total = Score.total(expected)
    assert (found["tokens"], found["bytes"]) == (total.tokens, 16 + len(TEXT) * 5 + 1)
    assert found["log_likelihood"] == pytest.approx(total.log_likelihood, abs=1e-3)
    (limited,) = told(onym, *given, "--data", "texts", "--limit", "1KB")
    assert limited == found
    (limited,) = told(onym, *given, "--data", "texts", "--limit", "50")
    assert limited["bytes"] == 50
    (one_token,) = told(onym, *given, "--data", texts / "a.txt", "--limit", "1")
    assert (one_token["tokens"], one_token["bytes"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "Name at least one model"),
        ("gone", "There is nothing at 'gone'"),
        ("text.txt", "'text.txt' is no weight file"),
        ("m.safetensors", "holds no tokenizer: name the one it was trained with, with --tokenizer"),
        ("m.safetensors --tokenizer big.json", "The tokenizer has 300 tokens and the model 2"),
        ("M --data gone.txt", "There is no file or folder 'gone.txt'"),
        ("M --data empty.txt", "There is no text in 'empty.txt'"),
        ("M --stride 0", "--stride must be at least 1"),
        ("M --stride 33 --data text.txt", "--stride must be from 1 to the model's context of 32, not 33"),
        ("M --batch-size 0", "--batch-size must be at least 1"),
        ("M --limit much", "--limit 'much' is no size"),
        ("M --device tpu", "There is no device 'tpu'"),
        ("M --plot x.png", "--plot draws the steps of a run: add --all-steps"),
        ("M --all-steps", "'m.safetensors' has no steps"),
        ("m.safetensors M --all-steps", "one run"),
        ("M --all-steps --plot x.doc", "--plot takes a file that ends with .png"),
    ],
)
def test_bad_input_is_one_sentence(onym: Run, untrained: GPT, tmp_path: Path, arguments: str, says: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "big.json").write_text(Tokenizer.train([f"{word}{word[::-1]} " * 9 for word in WORDS], 300).to_json())
    before = sorted(path.name for path in tmp_path.iterdir())
    done = onym("evaluate", *arguments.replace("M", "m.safetensors --tokenizer t.json", 1).split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_that_diverged_is_shown_as_such(onym: Run, untrained: GPT, tmp_path: Path) -> None:
    with torch.no_grad():
        untrained.tok_emb.weight.fill_(math.nan)
    library.save(untrained, tmp_path / "broken.safetensors")
    done = onym("evaluate", "broken.safetensors", "m.safetensors", "--tokenizer", "t.json", "--data", "text.txt")
    assert done.returncode == 0, done.stderr
    broken, whole = done.stdout.splitlines()[2:4]
    assert broken.split()[-1] == "nan"
    assert whole.endswith("*")
