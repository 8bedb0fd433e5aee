"""What keeping documents apart costs: a compiled training step with --document-mask against one without, on a CPU.

    python bench/document_mask.py [--rounds 7] [--steps 4] [--only "nano, context 256"]

Documents of 200 tokens on average. The two take turns, a few steps each, in an order that turns; all in one process, because
they are the same program but for the mask. A step is what ``onym train`` does: forward, backward, clipping, AdamW, zeroing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from _measure import alternate, save_results, table
from onym.gpt.config import GPTConfig
from onym.gpt.gpt2 import GPT
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper

# Shape and sequences in a step. Where one is small, attention is much of a step: the mask costs most there.
SHAPES = {
    "nano, context 256": (GPTConfig.preset("nano", vocab_size=1024, context_length=256), 8),
    "mini, context 256": (GPTConfig.preset("mini", vocab_size=4096, context_length=256), 8),
    "nano, context 1024": (GPTConfig.preset("nano", vocab_size=1024, context_length=1024), 2),
}
END_OF_TEXT, MEAN_LENGTH = 0, 200
LEARNING_RATE = 3e-4
LIMIT = 1.15
"""The most that a step at context 256 may take, as a multiple of one without a mask."""


def batches(config: GPTConfig, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(1, config.vocab_size, (rows, config.context_length + 1), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 1 / MEAN_LENGTH] = END_OF_TEXT
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def trainer(config: GPTConfig, rows: int, steps: int, *, masked: bool) -> Callable[[], None]:
    """Takes some steps of a compiled model at each call."""
    compute = choose_compute("cpu", "auto")
    compute.set_deterministic(False)
    torch.manual_seed(0)
    options = OptimizationOptions(optimizer="adamw", learning_rate=LEARNING_RATE, document_mask=masked)
    stepper = Stepper(GPT(config), options, compute, separator=END_OF_TEXT if masked else None)
    data, numbers = batches(config, rows), iter(range(10**9))
    compilation, _ = prepare(stepper, next(data), [rows], "whole")
    assert compilation.compiled, compilation.reason

    def run() -> None:
        for _ in range(steps):
            float(stepper(next(data), LEARNING_RATE, next(numbers)).loss)

    run()  # the first step finds cold caches
    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    given = parser.parse_args()
    results: dict[str, object] = {"limit": LIMIT}
    for name in given.only:
        config, rows = SHAPES[name]
        variants = {
            "without": trainer(config, rows, given.steps, masked=False),
            "--document-mask": trainer(config, rows, given.steps, masked=True),
        }
        seconds = alternate(variants, given.rounds)
        table(f"{name}: {given.steps} steps of {rows} sequences", seconds, "without")
        pairs = zip(seconds["--document-mask"], seconds["without"], strict=True)
        ratio = statistics.median(masked / plain for masked, plain in pairs)
        print(f"  with the mask a step takes {ratio:.3f} times as long (median of the rounds)")
        results[name] = {"seconds": seconds, "ratio": ratio}
    save_results("document_mask", results)


if __name__ == "__main__":
    main()
