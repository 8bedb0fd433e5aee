"""Memory that is too small: what fits is found, and trains; nothing of what did not fit stays."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from onym import GPT, GPTConfig
from onym.cli.main import main
from onym.train.dry_run import prepare
from onym.train.metering import memory_in_use
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.conftest import TINY_RUN, write_book
from tests.cuda.memory import allocated, keep_all_of_it, little_memory

SIZES = [128, 64, 32, 16, 8, 4, 2, 1]
_MIB = 1 << 20


def test_as_much_as_fits_goes_through_at_once_and_goes_on_to_fit(device: torch.device) -> None:
    """On a GPU with half of a gigabyte left, and a batch that needs several."""
    torch.manual_seed(0)
    config = GPTConfig.preset("nano", vocab_size=8_000 if device.type == "cuda" else 80)
    stepper = Stepper(GPT(config).to(device), OptimizationOptions(optimizer="adamw"), Compute(device, torch.float32))
    time = config.context_length if device.type == "cuda" else 8
    tokens = torch.randint(config.vocab_size, (128, time + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    prepare(stepper, batch, [1], "off")  # cuBLAS takes its memory
    before = allocated(device)
    gc.disable()  # what nothing reaches any more has to be gone without it
    try:
        with little_memory(device, 512 * _MIB, stepper):
            prepare(stepper, batch, SIZES, "off")
            assert stepper.micro_batch in SIZES[1:-1]
            assert allocated(device) <= before + _MIB
            results = [stepper(batch, 1e-3, number) for number in range(3)]
            assert not any(result.bad for result in results)
    finally:
        gc.enable()
    assert memory_in_use(device) > 0


def test_what_does_not_fit_at_all_is_told(device: torch.device) -> None:
    stepper = Stepper(
        GPT(GPTConfig.preset("nano", vocab_size=80)).to(device),
        OptimizationOptions(optimizer="adamw"),
        Compute(device, torch.float32),
    )
    tokens = torch.zeros((64, 128), dtype=torch.long, device=device)
    prepare(stepper, (tokens[:1], tokens[:1]), [1], "off")
    with little_memory(device, 8 * _MIB, stepper), pytest.raises(RuntimeError, match="out of memory"):
        prepare(stepper, (tokens, tokens), [64, 32], "off")
    prepare(stepper, (tokens, tokens), [8], "off")
    assert not stepper((tokens, tokens), 1e-3, 0).bad


@pytest.mark.cuda
def test_the_proof_at_the_end_has_the_memory_that_training_took(
    cuda: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch keeps what was freed; the process that opens the checkpoint needs it."""
    keep_all_of_it(cuda)
    command = ["train", "--data", write_book(tmp_path), *TINY_RUN, "--steps", 2, "--compile", "off", "--device", cuda.type]
    assert main([str(word) for word in [*command, "--runs-dir", tmp_path / "runs"]]) == 0
    said = capsys.readouterr().out
    assert "a fresh process without torch.compile opened" in said, said
