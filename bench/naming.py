"""What canonical names cost: 100,000 tensors, and a 124M GPT against its own ``state_dict()`` and torch's canonicaliser.

    python bench/naming.py

All variants are measured in turn in one process, so that a slow moment of the machine falls on all of them alike; the median
of the rounds counts, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import onym

warnings.filterwarnings("ignore")


def alternate(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def many_tensors(blocks: int) -> nn.Module:
    """Ten tensors a block, every block compiled, under a compiled root."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Sequential(*(nn.Linear(1, 1) for _ in range(5))) for _ in range(blocks))
    for index, block in enumerate(model):
        model[index] = torch.compile(block)  # type: ignore[assignment]
    return torch.compile(model)  # type: ignore[return-value]


def table(title: str, medians: dict[str, float], base: str) -> None:
    print(f"\n{title}")
    for name, median in medians.items():
        print(f"  {name:<52} {median * 1e3:10.2f} ms   x{median / medians[base]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")

    large = many_tensors(10_000)
    raw = "model.state_dict(), names as wrapped"
    medians = alternate(
        {
            raw: large.state_dict,
            "onym.state_dict": lambda: onym.state_dict(large),
            "torch get_model_state_dict": lambda: get_model_state_dict(large),
        },
        rounds,
    )
    assert len(onym.state_dict(large)) == 100_000
    table("100,000 tensors, each block compiled (target: under 1 s)", medians, raw)

    with torch.device("meta"):
        gpt = onym.GPT(onym.GPTConfig.preset("gpt2-small", vocab_size=50257))
    whole = torch.compile(gpt)
    plain = "model.state_dict(), plain"
    medians = alternate(
        {
            plain: gpt.state_dict,
            "onym.state_dict, plain": lambda: onym.state_dict(gpt),
            "onym.state_dict, torch.compile(model)": lambda: onym.state_dict(whole),  # type: ignore[arg-type]
            "torch get_model_state_dict, torch.compile(model)": lambda: get_model_state_dict(whole),  # type: ignore[arg-type]
        },
        rounds * 10,
    )
    table("GPT-2 124M (target: under twice the plain one)", medians, plain)

    with torch.device("meta"):
        gpt = onym.GPT(onym.GPTConfig.preset("gpt2-small", vocab_size=50257))
    for index, block in enumerate(gpt.trf_blocks):
        gpt.trf_blocks[index] = torch.compile(block)  # type: ignore[assignment]
    wrapped = "model.state_dict(), names as wrapped"
    medians = alternate(
        {
            wrapped: gpt.state_dict,
            "onym.state_dict": lambda: onym.state_dict(gpt),
            "torch get_model_state_dict": lambda: get_model_state_dict(gpt),
        },
        rounds * 10,
    )
    table("GPT-2 124M, each block compiled", medians, wrapped)


if __name__ == "__main__":
    main()
