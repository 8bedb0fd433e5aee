"""A run that is killed at random moments, and continued by the same command, ends with the same bits as one that is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from onym.tools.resume_check import Comparison, _compare
from onym.train.run_folder import RunFolder
from tests.cli.test_train import EAGER
from tests.conftest import TINY_RUN, Run
from tests.finetuning import instructions, messages, write_csv, write_json

IN_FULL = bool(os.environ.get("ONYM_PROVE"))
LENGTH = ("--steps", 150, "--save-every", 15, "--eval-every", 50, "--eval-batches", 2, "--log-every", 7)
PARTS = ("--drop-rate", 0.1, "--micro-batch", 1, "--ema", 0.99)

RUNS = {
    "AdamW, compiled, dropout": (*TINY_RUN, *LENGTH, "--compile", "whole", "--drop-rate", 0.1),
    "AdamW, dropout, accumulation": (*EAGER, *LENGTH, "--drop-rate", 0.1, "--micro-batch", 2),
    "Muon, EMA, compiled, accumulation": (
        *(
            *TINY_RUN,
            *LENGTH,
            "--compile",
            "whole",
            "--optimizer",
            "muon",
            "--ema",
            0.99,
            "--micro-batch",
            2,
            "--drop-rate",
            0.1,
        ),
    ),
    "a decoder, Muon at its own rate, EMA, compiled, accumulation": (
        *(*TINY_RUN, *LENGTH, "--arch", "qwen3", "--compile", "whole", "--optimizer", "muon", "--muon-learning-rate", 3e-3),
        *("--muon-momentum-warmup", 40, "--zero-init", "--ema", 0.99, "--micro-batch", 2),
    ),
    "a decoder of Llama's kind with its documents apart": (
        *(*EAGER, *LENGTH, "--arch", "llama", "--document-mask", "--gradient-checkpointing"),
    ),
    "Muon, EMA, gradient checkpointing": (
        *(*EAGER, *LENGTH, "--optimizer", "muon", "--ema", 0.99, "--gradient-checkpointing", "--drop-rate", 0.2),
    ),
    "fp16 with its scaler": (*EAGER, *LENGTH, "--precision", "fp16"),
    "two processes, EMA, dropout, accumulation": (*EAGER, *LENGTH, *PARTS, "--processes", 2),
    "two processes with shares of all of it": (*EAGER, *LENGTH, *PARTS, "--processes", 2, "--parallel", "fsdp"),
}


# On rows, from a base: in short in test_finetune.py.
TUNED = {
    "conversations, compiled": ("--sft", "rows.json", "--compile", "whole", "--micro-batch", 2),
    "an adapter, dropout, bf16": ("--sft", "rows.json", "--lora", 3, "--lora-dropout", 0.1, "--precision", "bf16"),
    "labels, some weights": ("--classify", "spam.csv", "--train-only", "trf_blocks.1,out_head", "--class-weights", "balanced"),
    "an adapter in two processes with shards": ("--sft", "rows.json", "--lora", 3, "--processes", 2, "--parallel", "fsdp"),
}


# Eager and compiled, dropout, accumulation, an average, Muon and AdamW, one process and two are in these.
SAMPLE = (
    "AdamW, compiled, dropout",
    "a decoder, Muon at its own rate, EMA, compiled, accumulation",
    "two processes with shares of all of it",
)
CHOSEN = RUNS if IN_FULL else {name: RUNS[name] for name in SAMPLE}


@pytest.mark.parametrize("options", CHOSEN.values(), ids=CHOSEN)
def test_kills_change_nothing(onym_process: Run, book: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    kills = 50 if IN_FULL else 2
    done = onym_process("tools", "check-resume", "--kills", kills, "--folder", tmp_path / "both", "--data", book, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Bitwise identical" in done.stdout
    killed = re.search(r"after (\d+) kills", done.stdout)
    assert killed, done.stdout
    assert int(killed[1]) == kills
    print(done.stdout)


@pytest.mark.prove
@pytest.mark.parametrize("options", TUNED.values(), ids=TUNED)
def test_kills_change_nothing_of_fine_tuning(
    onym_process: Run, book: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    write_json(tmp_path / "rows.json", instructions(60, seed=0))
    write_csv(tmp_path / "spam.csv", messages(60, seed=0))
    base = ("train", "--data", book, *EAGER, "--context-length", 96, "--steps", 10, "--name", "base")
    assert onym_process(*base).returncode == 0
    how = (*LENGTH, "--compile", "off", "--warmup-steps", 2, *options)
    both = ("--kills", 20, "--folder", tmp_path / "both", "--from", tmp_path / "runs" / "base")
    done = onym_process("tools", "check-resume", *both, *how)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Bitwise identical" in done.stdout
    print(done.stdout)


def test_what_differs_is_found(onym: Run, book: Path, tmp_path: Path) -> None:
    for name, seed in (("straight", 0), ("killed", 1)):
        assert onym("train", "--data", book, *EAGER, "--steps", 6, "--seed", seed, "--name", name).returncode == 0
    result = Comparison()
    _compare(RunFolder(tmp_path / "runs/straight"), RunFolder(tmp_path / "runs/killed"), result)
    said = "\n".join(result.differences)
    assert "tok_emb.weight in model.safetensors differs" in said
    assert "train_loss in the row of step 5 is" in said
    assert "rng.torch in trainer.safetensors differs" in said
    assert "python in the random number generators is" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--kills", 0), "--kills must be at least 1"),
        (("--name", "x"), "--name is not for check-resume"),
        (("--steps", 0), "--steps must be more than 0"),
        (("--folder", "."), "is not empty: name a new --folder"),
        (("--n-heads", 5), "cannot be split over n_heads=5"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    onym: Run, book: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    done = onym("tools", "check-resume", "--data", book, *EAGER, *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]
