"""bf16 products over fp32 weights learn what fp32 learns; where weights and moments are kept, nothing is rounded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.conftest import Run

STEPS = 200 if os.environ.get("ONYM_PROVE") else 80  # bf16 without instructions for it takes a second a step
REAL = ("--preset", "nano", "--steps", STEPS, "--eval-every", STEPS // 2, "--eval-batches", 4, "--log-every", 10)


@pytest.mark.slow
def test_compiled_bf16_learns_within_a_hundredth_of_what_eager_fp32_does(onym_process: Run, tmp_path: Path) -> None:
    ends = {}
    for name, options in {"bf16": ("--compile", "whole"), "fp32": ("--compile", "off")}.items():
        done = onym_process("train", *REAL, "--precision", name, *options, "--name", name)
        assert done.returncode == 0, done.stderr
        ends[name] = json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
    for measure in ("train_loss", "val_loss"):
        assert ends["fp32"][measure] < 5.5, "it has learnt, from 6.9 on, so agreement means something"
        assert ends["bf16"][measure] == pytest.approx(ends["fp32"][measure], rel=0.01)
    assert onym_process("runs", "runs/bf16", "runs/fp32", "--plot", "both.png").returncode == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_weights_gradients_and_moments_are_fp32(tiny: torch.nn.Module) -> None:
    stepper = Stepper(tiny.train(), OptimizationOptions(), Compute(torch.device("cpu"), torch.bfloat16))  # type: ignore[arg-type]
    tokens = torch.randint(0, 101, (2, 33))
    batch = (tokens[:, :-1], tokens[:, 1:])
    prepare(stepper, batch, [2], "off")
    stepper(batch, 1e-3, 0)
    assert {parameter.dtype for parameter in tiny.parameters()} == {torch.float32}
    kept = [value for optimizer in stepper.optimizers for state in optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in kept} == {torch.float32}
