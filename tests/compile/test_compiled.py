"""Compilation changes the speed of training and nothing else; and where it cannot work, nothing at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onym.compile.in_place import compile_in_place, uncompile
from onym.data.batches import TrainingBatches
from tests.conftest import TINY_RUN, Run


def losses(run: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows]


@pytest.mark.parametrize(("precision", "how"), [("fp32", "whole"), ("bf16", "whole"), ("fp32", "blocks")])
def test_compiled_and_eager_losses_agree_for_20_steps(onym: Run, book: Path, tmp_path: Path, precision: str, how: str) -> None:
    command = ("train", "--data", book, *TINY_RUN, "--steps", 20, "--precision", precision)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = onym(*command, "--log-every", 1, "--name", "compiled", "--compile", how)
    assert "in place; every name stays as it is" in compiled.stdout, compiled.stderr
    # One graph, which all blocks share: the measurements and samples at steps 0, 10 and 20 compiled nothing.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "compiled again" not in compiled.stdout
    eager = onym(*command, "--log-every", 1, "--name", "eager", "--compile", "off")
    assert eager.returncode == 0

    one, other = losses(tmp_path / "runs/compiled"), losses(tmp_path / "runs/eager")
    assert len(one) == len(other) == 21
    assert one[-1] < one[0] - 0.5, "it learns, so agreement means something"
    tolerance = 1e-4 if precision == "fp32" else 0.02  # bf16 has 8 bits of mantissa: 2^-8 of a loss of 5.7
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < tolerance


def test_a_defect_of_the_model_is_not_taken_for_one_of_the_compiler() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compile_in_place(model, "whole", lambda: model(torch.ones(1, 3)).sum().backward())


def test_uncompiling_brings_the_plain_call_back() -> None:
    model = nn.Linear(2, 2)
    before = model(torch.ones(1, 2))
    model.compile()
    uncompile(model)
    assert torch.equal(model(torch.ones(1, 2)), before)


def test_what_is_compiled_again_is_told_with_the_reason(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of another shape, as a fault of ours would make it."""
    whole = TrainingBatches.__getitem__
    monkeypatch.setattr(
        TrainingBatches, "__getitem__", lambda self, batch: tuple(part[: 3 if batch == 4 else 4] for part in whole(self, batch))
    )
    torch._dynamo.reset()
    done = onym("train", "--data", book, *TINY_RUN, "--steps", 10, "--compile", "whole", "--micro-batch", 4)
    assert done.returncode == 0, done.stderr
    assert re.search(r"compiled again by step 5, .*expected 4, actual 3", done.stdout.replace("\n", " ")), done.stdout
