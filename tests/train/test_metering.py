"""Figures that a person reads: operations, rates, memory."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from onym import GPT
from onym.train.metering import Meter, documented_peak, memory_in_use, peak_of, training_flops_per_token
from onym.train.precision import Compute
from tests.conftest import TINY

CPU = Compute(torch.device("cpu"), torch.float32)


def test_operations_are_those_that_torch_counts() -> None:
    model = GPT(TINY)
    tokens = torch.randint(0, TINY.vocab_size, (2, TINY.context_length))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    # The head computes with its rows padded to a multiple of 64; the CPU's attention is not counted by torch.
    padding = 6 * TINY.emb_dim * (-TINY.vocab_size % 64)
    counted = counter.get_total_flops() / tokens.numel() - padding
    attention = 12 * TINY.n_layers * TINY.emb_dim * TINY.context_length
    assert counted == training_flops_per_token(TINY) - attention


def test_the_peak_is_measured_where_it_is_not_documented() -> None:
    before = torch.get_rng_state()
    peak = peak_of(CPU)
    assert torch.equal(torch.get_rng_state(), before), "training would draw other numbers"
    assert 1e8 < peak.flops < 1e14
    assert peak.source == "the matmul rate measured here"


@pytest.mark.parametrize(
    ("gpu", "model"),
    [
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", "T4"),
    ],
)
def test_a_gpu_is_known_by_its_exact_model(gpu: str, model: str | None) -> None:
    peak = documented_peak(gpu)
    assert (peak.source if peak else None) == (f"{model}'s documented peak" if model else None)


def test_memory_is_what_is_resident() -> None:
    before = memory_in_use(CPU.device)
    with mmap.mmap(-1, 200_000_000) as held:  # not of the allocator, which may have kept as much from another test
        held.write(b"1" * len(held))
        assert memory_in_use(CPU.device) - before > 0.9 * len(held)


def test_rates_are_of_the_steps_alone() -> None:
    meter = Meter(1000)
    assert meter.tokens_per_second() == meter.mean_tokens_per_second() == 0
    with meter.step():
        pass
    first = meter.tokens_per_second()
    assert first > 0
    assert meter.tokens_per_second() == 0, "none since the last call"
    assert meter.mean_tokens_per_second() == first


def test_the_wait_for_data_is_a_share_of_the_steps_time() -> None:
    meter, waits = Meter(1000), iter([0.0, 1e-9, 5.0, 5.0])
    with meter.step(lambda: next(waits)):
        pass
    assert 0 < meter.share_waited() < 1
    meter.tokens_per_second()
    with meter.step(lambda: next(waits)):
        pass
    assert meter.share_waited() == 0
    assert 0 < meter.mean_share_waited() < 1
