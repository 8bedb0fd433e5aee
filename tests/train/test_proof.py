"""The proof at the end of a run can fail, and does when the checkpoint is not the model that was trained."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import onym as library
from onym.data.batches import Batch
from onym.data.sources import Sources
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import open_tokens
from onym.errors import CheckpointError
from onym.format.manifest import CONFIG, MODEL, TOKENIZER
from onym.format.writer import About, write_folder
from onym.train import loop
from onym.train import proof as proof_module
from onym.train.evaluate import write_sample
from onym.train.proof import Proof, prove
from onym.train.step import Result, Stepper
from tests.conftest import TINY_RUN, Run


@pytest.fixture
def run(onym: Run, book: Path, tmp_path: Path) -> Path:
    done = onym("train", "--data", book, *TINY_RUN, "--compile", "off", "--steps", 10, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs" / "book"


def proof_of(run: Path, checkpoint: Path) -> Proof:
    description = json.loads((run / "run.json").read_text())
    return prove(
        checkpoint,
        description["held_out"],
        Sources.open(description["sources"]),
        batch_size=4,
        eval_batches=20,
        device="cpu",
        precision="fp32",
    )


def test_a_checkpoint_of_other_weights_is_found_out(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000000010"
    proof = proof_of(run, checkpoint)
    assert proof.holds
    assert proof.held_out == proof.expected, "to the last bit"

    opened = library.open_checkpoint(checkpoint)
    assert opened.manifest is not None
    texts = {file: opened.text(file) or "" for file in (CONFIG, TOKENIZER)}
    state = opened.model.state()
    state["tok_emb.weight"] = state["tok_emb.weight"] + 0.05 * torch.randn(state["tok_emb.weight"].shape)
    forged = run / "forged"
    write_folder(forged, {MODEL: state}, texts, About("gpt", 10, opened.manifest.metrics))
    assert not proof_of(run, forged).holds


def test_a_checkpoint_that_does_not_open_is_named_with_the_reason(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000000010"
    file = checkpoint / MODEL
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"did not open in a fresh process: .*model\.safetensors' is damaged"):
        proof_of(run, checkpoint)


_TOO_SMALL = """
import sys, torch
from onym.train import proof
def no_room(request):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
proof._open_and_measure = no_room
sys.exit(proof.main("{}"))
"""


def test_a_model_that_fits_no_single_process_is_kept_without_a_proof(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was shared out over several GPUs may: what was trained is there, and the end says what was left out."""
    python = tmp_path / "python"
    program = tmp_path / "no_room.py"
    program.write_text(_TOO_SMALL)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(loop, "prove", prove)
    monkeypatch.setattr(proof_module.sys, "executable", str(python))
    done = onym("train", "--data", book, *TINY_RUN, "--compile", "off", "--steps", 10)
    assert done.returncode == 0, done.stderr
    assert "Proof: skipped: a fresh process has no memory for all of the model beside the training" in done.stdout
    assert re.search(r"proof +skipped for lack of memory; every byte of the file: .+ verify runs/book\n", done.stdout)
    assert "A sample" not in done.stdout
    library.open_checkpoint(tmp_path / "runs/book").verify()
    python.write_text("#!/bin/sh\nkill -9 $$\n")  # so a system ends a process that takes too much
    with pytest.raises(MemoryError):
        proof_of(tmp_path / "runs/book", tmp_path / "runs/book/checkpoints/step-000000010")


def test_a_sample_continues_a_text_that_was_held_out(run: Path) -> None:
    cache = open_tokens(Path(json.loads((run / "run.json").read_text())["sources"][0]["token_cache"]))
    assert cache is not None
    model = library.load_model(run)
    assert isinstance(model, library.GPT)
    tokenizer = Tokenizer.load(run / "checkpoints" / "step-000000010")
    sample = write_sample(model.train(), tokenizer, cache.held_out)
    given, written = sample[1:].split("]", 1)
    assert tokenizer.decode(cache.held_out.read(0, len(cache.held_out)).tolist()).startswith(given)
    assert len(given) > 10
    assert len(written) > 10
    assert sample == write_sample(model, tokenizer, cache.held_out), "the same each time"
    assert model.training, "left as it was"


def test_a_token_cache_that_is_deleted_in_mid_run_is_written_again(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Stepper.__call__

    def step(self: Stepper, batch: Batch, rate: float, number: int) -> Result:
        if number == 5:
            shutil.rmtree(tmp_path / "cache")
            book.unlink()
        return plain(self, batch, rate, number)

    monkeypatch.setattr(Stepper, "__call__", step)
    done = onym("train", "--data", book, *TINY_RUN, "--compile", "off", "--steps", 10)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise identical" in done.stdout
    cache = open_tokens(Path(json.loads((tmp_path / "runs/book/run.json").read_text())["sources"][0]["token_cache"]))
    assert cache is not None
    assert cache.description["vocab_size"] == 300
