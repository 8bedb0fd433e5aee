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
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import ask, compute_dtype, rounds, save_results

SHAPE = {"vocab_size": 50304, "context_length": 256, "emb_dim": 384, "n_heads": 6, "n_layers": 6}
GATED = {"hidden_dim": 1024, "n_kv_groups": 3}
BATCH = 8
TOKENS = BATCH * SHAPE["context_length"]
LEARNING_RATE = 3e-4
DTYPE = compute_dtype()
Step = Callable[[Tensor, Tensor], float]


def _torch_step(
    model: torch.nn.Module, logits: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, autocast: bool = True
) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and DTYPE is torch.bfloat16):
            loss = F.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def transformers() -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": SHAPE["emb_dim"], "n_layer": SHAPE["n_layers"], "n_head": SHAPE["n_heads"], "use_cache": False}
    sizes |= {"vocab_size": SHAPE["vocab_size"], "n_positions": SHAPE["context_length"]}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return _torch_step(model, lambda ids: compiled(ids).logits, optimizer)


def nanogpt() -> Step:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.convert.peers import NanoGPT

    model = NanoGPT(
        SHAPE["n_layers"], SHAPE["n_heads"], SHAPE["emb_dim"], SHAPE["context_length"], False, SHAPE["vocab_size"], 0.0
    )
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.02)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return _torch_step(model, torch.compile(model), torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True))


def litgpt() -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(
        Config(
            block_size=SHAPE["context_length"],
            padded_vocab_size=SHAPE["vocab_size"],
            n_layer=SHAPE["n_layers"],
            n_head=SHAPE["n_heads"],
            n_embd=SHAPE["emb_dim"],
        )
    )
    return _torch_step(model, torch.compile(model), torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


def book_optimised() -> Step:
    from llms_from_scratch.ch04 import GPTModelFast

    model = GPTModelFast({**SHAPE, "drop_rate": 0.0, "qkv_bias": False}).to(DTYPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return _torch_step(model, torch.compile(model), optimizer, autocast=False)


def book_baseline() -> Step:
    from llms_from_scratch.ch04 import GPTModel

    model = GPTModel({**SHAPE, "drop_rate": 0.0, "qkv_bias": False})
    return _torch_step(model, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), autocast=False)


def transformers_decoder(family: str) -> Step:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["emb_dim"],
        intermediate_size=GATED["hidden_dim"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=GATED["n_kv_groups"],
        head_dim=SHAPE["emb_dim"] // SHAPE["n_heads"],
        max_position_embeddings=SHAPE["context_length"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return _torch_step(model, lambda ids: compiled(ids).logits, optimizer)


def litgpt_llama() -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(
        Config(
            block_size=SHAPE["context_length"],
            padded_vocab_size=SHAPE["vocab_size"],
            n_layer=SHAPE["n_layers"],
            n_head=SHAPE["n_heads"],
            n_embd=SHAPE["emb_dim"],
            n_query_groups=GATED["n_kv_groups"],
            intermediate_size=GATED["hidden_dim"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    return _torch_step(model, torch.compile(model), torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


def book_llama() -> Step:
    from llms_from_scratch.llama3 import Llama3Model

    model = Llama3Model({**SHAPE, **GATED, "rope_base": 10_000.0, "rope_freq": None, "dtype": torch.float32})
    return _torch_step(model, torch.compile(model), torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


def onym(tied: bool, arch: str = "gpt2") -> Step:
    from onym.gpt.kinds import config_of
    from onym.gpt.models import make_model
    from onym.train.dry_run import prepare
    from onym.train.options import OptimizationOptions
    from onym.train.precision import choose_compute
    from onym.train.step import Stepper

    compute = choose_compute("cpu", "auto")
    compute.set_deterministic(False)
    shape = SHAPE if arch == "gpt2" else {**SHAPE, **GATED}
    model = make_model(config_of(arch, "nano", **shape, tie_embeddings=tied))
    stepper = Stepper(model, OptimizationOptions(optimizer="adamw", learning_rate=LEARNING_RATE), compute)
    batch = (torch.zeros(BATCH, SHAPE["context_length"], dtype=torch.long),) * 2
    prepare(stepper, batch, [BATCH], "whole")
    steps = iter(range(10**9))
    return lambda inputs, targets: float(stepper((inputs, targets), LEARNING_RATE, next(steps)).loss)


GPT2: dict[str, Callable[[], Step]] = {
    "onym": lambda: onym(True),
    "onym, untied": lambda: onym(False),
    "transformers": transformers,
    "nanoGPT's recipe": nanogpt,
    "litgpt": litgpt,
    "the book, optimised": book_optimised,
    "the book, baseline": book_baseline,
}
DECODERS: dict[str, Callable[[], Step]] = {
    "onym, llama": lambda: onym(True, "llama"),
    "onym, qwen3": lambda: onym(True, "qwen3"),
    "onym, llama, untied": lambda: onym(False, "llama"),
    "transformers, Llama": lambda: transformers_decoder("Llama"),
    "transformers, Qwen3": lambda: transformers_decoder("Qwen3"),
    "litgpt, Llama": litgpt_llama,
    "the book, Llama3Model": book_llama,
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
    step = (GPT2 | DECODERS)[name]()
    generator = torch.Generator().manual_seed(1)
    for line in sys.stdin:
        seconds, loss = [], 0.0
        for _ in range(1 + int(line)):
            ids = torch.randint(SHAPE["vocab_size"], (BATCH, SHAPE["context_length"] + 1), generator=generator)
            start = time.perf_counter()
            loss = step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            seconds.append(time.perf_counter() - start)
        status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
        # The first step of a turn finds cold caches, and pages that the system has set aside meanwhile.
        print(
            json.dumps({"seconds": seconds[1:], "loss": loss, "peak_mib": int(status["VmHWM"].split()[0]) / 1024}), flush=True
        )
        # What compiling took at its peak is over; from now on the steps' own counts.
        Path("/proc/self/clear_refs").write_text("5")


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
