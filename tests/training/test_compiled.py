"""Compilation changes the speed of training and nothing else; and where it cannot work, nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from origo.training.compilation import compile_in_place, uncompile
from tests.conftest import TINY_RUN, Run


def losses(run: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_and_eager_losses_agree_for_20_steps(origo: Run, book: Path, tmp_path: Path, precision: str) -> None:
    command = ("train", "--data", book, *TINY_RUN, "--steps", 20, "--precision", precision)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = origo(*command, "--log-every", 1, "--name", "compiled")
    assert "in place; every name stays as it is" in compiled.stdout, compiled.stderr
    # One graph: the measurements and samples at steps 0, 10 and 20 compiled nothing.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    eager = origo(*command, "--log-every", 1, "--name", "eager", "--no-compile")
    assert eager.returncode == 0

    one, other = losses(tmp_path / "runs/compiled"), losses(tmp_path / "runs/eager")
    assert len(one) == len(other) == 21
    assert one[-1] < one[0] - 0.5, "it learns, so agreement means something"
    tolerance = 1e-4 if precision == "fp32" else 0.02  # bf16 has 8 bits of mantissa: 2^-8 of a loss of 5.7
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < tolerance


def test_a_defect_of_the_model_is_not_taken_for_one_of_the_compiler() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compile_in_place(model, True, lambda: model(torch.ones(1, 3)).sum().backward())


def test_uncompiling_brings_the_plain_call_back() -> None:
    model = nn.Linear(2, 2)
    before = model(torch.ones(1, 2))
    model.compile()
    uncompile(model)
    assert torch.equal(model(torch.ones(1, 2)), before)
