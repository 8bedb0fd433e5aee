"""What a step costs as the model grows: tokens a second times the operations of a token, from 5M to 350M parameters.

    python bench/sizes.py [--rounds 3]

The step of `onym train`, compiled, each size in a process of its own, taking turns; context 256, 2 to 8 sequences a step. The
rate is in operations of matrix products, by metering.training_flops_per_token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from _measure import ask, rounds, save_results

SHAPES = {  # width, layers, heads, sequences a step
    "5M": (192, 6, 3, 8),
    "15M": (320, 8, 5, 8),
    "40M": (512, 10, 8, 8),
    "125M": (768, 12, 12, 4),
    "350M": (1024, 24, 16, 2),
}
VOCABULARY, CONTEXT = 8192, 256


def child(name: str) -> None:
    from onym import GPT, GPTConfig
    from onym.train.dry_run import prepare
    from onym.train.metering import training_flops_per_token
    from onym.train.options import OptimizationOptions
    from onym.train.precision import choose_compute
    from onym.train.step import Stepper

    width, layers, heads, sequences = SHAPES[name]
    config = GPTConfig(VOCABULARY, CONTEXT, width, heads, layers, drop_rate=0.0)
    compute = choose_compute("cpu", "auto")
    compute.set_deterministic(False)
    model = GPT(config)
    stepper = Stepper(model, OptimizationOptions(optimizer="adamw"), compute)
    ids = torch.randint(VOCABULARY, (sequences, CONTEXT + 1))
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    prepare(stepper, batch, [sequences], "whole")
    stepper(batch, 1e-4, 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            stepper(batch, 1e-4, 1)
            seconds.append(time.perf_counter() - start)
        tokens = sequences * CONTEXT
        answer = {"seconds": seconds, "tokens": tokens, "parameters": parameters}
        print(json.dumps({**answer, "flops": training_flops_per_token(config)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    children, found = {}, {}
    for name in SHAPES:
        command = [sys.executable, __file__, "--child", name]
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ask(children[name], 1)
    seconds: dict[str, list[float]] = {name: [] for name in children}
    for _ in rounds(given.rounds):
        for name, process in children.items():
            found[name] = ask(process, 2)
            seconds[name] += found[name]["seconds"]
    for process in children.values():
        process.stdin.close()
        process.wait()
    rates = {}
    for name, each in found.items():
        tokens_per_second = each["tokens"] / statistics.median(seconds[name])
        rates[name] = tokens_per_second * each["flops"] / 1e9
        print(f"{each['parameters'] / 1e6:6.1f}M  {tokens_per_second:8,.0f} tokens/s  {rates[name]:5.0f} GFLOP/s")
    share = min(rates.values()) / max(rates.values())
    print(f"the lowest is {share:.0%} of the best")
    save_results("sizes", {"seconds": seconds, "gflops_per_second": rates, "lowest_share": share, "target": 0.75})


if __name__ == "__main__":
    main()
