"""--document-mask: a run in which the documents of a window do not see each other, from the step to the proof."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onym import GPT
from onym.data.batches import Batch, evaluation_batches
from onym.data.tokens import TokenStream
from onym.train.dry_run import prepare
from onym.train.evaluate import held_out_loss
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.cli.test_train import EAGER
from tests.conftest import TINY, TINY_RUN, WORDS, Run

CPU = Compute(torch.device("cpu"), torch.float32)
END = 0


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """200 documents, most of them much shorter than a window."""
    path = tmp_path / "notes.jsonl"
    texts = [f"{WORDS[n % 12]} {n}: " + "the stone knew it. " * (n % 7) for n in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows(run: Path, name: str = "train_loss") -> list[float]:
    found: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def uneven(number: int) -> Batch:
    """Four rows with 0, 1, many and nothing but one end-of-text tokens: micro-batches have different numbers of targets."""
    tokens = torch.randint(1, TINY.vocab_size, (4, TINY.context_length + 1), generator=torch.Generator().manual_seed(number))
    tokens[1, 9] = END
    tokens[2, ::3] = END
    tokens[3, 1:] = END
    return tokens[:, :-1], tokens[:, 1:]


def gradients(micro_batch: int, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(0)
    stepper = Stepper(GPT(TINY), OptimizationOptions(document_mask=True), CPU, separator=END)
    prepare(stepper, batch, [micro_batch], "off")
    loss = stepper._backward(batch)
    return {"loss": loss, **{name: p.grad for name, p in stepper.model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_each_target_counts_the_same_however_a_batch_is_split(micro_batch: int) -> None:
    whole, split = gradients(4, uneven(0)), gradients(micro_batch, uneven(0))
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_the_held_out_loss_is_that_of_its_documents_alone(tiny: GPT) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, TINY.vocab_size, 300).astype(np.uint16)
    tokens[generator.random(300) < 0.1] = END
    tokens[-70:] = END  # a batch in which nothing counts
    total, counted, start = 0.0, 0, 0
    for index, token in enumerate(tokens):
        # A document goes on in a new window without what is before it.
        if token == END or index % TINY.context_length == TINY.context_length - 1:
            piece = torch.from_numpy(tokens[start : index + (1 if token == END else 2)].astype(np.int64))[None]
            if (number := piece.shape[1] - 1) > 0:
                with torch.no_grad():
                    total += float(tiny(piece[:, :-1], piece[:, 1:])) * number
                counted += number
            start = index + 1
    stream = TokenStream((tokens,), (np.zeros(1, dtype=np.uint64),))

    def batches() -> Iterator[Batch]:
        return evaluation_batches(stream, TINY.context_length, 2, 100)

    found = held_out_loss(tiny, batches(), CPU, separator=END)
    assert found == pytest.approx(total / counted, abs=1e-5)
    assert held_out_loss(tiny, batches(), CPU) != pytest.approx(found, abs=1e-3)


LENGTH = ("--steps", 12, "--eval-every", 6, "--log-every", 1, "--warmup-steps", 2)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_run_is_an_eager_one_in_one_graph(onym: Run, notes: Path, tmp_path: Path, how: str) -> None:
    command = ("train", "--data", notes, *TINY_RUN, *LENGTH, "--document-mask", "--precision", "fp32")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    said = succeeded(onym(*command, "--name", "compiled", "--compile", how))
    assert "in place; every name stays as it is" in said
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "compiled again" not in said
    succeeded(onym(*command, "--name", "eager", "--compile", "off"))
    compiled, eager = rows(tmp_path / "runs/compiled"), rows(tmp_path / "runs/eager")
    assert len(compiled) == len(eager) == 13
    assert compiled == pytest.approx(eager, abs=1e-4)
    assert compiled[-1] < compiled[0] - 0.3, "it learns, so agreement means something"


def test_a_run_with_a_mask_is_another_run_than_one_without(onym: Run, notes: Path, tmp_path: Path) -> None:
    for name, option in (("masked", ("--document-mask",)), ("plain", ())):
        succeeded(onym("train", "--data", notes, *EAGER, *LENGTH, *option, "--name", name))
    for name in ("train_loss", "val_loss"):
        masked, plain = rows(tmp_path / "runs/masked", name), rows(tmp_path / "runs/plain", name)
        assert len(masked) == len(plain)
        assert all(abs(a - b) > 1e-4 for a, b in zip(masked, plain, strict=True)), name
    assert (tmp_path / "runs/masked/samples").is_dir()


def test_a_run_does_not_continue_with_another_mask(onym: Run, notes: Path, tmp_path: Path) -> None:
    command = ("train", "--data", notes, *EAGER, "--name", "run")
    succeeded(onym(*command, "--steps", 3))
    done = onym(*command, "--steps", 6, "--document-mask")
    assert done.returncode == 2
    assert "--document-mask was False, is True" in done.stderr
    # A run from before there was the option had no mask.
    path = tmp_path / "runs/run/run.json"
    described = json.loads(path.read_text())
    del described["options"]["optimization"]["document_mask"]
    path.write_text(json.dumps(described))
    done = onym(*command, "--steps", 6, "--document-mask")
    assert done.returncode == 2
    assert "--document-mask was False, is True" in done.stderr
    succeeded(onym(*command, "--steps", 6))


def test_windows_of_whole_documents_imply_the_mask(onym: Run, notes: Path, tmp_path: Path) -> None:
    command = ("train", "--data", notes, *EAGER, *LENGTH, "--packing", "documents", "--name")
    said = succeeded(onym(*command, "run"))
    assert "Packing: " in said
    assert "windows of whole documents" in said
    assert rows(tmp_path / "runs/run")[-1] < rows(tmp_path / "runs/run")[0] - 0.3
    succeeded(onym(*command, "both", "--document-mask"))
    assert rows(tmp_path / "runs/both") == rows(tmp_path / "runs/run")
    done = onym("train", "--data", notes, *EAGER, "--steps", 20, "--packing", "stream", "--name", "run")
    assert done.returncode == 2
    assert "--packing was documents, is stream" in done.stderr


def test_an_epoch_is_all_windows(onym: Run, notes: Path, tmp_path: Path) -> None:
    said = succeeded(onym("train", "--data", notes, *EAGER, "--epochs", 1, "--packing", "documents", "--name", "run"))
    found = re.search(r"Packing: ([\d,]+) windows", said)
    assert found, said
    described = json.loads((tmp_path / "runs/run/run.json").read_text())
    assert described["steps"] == math.ceil(int(found[1].replace(",", "")) / 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        pytest.param(("--document-mask",), id="mask", marks=pytest.mark.prove),
        pytest.param(("--packing", "documents"), id="packing"),
    ],
)
def test_kills_change_nothing(onym_process: Run, notes: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    options = (*option, "--micro-batch", 2, "--drop-rate", 0.1, "--gradient-checkpointing", "--save-every", 5)
    command = ("tools", "check-resume", "--kills", 2, "--folder", tmp_path / "both", "--data", notes)
    said = succeeded(onym_process(*command, *EAGER, "--steps", 40, "--eval-every", 20, *options))
    assert "Bitwise identical" in said


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "packing"), [("ddp", "stream"), ("fsdp", "stream"), ("ddp", "documents")])
def test_two_processes_train_as_one_does(onym_process: Run, notes: Path, tmp_path: Path, parallel: str, packing: str) -> None:
    """Each has other numbers of targets; a mean of means would not be the mean."""
    command = ("train", "--data", notes, *EAGER, *LENGTH, "--document-mask", "--packing", packing, "--precision", "fp32")
    succeeded(onym_process(*command, "--name", "one"))
    succeeded(onym_process(*command, "--name", "two", "--processes", 2, "--parallel", parallel))
    for name in ("train_loss", "val_loss"):
        assert rows(tmp_path / "runs/two", name) == pytest.approx(rows(tmp_path / "runs/one", name), abs=2e-4)
