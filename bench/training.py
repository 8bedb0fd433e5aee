"""A training step against the peers': speed, the share of what the products alone would take, and memory at the peak.

    python bench/training.py [--table gpt2 decoder] [--rounds 7] [--steps 4] [--only onym transformers]

GPT-2's shape, 6 layers of 384, 6 heads, vocabulary 50304, context 256, 8 sequences a step, no dropout. Each trains in a process
of its own, which computes only while it is asked to: the peers take turns, a few steps each, in an order that turns. A step is
forward, backward, clipping, AdamW, zeroing. All but the book's baseline are compiled, and compute in bf16 where the CPU has
instructions for it (else in fp32, and the share of the products' time is of fp32), each as its own project does it:

    transformers        GPT2LMHeadModel, torch.compile, autocast; head tied to the embedding
    nanoGPT's recipe    its layout (no biases, exact GELU, tied), torch.compile, autocast, fused AdamW in two groups
    litgpt              its GPT with a GPT-2's sizes (rotary positions, untied), torch.compile, autocast, fused AdamW
    the book, optimised GPTModelFast, weights and AdamW's state in that dtype, torch.compile, fused AdamW; untied
    the book, baseline  GPTModel, fp32, eager, AdamW; untied
    onym               what onym train does, with the guard on loss and gradient; tied and untied

The second table is that of the other model: the same sizes with a gated feed-forward of 1024 and 3 heads of keys and values.

    transformers, Llama and Qwen3   torch.compile, autocast, fused AdamW; tied
    litgpt, Llama                   its GPT with Llama's parts, torch.compile, autocast, fused AdamW; untied
    the book, Llama3Model           torch.compile, autocast, fused AdamW; untied
    onym                            --arch llama and qwen3, tied; and llama untied

The products alone: each shape of a step, forward and backward, multiplied into memory that is there already, in this
process, in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import _training_peers as peers
from _measure import ask, begin_peak, compute_dtype, peak_mib, rounds, save_results
from _training_peers import Setting, Trainee

SHAPE = {"vocab_size": 50304, "context_length": 256, "emb_dim": 384, "n_heads": 6, "n_layers": 6}
GATED = {"hidden_dim": 1024, "n_kv_groups": 3}
BATCH = 8
TOKENS = BATCH * SHAPE["context_length"]
DTYPE = compute_dtype()

GPT2: dict[str, Callable[[Setting], Trainee]] = {
    "onym": peers.onym,
    "onym, untied": lambda setting: peers.onym(setting, tied=False),
    "transformers": peers.transformers,
    "nanoGPT's recipe": peers.nanogpt,
    "litgpt": peers.litgpt,
    "the book, optimised": peers.book_optimised,
    "the book, baseline": peers.book_baseline,
}
DECODERS: dict[str, Callable[[Setting], Trainee]] = {
    "onym, llama": lambda setting: peers.onym(setting, arch="llama"),
    "onym, qwen3": lambda setting: peers.onym(setting, arch="qwen3"),
    "onym, llama, untied": lambda setting: peers.onym(setting, tied=False, arch="llama"),
    "transformers, Llama": lambda setting: peers.transformers_decoder(setting, "Llama"),
    "transformers, Qwen3": lambda setting: peers.transformers_decoder(setting, "Qwen3"),
    "litgpt, Llama": peers.litgpt_llama,
    "the book, Llama3Model": peers.book_llama,
}
TABLES = {"gpt2": GPT2, "decoder": DECODERS}


def products(table: str) -> Callable[[], float]:
    """Seconds of a step's products, one shape after the other, each as often as a step has it."""
    width, layers, vocabulary = SHAPE["emb_dim"], SHAPE["n_layers"], SHAPE["vocab_size"]
    if table == "gpt2":
        kinds = {(width, 3 * width): layers, (width, width): layers, (width, 4 * width): layers, (4 * width, width): layers}
    else:
        hidden, groups = GATED["hidden_dim"], GATED["n_kv_groups"] * width // SHAPE["n_heads"]
        kinds = {(width, width): 2 * layers, (width, groups): 2 * layers}
        kinds |= {(width, hidden): 2 * layers, (hidden, width): layers}
    kinds[(width, vocabulary)] = 1
    heads, time_, size = BATCH * SHAPE["n_heads"], SHAPE["context_length"], width // SHAPE["n_heads"]
    runs: list[tuple[int, Callable[[], object]]] = []

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(DTYPE)

    def add(times: int, a: Tensor, b: Tensor) -> None:
        out = (a @ b).clone()
        runs.append((times, lambda: torch.matmul(a, b, out=out)))

    for (inputs, outputs), times in kinds.items():
        x, w, g = random(TOKENS, inputs), random(outputs, inputs), random(TOKENS, outputs)
        add(times, x, w.t())
        add(times, g, w)
        add(times, g.t(), x)
    square, long = random(heads, time_, time_), random(heads, time_, size)
    add(2 * layers, long, long.transpose(1, 2))  # scores; the gradient of the weights
    add(4 * layers, square, long)  # values; the gradients of values, queries and keys

    def once() -> float:
        total = 0.0
        for times, run in runs:
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                run()
                best = min(best, time.perf_counter() - start)
            total += times * best
        return total

    return once


def child(name: str) -> None:
    """Answer each line of standard input, a number of steps, with their seconds and the memory at the peak in MiB."""
    torch.manual_seed(0)
    step = (GPT2 | DECODERS)[name](Setting(SHAPE, GATED, BATCH, torch.device("cpu"), DTYPE)).step
    generator = torch.Generator().manual_seed(1)
    for line in sys.stdin:
        seconds, loss = [], 0.0
        for _ in range(1 + int(line)):
            ids = torch.randint(SHAPE["vocab_size"], (BATCH, SHAPE["context_length"] + 1), generator=generator)
            start = time.perf_counter()
            loss = float(step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
            seconds.append(time.perf_counter() - start)
        # The first step of a turn finds cold caches, and pages that the system has set aside meanwhile.
        print(json.dumps({"seconds": seconds[1:], "loss": loss, "peak_mib": peak_mib()}), flush=True)
        begin_peak()  # what compiling took at its peak is over; from now on the steps' own counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--table", nargs="*", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    for table in given.table:
        measure(table, [name for name in TABLES[table] if name in (given.only or TABLES[table])], given)


def measure(table: str, names: list[str], given: argparse.Namespace) -> None:
    """One table."""
    children = {}
    for name in names:
        command = [sys.executable, __file__, "--child", name]
        children[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        start = time.perf_counter()
        loss = ask(children[name], 2)["loss"]  # one after the other, so that nothing else computes
        print(f"{name:<22} compiled after {time.perf_counter() - start:5.1f} s, loss {loss:.3f}", flush=True)
    multiply = products(table)
    seconds: dict[str, list[float]] = {name: [] for name in children}
    peaks: dict[str, float] = {}
    alone: list[float] = []
    for number in rounds(given.rounds):
        for name in list(children) if number % 2 == 0 else list(reversed(children)):
            answer = ask(children[name], given.steps)
            seconds[name] += answer["seconds"]
            peaks[name] = answer["peak_mib"]
        alone.append(multiply())
    for process in children.values():
        process.stdin.close()
        process.wait()
    limit = statistics.median(alone)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"\nproducts alone: {limit:.3f} s a step, {TOKENS / limit:,.0f} tokens/s")
    for name, median in medians.items():
        spread = f"({min(seconds[name]):.2f} .. {max(seconds[name]):.2f} s)"
        share = f"{limit / median:4.0%} of the limit"
        print(f"{name:<22} {TOKENS / median:7,.0f} tokens/s  {spread}  {share}  {peaks[name]:6,.0f} MiB")
    results = {
        "dtype": str(DTYPE),
        "shape": SHAPE if table == "gpt2" else {**SHAPE, **GATED},
        "batch": BATCH,
        "seconds": seconds,
    }
    results |= {"products_alone": alone, "peak_mib": peaks}
    tokens_per_second = {name: round(TOKENS / median, 1) for name, median in medians.items()}
    save_results(
        "training" if table == "gpt2" else "training_decoder",
        {**results, "tokens_per_second": tokens_per_second, "share_of_limit": limit / medians[names[0]]},
    )


if __name__ == "__main__":
    main()
