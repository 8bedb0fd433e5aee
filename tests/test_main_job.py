"""`onym train`, as it is: real text, the default options, a few minutes. Everything else here is smaller than life.

`make prove` trains as long as the default is; otherwise it is a quarter of that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onym.data.corpus import Corpus
from tests.conftest import Run

LENGTH, LEARNED = ((), 0.55) if os.environ.get("ONYM_PROVE") else (("--steps", 300), 0.7)


@pytest.mark.slow
def test_the_default_run_learns_the_language_of_the_corpus(onym_process: Run, onym: Run, tmp_path: Path) -> None:
    done = onym_process("train", *LENGTH)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "python-docs"
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
