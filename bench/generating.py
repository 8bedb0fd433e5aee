"""Decoding against the peers': tokens a second, the share of what the memory's bandwidth allows, and the first token.

    python bench/generating.py [--rounds 5] [--tokens 128] [--shapes gpt2-small decoder-small 15m] [--batch 1 8] [--only onym]

The same weights (drawn with a fixed seed) in each program's own format, the same prompts of 32 tokens, new ones each time and
never the same twice, so that no prefix cache helps; greedy, equally many new tokens, as many threads as torch takes by default.
Each program runs in a process of its own, which computes only while it is asked to; they take turns, in an order that turns:

    before              the generate of commit 77c8546: fp32, eager, a cache that grows; batch 1
    transformers        generate with the dynamic and the static cache, eager and compiled (static: the decode step alone, as
                        it does by itself on a GPU; dynamic: model.forward with dynamic shapes); fp32 and bf16
    book                its GPT-2 with the KV cache and generate_text_simple, fp32; batch 1, GPT-2 alone
    llama.cpp           its server: F32, F16, BF16, Q8_0; 8 prompts are in 8 slots
    onym                the engine with one slot a prompt: fp32, bf16, int8, eager and compiled

Tokens a second count from where every prompt has its first new token; they are the sum over the prompts. The limit: bandwidth
divided by the bytes that a step reads, which are the weights (every matrix but the embeddings; the head, tied or not) once, and
for each prompt keys and values at the middle length. The bandwidth is the best that reading 1 GiB of fp32 reaches in the same
rounds, as a sum and as a product of a matrix and a vector. The first token is that of a prompt of 512 tokens (one less than the
context where that is shorter), against a plain forward pass over the same prompt in the same dtype (int8: bf16).

``alike`` is how many greedy tokens, of the first prompt's, equal those of the first program of the table, before one differs:
they compute the same model. Narrower dtypes leave each other earlier, as logits of random weights lie close together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import _generating_peers as peers
from _measure import ask, rounds, save_results

BEFORE = "77c8546"
PROMPT = 32
LONG = 512
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"arch": "gpt2", "preset": "gpt2-small"},
    "decoder-small": {"arch": "qwen3", "preset": "small"},
    "15m": {"arch": "gpt2", "preset": "mini", "vocab_size": 12288},  # 6 layers of 384, 6 heads, context 256, untied
    "tiny": {"arch": "gpt2", "preset": "nano", "vocab_size": 1024, "n_layers": 2},
    "tiny-decoder": {"arch": "qwen3", "preset": "nano", "vocab_size": 1024, "n_layers": 2},
}
TRIALS = ("tiny", "tiny-decoder")
"""For trying this file itself: they say nothing about speed."""


def config_of(shape: str) -> Any:
    from onym.gpt import kinds

    return kinds.config_of(**SHAPES[shape])


def child(name: str, folder: Path, batch: int) -> None:
    """Answer lines of standard input, ``decode NEW_TOKENS SEED`` or ``first PROMPT_TOKENS SEED``, in seconds and token ids."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    config = json.loads((folder / "config.json").read_text())
    peer = peers.VARIANTS[name].opens(folder, batch)
    for line in sys.stdin:
        what, count, seed = line.split()
        length = PROMPT if what == "decode" else int(count)
        generator = torch.Generator().manual_seed(int(seed))
        prompts = torch.randint(config["vocab_size"], (batch, length), generator=generator).tolist()
        if what == "decode":
            answer = asdict(peer.decode(prompts, int(count)))
        else:
            answer = {"first_s": peer.decode(prompts, 1).total_s, "forward_s": peer.forward(prompts[0])}
        print(json.dumps(answer), file=answers, flush=True)


class Bandwidth:
    """Bytes a second that this machine reads, on all threads."""

    def __init__(self) -> None:
        self.matrix, self.vector = torch.ones(16384, 16384), torch.ones(16384)
        self.measured: list[float] = []

    def measure(self) -> None:
        for run in (self.matrix.sum, lambda: torch.mv(self.matrix, self.vector)):
            self.measured += [self.matrix.nbytes / peers.timed(run) for _ in range(3)]


def limit(config: Any, model: torch.nn.Module, name: str, batch: int, tokens: int, bandwidth: float) -> float:
    """Tokens a second, of all prompts, that reading weights, keys and values allows."""
    width = peers.WIDTHS[peers.VARIANTS[name].dtype]
    weights = sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear)) * width
    heads = getattr(config, "n_kv_groups", None) or config.n_heads
    size = getattr(config, "head_dim", None) or config.emb_dim // config.n_heads
    cached = 2 * config.n_layers * heads * size * (PROMPT + tokens / 2)
    return batch * bandwidth / (weights + batch * cached * (4 if width == 4 and "llama" not in name else 2))


def started(names: list[str], folder: Path, batch: int, given: argparse.Namespace, long: int) -> tuple[dict, dict]:
    """Those that work, warm, each with the tokens that it gave; why others do not is printed."""
    children, ids = {}, {}
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--batch", str(batch)]
        environment = dict(os.environ)
        if name == "before":
            environment["PYTHONPATH"] = str(folder.parent / "before" / "src")
        began = time.perf_counter()
        errors = folder / "errors.txt"
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )
        try:  # one after the other, so that nothing else computes
            answer = ask(process, f"decode {given.tokens} 1")
            for seed in range(2, 6 if "compiled" in name else 4, 2):  # which compile anew after another length
                if batch == 1:
                    ask(process, f"first {long} {seed}")
                ask(process, f"decode {given.tokens} {seed + 1}")
        except (ValueError, BrokenPipeError):
            process.wait()
            said = [line for line in errors.read_text().splitlines() if line.strip()]
            print(f"  {name:<36} left out: {said[-1][:150] if said else process.returncode}", flush=True)
            continue
        print(f"  {name:<36} ready after {time.perf_counter() - began:5.1f} s", flush=True)
        children[name], ids[name] = process, answer["ids"]
    return children, ids


def measure(shape: str, folder: Path, model: torch.nn.Module, batch: int, given: argparse.Namespace, read: Bandwidth) -> dict:
    """One table: of each variant, the medians of what was measured."""
    config = model.config
    long = min(LONG, config.context_length - 1)
    chosen = [
        name
        for name, variant in peers.VARIANTS.items()
        if batch == 1 or variant.batched
        if not variant.gpt2_only or SHAPES[shape]["arch"] == "gpt2"
        if not given.only or any(name.startswith(each) for each in given.only)
    ]
    print(f"\n{shape}, batch {batch}", flush=True)
    children, ids = started(chosen, folder, batch, given, long)
    rates: dict[str, list[float]] = {name: [] for name in children}
    others: dict[str, dict[str, list[float]]] = {name: {} for name in children}
    read.measured = []
    for number in rounds(given.rounds):
        for name in list(children) if number % 2 == 0 else list(reversed(children)):
            time.sleep(0.5)  # until the threads of the one before have stopped waiting for more in a loop
            seed = 100 + 2 * number
            answer = ask(children[name], f"decode {given.tokens} {seed}")
            rates[name].append(answer["tokens"] / answer["decode_s"])
            answer = {"prefill_s": answer["prefill_s"]}
            if batch == 1:
                answer |= ask(children[name], f"first {long} {seed + 1}")
            for key, value in answer.items():
                others[name].setdefault(key, []).append(value)
        time.sleep(0.5)
        read.measure()
    for process in children.values():
        process.stdin.close()
        process.wait()
    bandwidth = max(read.measured)
    rows = {}
    for name in children:
        row = {"tokens_per_second": statistics.median(rates[name]), "all": rates[name]}
        row["limit"] = limit(config, model, name, batch, given.tokens, bandwidth)
        row |= {key: statistics.median(values) for key, values in others[name].items()}
        first = next(iter(ids.values()))[0]
        row["alike"] = next(
            (at for at, pair in enumerate(zip(ids[name][0], first, strict=True)) if len(set(pair)) > 1), len(first)
        )
        rows[name] = row
    show(rows, bandwidth, given.tokens)
    return {"bandwidth": bandwidth, "rows": rows}


def show(rows: dict[str, Any], bandwidth: float, tokens: int) -> None:
    theirs = best(rows, "transformers")
    print(f"\n{'':<38}{'tokens/s':>9}{'(min .. max)':>24}{'/ transformers':>16}{'of limit':>10}{'first/pass':>12}{'alike':>10}")
    for name, row in rows.items():
        speed = row["tokens_per_second"]
        spread = f"({min(row['all']):,.1f} .. {max(row['all']):,.1f})"
        ratio = f"{speed / theirs:.2f}" if theirs else "-"
        first = f"{row['first_s'] / row['forward_s']:.2f}" if "first_s" in row else "-"
        share = f"{speed / row['limit']:.0%}"
        print(f"  {name:<36}{speed:9,.1f}{spread:>24}{ratio:>16}{share:>10}{first:>12}{row['alike']:>6}/{tokens}")
    print(f"  bandwidth {bandwidth / 1e9:.1f} GB/s", flush=True)


def best(rows: dict[str, Any], *starts: str) -> float | None:
    """Tokens a second of the fastest variant whose name begins so."""
    return max((row["tokens_per_second"] for name, row in rows.items() if name.startswith(starts)), default=None)


LOSSLESS = ("onym fp32", "onym bf16")


def targets(results: dict[str, dict[int, dict]]) -> list[dict[str, Any]]:
    """Each of the issue's targets, where both sides were measured."""
    found: list[dict[str, Any]] = []

    def target(shape: str, what: str, ours: float | None, theirs: float | None, least: float, at_most: bool = False) -> None:
        if ours and theirs:
            value = ours / theirs
            reached = value <= least if at_most else value >= least
            found.append({"shape": shape, "target": what, "value": value, "asked": least, "reached": reached})

    for shape, batches in results.items():
        for batch, table in batches.items():
            rows, where = table["rows"], f"{shape}, batch {batch}"
            fastest = max(
                (name for name in rows if name.startswith(LOSSLESS)),
                key=lambda name: rows[name]["tokens_per_second"],
                default=None,
            )
            for peer, least in (("before", 4.0), ("book", 3.0)):
                if peer == "book" or shape == "gpt2-small":
                    target(where, f"onym's best dtype / {peer}", best(rows, *LOSSLESS), best(rows, peer), least)
                    target(where, f"onym fp32 / {peer}", best(rows, "onym fp32"), best(rows, peer), least)
            for dtype in ("fp32", "bf16"):
                theirs = best(rows, f"transformers {dtype}")
                target(where, f"{dtype}: onym / transformers' best", best(rows, f"onym {dtype}"), theirs, 1.5)
            for dtype, equal in peers.EQUALS.items():
                theirs = best(rows, *(f"llama.cpp {kind}" for kind in equal))
                target(where, f"{dtype}: onym / llama.cpp {' or '.join(equal)}", best(rows, f"onym {dtype}"), theirs, 0.9)
            if fastest is not None and batch == 1:
                row, least = rows[fastest], 0.6 if shape == "15m" else 0.8
                target(where, f"{fastest}: share of the limit", row["tokens_per_second"], row["limit"], least)
                target(where, f"{fastest}: first token / forward pass", row["first_s"], row["forward_s"], 1.1, at_most=True)
        if {1, 8} <= batches.keys():
            one, eight = (best(batches[batch]["rows"], *LOSSLESS) for batch in (1, 8))
            target(shape, "batch 8 / batch 1, onym's best dtypes", eight, one, 3.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=[name for name in SHAPES if name not in TRIALS])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--only", nargs="*", help="how names of variants begin")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.folder, given.batch[0])
        return
    from onym.gpt.models import make_model

    read, results = Bandwidth(), dict[str, dict[int, dict]]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "before").mkdir()
        archive = subprocess.run(
            ["git", "archive", BEFORE, "src"], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(root / "before")], input=archive.stdout, check=True)
        for shape in given.shapes:
            torch.manual_seed(0)
            model = make_model(config_of(shape)).eval()
            folder = root / shape
            folder.mkdir()
            peers.export(model, folder)
            results[shape] = {batch: measure(shape, folder, model, batch, given, read) for batch in given.batch}
    reached = targets(results)
    print()
    for each in reached:
        sign = "at most" if "forward pass" in each["target"] else "at least"
        verdict = "yes" if each["reached"] else "no"
        print(f"{each['shape']:<24} {each['target']:<48} {each['value']:6.2f}  ({sign} {each['asked']}: {verdict})")
    if not given.only and not set(given.shapes) & set(TRIALS):
        settings = {"rounds": given.rounds, "tokens": given.tokens, "prompt": PROMPT, "threads": torch.get_num_threads()}
        save_results("generating", {**settings, "tables": results, "targets": reached})


if __name__ == "__main__":
    main()
