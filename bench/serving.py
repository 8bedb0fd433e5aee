"""The server against its engine alone, one client against eight, and against the peers' servers.

    python bench/serving.py [--rounds 5] [--tokens 64] [--shape gpt2-small]

The same weights (drawn with a fixed seed), prompts of about 32 tokens, a new one each time, greedy, equally many new tokens,
over HTTP on loopback; each server is a process of its own, and they take turns, in an order that turns:

    engine         the same requests to the engine in a process, without a server: against it the overhead is measured
    onym           onym serve, with one slot and with eight, bf16 where the device multiplies it in hardware, compiled
    transformers   transformers serve, as it is by default and with --continuous-batching; needs fastapi, else left out
    llama.cpp      its server in weights of equal width, eight slots

Tokens a second are new tokens by wall-clock time of a whole request, or of eight at once; the first token is the time to the
first event of a stream. ``--load`` instead measures latencies under load: 64 clients for 60 s, a queue of 32.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import _generating_peers as peers
from _measure import rounds, save_results
from generating import SHAPES, TRIALS, config_of

ENGINE = """
import json, sys, time
import onym
from onym.generation.engine import Engine, Request
from onym.generation.sampling import Sampling
engine = Engine(onym.load_model(sys.argv[1]), slots=int(sys.argv[2]), compile="on")
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    began = time.perf_counter()
    first = None
    greedy = {"max_new_tokens": asked["tokens"], "sampling": Sampling(temperature=0)}
    for event in engine.run([Request(prompt, **greedy) for prompt in asked["prompts"]]):
        first = first or time.perf_counter() - began
    print(json.dumps([time.perf_counter() - began, first]), flush=True)
"""
LLAMA = """
import sys, time
import xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path = sys.argv[1]
asked.n_ctx, asked.n_parallel, asked.port, asked.verbosity = int(sys.argv[2]) * 8, 8, int(sys.argv[3]), 0
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(asked)
time.sleep(1e6)
"""
Ask = Callable[[list[str], int], tuple[float, float]]
"""Prompts at once, and how many tokens for each: seconds to the end, and to the first token."""


def prompts(random_: random.Random, count: int) -> list[str]:
    """Texts of 32 tokens of the tokenizer of :func:`peers.export` or a few more: whole words of Python sources."""
    words = ["return", " self", " name", " value", " import", " error", " list", " type", " data", " time"]
    return ["".join(random_.choice(words) for _ in range(16)) for _ in range(count)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def post(port: int, body: dict[str, Any]) -> tuple[float, float, int, int]:
    """Seconds to the end and to the first event, status, tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first = answer.readline() if body["stream"] else b""
    first_s = time.perf_counter() - began
    content = first + answer.read()
    connection.close()
    tokens = 0
    if answer.status == 200 and not body["stream"]:
        tokens = (json.loads(content).get("usage") or {}).get("completion_tokens", 0)
    return time.perf_counter() - began, first_s, answer.status, tokens


def client(port: int, model: str) -> Ask:
    # For a token that is a part of a character Onym sends nothing, unless ids are asked for; random weights write such ones.
    further = {"return_token_ids": True} if model == "model" else {}

    def ask(texts: list[str], tokens: int) -> tuple[float, float]:
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": tokens < 8, **further}
        began = time.perf_counter()
        with ThreadPoolExecutor(len(texts)) as threads:
            answers = list(threads.map(lambda text: post(port, {**body, "prompt": text}), texts))
        for _, _, status, written in answers:
            assert status == 200, status
            assert body["stream"] or written == tokens, f"{written} of {tokens} tokens"
        return time.perf_counter() - began, max(first for _, first, _, _ in answers)

    return ask


@contextmanager
def served(command: list[str], port: int, log: Path, model: str, environment: dict[str, str] | None = None) -> Iterator[Ask]:
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(environment or {})})
    ask, end = client(port, model), time.monotonic() + 300
    try:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            try:
                ask(["return self"], 2)
                break
            except (OSError, AssertionError):
                time.sleep(0.5)
        yield ask
    finally:
        process.kill()
        process.wait()


@contextmanager
def engine(folder: Path, slots: int) -> Iterator[Ask]:
    from onym.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(folder / "onym"), str(slots)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def ask(texts: list[str], tokens: int) -> tuple[float, float]:
        asked = {"prompts": [tokenizer.encode(text) for text in texts], "tokens": tokens}
        print(json.dumps(asked), file=process.stdin, flush=True)
        total, first = json.loads(process.stdout.readline())
        return total, first

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def export(shape: str, folder: Path) -> None:
    """The weights in each program's format, and one tokenizer for all."""
    from onym.gpt.models import make_model

    torch.manual_seed(0)
    peers.export(make_model(config_of(shape)).eval(), folder)
    (folder / "tokenizer.json").write_text(peers.small_tokenizer().to_json())
    (folder / "transformers" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "transformers" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shape", choices=list(SHAPES), default="gpt2-small")
    parser.add_argument("--load", type=float, default=0.0, metavar="SECONDS")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        export(given.shape, folder)
        if given.load:
            load(folder, given.load)
            return
        asks: dict[str, Ask] = {}
        context = config_of(given.shape).context_length
        for slots in (1, 8):
            asks[f"engine, {slots} slots"] = stack.enter_context(engine(folder, slots))
            asks[f"onym, {slots} slots"] = stack.enter_context(onym_server(folder, slots, 32, free_port()))
        if importlib.util.find_spec("fastapi") is None:
            print("transformers serve is left out: it needs fastapi (pip install fastapi)", file=sys.stderr)
        else:
            path = str(folder / "transformers")
            for how in ((), ("--continuous-batching",)):
                port = free_port()
                command = [sys.executable, "-m", "transformers.cli.transformers", "serve", path, "--port", str(port), *how]
                command += ["--dtype", "bfloat16" if bf16() else "float32", "--device", "cpu"]
                name_ = "transformers" + (", continuous batching" if how else "")
                try:
                    log = folder / f"transformers{len(how)}.log"
                    asks[name_] = stack.enter_context(served(command, port, log, path, {"HF_HUB_OFFLINE": "1"}))
                except AssertionError as error:
                    print(f"{name_} is left out: {str(error)[-600:]}", file=sys.stderr)
        for kind in ("F16", "BF16") if bf16() else ("F32",):
            port = free_port()
            command = [
                sys.executable,
                "-c",
                LLAMA,
                str(folder / f"{kind}.gguf"),
                str(context),
                str(port),
                str(torch.get_num_threads()),
            ]
            asks[f"llama.cpp {kind}"] = stack.enter_context(served(command, port, folder / f"{kind}.log", "any"))
        compare(asks, given)


def bf16() -> bool:
    from onym.gpt.hardware import computes_in_bf16

    return computes_in_bf16(torch.device("cpu"))


def onym_server(folder: Path, slots: int, queue: int, port: int) -> Any:
    command = [sys.executable, "-m", "onym", "serve", f"model={folder / 'onym'}", "--port", str(port), "--compile", "on"]
    command += ["--tokenizer", str(folder / "tokenizer.json")]
    return served([*command, "--slots", str(slots), "--queue", str(queue)], port, folder / f"onym-{slots}.log", "model")


def compare(asks: dict[str, Ask], given: argparse.Namespace) -> None:
    random_ = random.Random(1)
    of_one: dict[str, list[float]] = {name: [] for name in asks}
    of_eight: dict[str, list[float]] = {name: [] for name in asks}
    first: dict[str, list[float]] = {name: [] for name in asks}
    for number in rounds(given.rounds):
        names = list(asks) if number % 2 == 0 else list(reversed(asks))
        for name in names:
            ask = asks[name]
            if "1 slots" not in name:
                total, _ = ask(prompts(random_, 8), given.tokens)
                of_eight[name].append(8 * given.tokens / total)
            total, _ = ask(prompts(random_, 1), given.tokens)
            of_one[name].append(given.tokens / total)
            first[name] += [ask(prompts(random_, 1), 2)[1] for _ in range(3)]
    figures = {
        name: {
            "one": statistics.median(of_one[name]),
            "eight": statistics.median(of_eight[name]) if of_eight[name] else None,
            "first_token_ms": 1e3 * statistics.median(first[name]),
        }
        for name in asks
    }
    print(f"\n{given.shape}, {given.tokens} tokens, {torch.get_num_threads()} threads: tokens/s of 1 client, of 8; first token")
    for name, row in figures.items():
        eight = f"{row['eight']:9.1f}" if row["eight"] else "        -"
        print(f"  {name:<36} {row['one']:8.1f} {eight}   {row['first_token_ms']:7.1f} ms")
    ratio = figures["onym, 1 slots"]["one"] / figures["engine, 1 slots"]["one"]
    added = figures["onym, 1 slots"]["first_token_ms"] - figures["engine, 1 slots"]["first_token_ms"]
    print(f"\n  server / engine, 1 client, 1 slot: {ratio:.3f}x of its tokens/s, {added:+.1f} ms on the first token")
    print(f"  8 clients / 1 client, 8 slots: {figures['onym, 8 slots']['eight'] / figures['onym, 8 slots']['one']:.2f}x")
    print(
        f"  8 clients, 8 slots / 1 client, 1 slot: {figures['onym, 8 slots']['eight'] / figures['onym, 1 slots']['one']:.2f}x"
    )
    for peer in ("transformers", "llama.cpp"):
        for clients, mine in (("one", "onym, 1 slots"), ("eight", "onym, 8 slots")):
            best = max((row[clients] for name, row in figures.items() if name.startswith(peer)), default=None)
            if best:
                print(f"  onym / {peer}, {clients}: {figures[mine][clients] / best:.2f}x")
    if given.shape not in TRIALS:
        save_results("serving", {"shape": given.shape, "tokens": given.tokens, "servers": figures})


def load(folder: Path, seconds: float) -> None:
    """64 clients that ask without a pause."""
    outcomes: Counter[int] = Counter()
    latencies: list[float] = []
    port = free_port()
    with onym_server(folder, 8, 32, port):
        end = time.monotonic() + seconds

        def keep_asking(number: int) -> None:
            random_ = random.Random(number)
            while time.monotonic() < end:
                body = {"model": "model", "max_tokens": 16, "seed": number, "stream": False, "prompt": prompts(random_, 1)[0]}
                total, _, status, tokens = post(port, body)
                outcomes[status] += 1
                if status == 200:
                    assert tokens <= 16
                    latencies.append(total)
                else:
                    time.sleep(0.2)

        with ThreadPoolExecutor(64) as threads:
            list(threads.map(keep_asking, range(64)))
    latencies.sort()
    median, high = statistics.median(latencies), latencies[int(len(latencies) * 0.99)]
    print(f"64 clients, {seconds:.0f} s: {dict(outcomes)}; latency p50 {median:.2f} s, p99 {high:.2f} s")


if __name__ == "__main__":
    main()
