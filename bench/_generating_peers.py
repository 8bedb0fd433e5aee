"""The programs that bench/generating.py compares: each opens its own copy of the same weights and decodes greedily.

Every function that opens one returns the same two calls: one that continues prompts, and one that times a plain forward pass.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

Prompts = list[list[int]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Decoded:
    """What continuing prompts took, in seconds."""

    total_s: float
    prefill_s: float
    """Until every prompt is read and has its first new token."""
    decode_s: float
    """For all tokens after the first ones."""
    tokens: int
    """How many these are."""
    ids: Prompts
    """All new tokens."""


class Peer(NamedTuple):
    """A program with the model open."""

    decode: Callable[[Prompts, int], Decoded]
    """Continue prompts of equal length, side by side, by so many tokens."""
    forward: Callable[[list[int]], float]
    """Seconds of one forward pass over a prompt, nothing cached."""


def export(model: torch.nn.Module, folder: Path) -> None:
    """Write the same weights for each of them."""
    import onym
    from onym.convert.write import convert

    gpt2 = isinstance(model, onym.GPT)
    onym.save(model, folder / "onym")
    convert(folder / "onym", folder / "transformers", to="huggingface" if gpt2 else "qwen3")
    if gpt2:
        convert(folder / "onym", folder / "book.pth", to="book")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    tokenizer = small_tokenizer().to_json()  # llama.cpp opens no model without one
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        convert(folder / "onym", folder / f"{kind}.gguf", to="gguf", dtype=kind.lower(), tokenizer=tokenizer)


def small_tokenizer() -> Any:
    """One for all programs, trained on Python sources: they get token ids, or texts of its words."""
    from onym.data.corpus import Corpus, Document
    from onym.data.tokenizer import Tokenizer

    documents = Corpus((str(Path(json.__file__).parent),), suffixes=("py",)).documents()
    return Tokenizer.train([each.text for each in documents if isinstance(each, Document)], 512)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def of_steps(times: list[float], ids: Prompts) -> Decoded:
    """From the time of the start, and of each step that gave every prompt one token."""
    tokens = (len(times) - 2) * len(ids)
    return Decoded(times[-1] - times[0], times[1] - times[0], times[-1] - times[1], tokens, ids)


def onym(folder: Path, batch: int, dtype: str, compiled: bool) -> Peer:
    """The engine of this working copy."""
    import onym as package
    from onym.generation.engine import Engine

    engine = Engine(package.load_model(folder / "onym"), slots=batch, dtype=dtype, compile="on" if compiled else "off")
    plain: list[Any] = []

    def forward(prompt: list[int]) -> float:
        if not plain:  # there is no int8 model but the engine's own, which computes in bf16
            plain.append(package.load_model(folder / "onym").to(DTYPES.get(dtype, torch.bfloat16)))
        with torch.inference_mode():
            return timed(lambda: plain[0](torch.tensor([prompt])))

    return Peer(lambda prompts, count: decode_with_engine(engine, prompts, count), forward)


def decode_with_engine(engine: Any, prompts: Prompts, count: int) -> Decoded:
    """With an engine that has a slot for each prompt, and nothing else to do."""
    from onym.generation.engine import Request
    from onym.generation.sampling import Sampling

    requests = [Request(prompt, max_new_tokens=count, sampling=Sampling(temperature=0)) for prompt in prompts]
    ids: dict[int, list[int]] = {}
    engine.reset_timings()
    start = time.perf_counter()
    for event in engine.run(requests):
        ids.setdefault(event.request, []).append(event.token)
    total = time.perf_counter() - start
    # What the engine spends between its steps is part of decoding, so only its reading of prompts is taken off.
    return Decoded(
        total,
        engine.prefill_seconds,
        total - engine.prefill_seconds,
        (count - 1) * len(prompts),
        [ids[number] for number in sorted(ids)],
    )


def before(folder: Path, batch: int) -> Peer:
    """``generate`` as it was: the caller has that version's sources in PYTHONPATH."""
    from onym.generate.engine import generate
    from onym.generate.sampling import Sampling

    import onym as package

    assert batch == 1
    assert "before" in Path(package.__file__).parts
    model = package.load_model(folder / "onym")

    def decode(prompts: Prompts, count: int) -> Decoded:
        times, ids = [time.perf_counter()], list[int]()
        for token in generate(model, prompts[0], count, Sampling(temperature=0)):
            times.append(time.perf_counter())
            ids.append(token)
        return of_steps(times, [ids])

    def forward(prompt: list[int]) -> float:
        with torch.inference_mode():
            return timed(lambda: model(torch.tensor([prompt])))

    return Peer(decode, forward)


def transformers(folder: Path, batch: int, dtype: str, cache: str, compiled: bool) -> Peer:
    """Its own ``generate``.

    Args:
        cache: ``dynamic`` or ``static``.
        compiled: see :func:`transformers_decode`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "transformers", dtype=DTYPES[dtype]).eval()
    plain = model.forward

    def forward(prompt: list[int]) -> float:
        with torch.inference_mode():
            return timed(lambda: plain(torch.tensor([prompt]), use_cache=False))

    return Peer(transformers_decode(model, cache, "default" if compiled else None), forward)


def transformers_decode(model: Any, cache: str, mode: str | None) -> Callable[[Prompts, int], Decoded]:
    """``generate`` of one of its models, greedy.

    Args:
        cache: ``dynamic`` or ``static``, its ``cache_implementation``.
        mode: of ``torch.compile``, or None. Static: the decode step is compiled, as it does by itself on a GPU; not frozen,
            which packs weights into oneDNN's layout but takes the static cache's length for a constant. Dynamic:
            ``model.forward`` is, with dynamic shapes, because its generate compiles nothing with this cache.
    """
    from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
        if mode is not None:
            options["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
            options["compile_config"]._compile_all_devices = True
        else:
            options["disable_compile"] = True
    elif mode is not None:
        model.forward = torch.compile(model.forward, dynamic=True, mode=mode)

    class Clock(StoppingCriteria):
        """Called after each step; never stops."""

        def __init__(self) -> None:
            self.times = [time.perf_counter()]

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def decode(prompts: Prompts, count: int) -> Decoded:
        given = torch.tensor(prompts, device=model.device)
        mask = torch.ones_like(given)
        clock = Clock()
        criteria = StoppingCriteriaList([clock])
        ids = model.generate(given, attention_mask=mask, max_new_tokens=count, stopping_criteria=criteria, **options)
        new = ids[:, given.shape[1] :].tolist()
        if given.is_cuda:  # where a step is launched before the one before is done: to the end of the last
            clock.times[-1] = time.perf_counter()
        return of_steps(clock.times, new)

    return decode


def book(folder: Path, batch: int) -> Peer:
    """The book's GPT-2 with its KV cache, under the ``generate_text_simple`` beside it.

    The published package (1.0.19) takes columns of the mask for rows, and so raises at the second token: that line is changed.
    """
    from llms_from_scratch.kv_cache import gpt2
    from llms_from_scratch.kv_cache.generate import generate_text_simple

    source = Path(gpt2.__file__).read_text().replace("causal_mask[:, -num_tokens:]", "causal_mask[-num_tokens:, :]")
    exec(compile(source, gpt2.__file__, "exec"), vars(gpt2))

    class Model(gpt2.GPTModel):
        """What that function asks of a model, which the book's Llama and Qwen have and its GPT-2 has not."""

        def __init__(self, cfg: dict[str, Any]) -> None:
            super().__init__(cfg)
            self.cfg, self.times = cfg, list[float]()

        def reset_kv_cache(self) -> None:
            self.current_pos = 0

        def forward(self, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
            logits = super().forward(ids, use_cache=cache is not None, cache=cache)
            self.times.append(time.perf_counter())
            return logits

    assert batch == 1
    config = json.loads((folder / "config.json").read_text())
    model = Model({**config, "drop_rate": 0.0}).eval()
    model.load_state_dict(torch.load(folder / "book.pth", weights_only=True), strict=False)

    def decode(prompts: Prompts, count: int) -> Decoded:
        given = torch.tensor(prompts)
        model.times = [time.perf_counter()]
        ids = generate_text_simple(model, given, count)
        # It computes once more than it has tokens to give; that pass is not counted.
        return of_steps(model.times[: count + 1], ids[:, given.shape[1] :].tolist())

    def forward(prompt: list[int]) -> float:
        model.reset_kv_cache()
        with torch.inference_mode():
            return timed(lambda: model(torch.tensor([prompt])))

    return Peer(decode, forward)


def llama_cpp(folder: Path, batch: int, kind: str) -> Peer:
    """llama.cpp's server in this process, one slot a prompt, as many threads as torch takes, otherwise as it is by default."""
    import xllamacpp

    config = json.loads((folder / "config.json").read_text())
    asked = xllamacpp.CommonParams()
    asked.model.path = str(folder / f"{kind}.gguf")
    asked.n_ctx, asked.n_parallel, asked.port, asked.verbosity = config["context_length"] * batch, batch, 0, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(asked)

    def ask(prompts: Prompts, count: int) -> tuple[float, list[dict[str, Any]]]:
        # One request with all prompts, so that they begin together; the cheapest of its samplers that is greedy.
        what = {"prompt": prompts if len(prompts) > 1 else prompts[0], "n_predict": count, "temperature": 0, "top_k": 1}
        what |= {"samplers": ["top_k"], "return_tokens": True, "ignore_eos": True, "cache_prompt": False}
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(what).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = json.load(answer)
        total = time.perf_counter() - start
        found = found if isinstance(found, list) else [found]
        return total, sorted(found, key=lambda each: each["index"])

    def decode(prompts: Prompts, count: int) -> Decoded:
        total, found = ask(prompts, count)
        # By its own clock, which leaves HTTP out. It times from the first token on, and counts that one; here it is not.
        clocks = [each["timings"] for each in found]
        prefill = max(each["prompt_ms"] for each in clocks) / 1e3
        end = max(each["prompt_ms"] + each["predicted_ms"] for each in clocks) / 1e3
        return Decoded(total, prefill, end - prefill, (count - 1) * len(prompts), [each["tokens"] for each in found])

    return Peer(decode, lambda prompt: ask([prompt], 1)[1][0]["timings"]["prompt_ms"] / 1e3)


WIDTHS = {"fp32": 4, "F32": 4, "bf16": 2, "BF16": 2, "F16": 2, "int8": 1, "Q8_0": 34 / 32}
"""Bytes a weight. Keys and values have 4 in fp32 and else 2, as llama.cpp's always have."""


class Variant(NamedTuple):
    """One row."""

    dtype: str
    opens: Callable[[Path, int], Peer]
    batched: bool = True
    gpt2_only: bool = False


def _variants() -> dict[str, Variant]:
    found = {
        "before": Variant("fp32", before, batched=False),
        "book": Variant("fp32", book, batched=False, gpt2_only=True),
    }
    for dtype in ("fp32", "bf16"):
        for cache, how in (("dynamic", ""), ("dynamic", "compiled"), ("static", ""), ("static", "compiled")):

            def opens(folder: Path, batch: int, dtype: str = dtype, cache: str = cache, how: str = how) -> Peer:
                return transformers(folder, batch, dtype, cache, bool(how))

            found[f"transformers {dtype} {cache} {how}".strip()] = Variant(dtype, opens)
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        found[f"llama.cpp {kind}"] = Variant(kind, lambda folder, batch, kind=kind: llama_cpp(folder, batch, kind))
    for dtype in ("fp32", "bf16", "int8"):
        for how in ("", "compiled"):

            def opens_ours(folder: Path, batch: int, dtype: str = dtype, how: str = how) -> Peer:
                return onym(folder, batch, dtype, bool(how))

            found[f"onym {dtype} {how}".strip()] = Variant(dtype, opens_ours)
    return found


VARIANTS = _variants()
EQUALS = {"fp32": ("F32",), "bf16": ("F16", "BF16"), "int8": ("Q8_0",)}
"""Which of llama.cpp's have weights of equal width."""
