"""`onym train`, as it is: real text, the default options, a few minutes; and what is made of its model. All else is smaller.

`make prove` trains as long as the default is; otherwise it is a quarter of that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onym.data.conversations import read_conversations
from onym.data.corpus import Corpus
from tests.conftest import Run
from tests.finetuning import instructions, messages, replies, write_csv, write_json

IN_FULL = bool(os.environ.get("ONYM_PROVE"))
LENGTH, LEARNED = ((), 0.55) if IN_FULL else (("--steps", 300), 0.7)
# How a model learns to answer, and how many of the answers to unseen questions have to be right. The task is new to all of its
# layers, which are 128 wide: hence an adapter of rank 32.
ANSWERING = {
    "all weights": (
        (("--epochs", 6, "--learning-rate", 1e-3), 0.9)
        if IN_FULL
        else (("--epochs", 2, "--learning-rate", 1e-3, "--compile", "off"), 0.5)
    ),
    "an adapter": (("--epochs", 8, "--lora", 32, "--learning-rate", 0.004), 0.9),
}
CHOSEN = ANSWERING if IN_FULL else {"all weights": ANSWERING["all weights"]}


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the default run was made, in a process of its own."""
    folder = tmp_path_factory.mktemp("main_job")
    done = _onym(folder, "train", *LENGTH)
    assert done.returncode == 0, done.stderr
    for command in ("generate", "serve"):
        assert f"{command} runs/python-docs" in done.stdout, "the next commands"
    return folder


def _onym(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onym", *map(str, arguments)]
    environment = {**os.environ, "ONYM_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)


@pytest.mark.slow
def test_the_default_run_learns_the_language_of_the_corpus(main_job: Path, onym: Run) -> None:
    run = main_job / "runs" / "python-docs"
    measured = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]
    first, last = measured[0]["val_loss"], measured[-1]["val_loss"]
    assert last <= LEARNED * first, f"held-out loss {first:.3f} -> {last:.3f}"

    corpus = {word for document in Corpus().documents() for word in document.text.split()}
    words: list[str] = []
    for seed in range(8):  # a document may be over after five words
        asked = ("--prompt", "Return ", "--max-new-tokens", 300, "--seed", seed, "--temperature", 0.5)
        words += onym("generate", run, *asked).stdout.split()
    known = sum(word in corpus for word in words) / len(words)
    assert known > 0.5, f"{known:.0%} of the words are words of the corpus:\n{' '.join(words)}"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "right"), CHOSEN.values(), ids=CHOSEN)
def test_its_model_learns_to_answer_what_it_has_not_seen(main_job: Path, how: tuple[object, ...], right: float) -> None:
    unseen = instructions(300, seed=1)
    path = write_json(main_job / "instructions.json", instructions(4000, seed=0, without=unseen))
    name = f"answers-{len(how)}"
    done = _onym(main_job, "train", "--from", "runs/python-docs", "--sft", path, "--name", name, *how)
    assert done.returncode == 0, done.stderr
    asked = read_conversations(write_json(main_job / "unseen.json", unseen)).conversations()
    answers = replies(main_job / "runs" / name, asked)
    found = sum(answer == row["output"] for answer, row in zip(answers, unseen, strict=True)) / len(unseen)
    print(f"{found:.1%} of the answers are right")
    assert found >= right, f"{found:.1%}: {list(zip(unseen, answers, strict=True))[:5]}"


@pytest.mark.slow
def test_its_model_learns_to_tell_advertisements_apart(main_job: Path) -> None:
    path = write_csv(main_job / "spam.csv", messages(1000, seed=0))
    done = _onym(main_job, "train", "--from", "runs/python-docs", "--classify", path, "--name", "spam", "--compile", "off")
    assert done.returncode == 0, done.stderr
    unseen = messages(300, seed=1)
    said = _onym(main_job, "classify", "runs/spam", *(text for text, _ in unseen))
    found = sum(line.split("\t")[0] == label for line, (_, label) in zip(said.stdout.splitlines(), unseen, strict=True))
    assert found / len(unseen) >= 0.95
