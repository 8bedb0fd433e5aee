"""The engine: texts do not depend on each other, whichever way steps are computed; log-probabilities, ends, prefixes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from onym import GPT, Decoder, DecoderConfig, GPTConfig
from onym.compile.in_place import graphs_compiled, without_compilation
from onym.errors import CheckpointError, ConfigError
from onym.generation import captured, engine, steps
from onym.generation.cache import Slots
from onym.generation.compiled import CompiledStep
from onym.generation.engine import CHUNK, Engine, Event, Request
from onym.generation.sampling import Sampling
from onym.generation.step_function import Known, Measured
from onym.gpt.causal_lm import CausalLM

GREEDY = Sampling(temperature=0)
CONFIGS = {
    "gpt2": GPTConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_layers=1),
    "qwen3": DecoderConfig(
        vocab_size=67,
        context_length=32,
        emb_dim=32,
        hidden_dim=48,
        n_heads=4,
        n_kv_groups=2,
        head_dim=16,
        tie_embeddings=True,
        n_layers=2,
        qk_norm=True,
    ),
}
SLOTS = 3


def random_model(config: GPTConfig | DecoderConfig, seed: int) -> CausalLM:
    """One whose logits are far apart, so that rounding does not change which is largest."""
    torch.manual_seed(seed)
    model = (GPT if isinstance(config, GPTConfig) else Decoder)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def uncached(model: CausalLM, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens without a cache, the context cropped at each step; and how near the second likeliest ever came."""
    tokens, nearest = list(prompt), float("inf")
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-model.config.context_length :]]))[0, -1]
        first, second = logits.topk(2).values.tolist()
        nearest = min(nearest, first - second)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], nearest


def texts(engine: Engine, requests: list[Request]) -> list[list[int]]:
    written: dict[int, list[int]] = {}
    first = engine.submit(requests[0])
    for event in engine.run(requests[1:]):
        written.setdefault(event.request - first, [])
        if event.token is not None:
            written[event.request - first].append(event.token)
    return [written[number] for number in range(len(requests))]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def compiled_engine(request: pytest.FixtureRequest, cache_folder: Path) -> Callable[[CausalLM], Engine]:
    """Makes engines with a compiled step, of any weights of the shape: each is compiled once, for all tests."""
    reasons: list[str] = []

    def make(model: CausalLM, **options: object) -> Engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ONYM_CACHE_DIR", str(cache_folder))
            made = Engine(model, slots=SLOTS, dtype="fp32", compile="on", note=reasons.append, **options)  # type: ignore[arg-type]
        assert made.compiled, reasons
        return made

    make.config = CONFIGS[request.param]  # type: ignore[attr-defined]
    return make


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.integers(0, 10**6), st.lists(st.integers(1, 45), min_size=1, max_size=4))
def test_greedy_tokens_are_those_of_the_uncached_forward(kind: str, seed: int, lengths: list[int]) -> None:
    check_against_uncached(
        random_model(CONFIGS[kind], seed), seed, lengths, lambda model: Engine(model, slots=2, dtype="fp32", slide=1)
    )


def check_against_uncached(model: CausalLM, seed: int, lengths: list[int], make: Callable[[CausalLM], Engine]) -> None:
    torch.manual_seed(seed)
    prompts = [torch.randint(0, model.config.vocab_size, (length,)).tolist() for length in lengths]
    expected = [uncached(model, prompt, 12) for prompt in prompts]
    written = texts(make(model), [Request(prompt, 12, GREEDY) for prompt in prompts])
    for (tokens, nearest), found in zip(expected, written, strict=True):
        assert found == tokens or nearest < 1e-3


@pytest.mark.slow
def test_so_are_those_of_a_compiled_step_which_is_compiled_once(compiled_engine: Callable[..., Engine]) -> None:
    config = compiled_engine.config  # type: ignore[attr-defined]
    made = CompiledStep.made
    compiled_engine(random_model(config, 0))
    assert CompiledStep.made == made + 1

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.lists(st.integers(1, 45), min_size=1, max_size=4))
    def check(seed: int, lengths: list[int]) -> None:
        check_against_uncached(random_model(config, seed), seed, lengths, lambda model: compiled_engine(model, slide=1))

    check()
    other = compiled_engine(random_model(config, 1), capacity=17)
    texts(other, [Request([1, 2], 3, Sampling(top_p=0.5), seed=1), Request([3], 9, Sampling(1.0, min_p=0.1), seed=2)])
    assert CompiledStep.made == made + 1, "other weights, lengths, batches and settings are the same function"


def as_on_a_gpu(model: CausalLM, compile: str = "auto", **options: object) -> Engine:
    """An engine whose step is captured, as far as that can be had on a CPU: the same function, called and not replayed."""
    made = Engine(model, slots=SLOTS, dtype=options.pop("dtype", "fp32"), compile="off", **options)  # type: ignore[arg-type]
    reasons: list[str] = []
    with torch.no_grad(), without_compilation():
        made._step_function = steps.captured_step(made.model, made._cache, compile, 0, reasons.append)  # type: ignore[arg-type]
    assert made.captured, reasons
    return made


ENGINES: dict[str, Callable[[CausalLM], Engine]] = {
    "eager": lambda model: Engine(model, dtype="fp32", compile="off"),
    "as it is": lambda model: Engine(model, dtype=None),
    "captured": as_on_a_gpu,
}


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.integers(0, 10**6), st.lists(st.integers(1, 45), min_size=1, max_size=4))
def test_so_are_those_of_a_captured_step(kind: str, seed: int, lengths: list[int]) -> None:
    check_against_uncached(random_model(CONFIGS[kind], seed), seed, lengths, lambda model: as_on_a_gpu(model, slide=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_captured_step_that_is_compiled_first_gives_the_same_logits(
    kind: str, dtype: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONYM_CACHE_DIR", str(cache_folder))
    model = random_model(CONFIGS[kind], 2)
    made = {compile: as_on_a_gpu(model, compile, dtype=dtype) for compile in ("auto", "on")}
    assert [each.compiled for each in made.values()] == [False, True]
    requests = [Request([3, 1, 4], 12, GREEDY, logprobs=20), Request([9] * 20, 8, GREEDY, logprobs=20)]
    graphs = graphs_compiled()
    expected, found = ([event.best for event in each.run(requests)] for each in made.values())
    for ours, theirs in zip(found, expected, strict=True):
        both = dict(ours).keys() & dict(theirs).keys()  # the last ones of twenty may differ
        assert len(both) >= 15
        assert [dict(ours)[token] for token in both] == pytest.approx(
            [dict(theirs)[token] for token in both], abs=1e-4 if dtype == "fp32" else 0.1
        )
    assert graphs_compiled() == graphs


def test_a_longer_text_has_a_graph_of_its_own_and_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_MOST_AT_FIRST", 16)
    config = dataclasses.replace(CONFIGS["qwen3"], context_length=96)
    made = as_on_a_gpu(random_model(config, 1), slide=1)
    step = made._step_function
    assert isinstance(step, captured.CapturedStep)
    assert list(step._graphs) == [16]
    check_against_uncached(random_model(config, 1), 1, [5, 90, 20], lambda _: made)
    assert sorted(step._graphs) == [16, 64, 96]
    assert [captured.rounded_capacity(tokens) for tokens in (1, 256, 257, 2048, 3000)] == [256, 256, 512, 2048, 4096]


def test_what_was_measured_of_a_graph_is_of_its_length(tiny: GPT) -> None:
    steps_ = [as_on_a_gpu(tiny.eval(), capacity=capacity)._step_function for capacity in (16, 32, 32)]
    names = [step.known.function.name for step in steps_ if step is not None]
    assert names[0] != names[1] == names[2]


def test_engines_of_any_number_of_shapes_have_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up compiling the same lines after eight times, by default."""
    monkeypatch.setattr(captured, "_OPTIONS", None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = random_model(dataclasses.replace(CONFIGS["gpt2"], context_length=160), 0)
    assert all(as_on_a_gpu(model, "on", capacity=16 * number).compiled for number in range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager fp32", "eager bf16", "eager int8", "as it is", "compiled", "captured"])
def test_a_text_is_the_same_whatever_is_written_beside_it(
    way: str, compiled_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 8)  # so that prompts take several, and are used again
    config = compiled_engine.config  # type: ignore[attr-defined]
    model = random_model(config, 3)
    one = Request([5, 6, 7], 40, Sampling(1.2, top_p=0.95), seed=11)

    def make() -> Engine:
        if way == "compiled":
            return compiled_engine(model)
        if way == "captured":
            return as_on_a_gpu(model)
        dtype = None if way == "as it is" else way.removeprefix("eager ")
        return Engine(model, slots=SLOTS, dtype=dtype, compile="off")  # type: ignore[arg-type]

    alone = texts(make(), [one])[0]
    assert len(alone) == 40
    assert texts(make(), [one])[0] == alone
    others = [Request([number + 1] * (1 + 9 * number % 31), 5 + 7 * number, Sampling(1.0), seed=number) for number in range(8)]
    for place in (0, 3, 8):
        assert texts(make(), [*others[:place], one, *others[place:]])[place] == alone
    used = make()
    texts(used, others)
    assert texts(used, [one])[0] == alone, "what the slots held before does not matter either"
    long = Request(list(range(1, 30)), 3, Sampling(1.0), seed=5)
    beside = Request(list(range(20)), 8, Sampling(1.0), seed=6)  # goes on while the other slot is idle
    expected = texts(make(), [long])[0]
    assert texts(used, [long, beside])[0] == expected
    used.reset_timings()
    assert texts(used, [long])[0] == expected
    assert used.prefilled_tokens in (29 - 16, 29 - 24), "its beginning was not read again"


def test_a_prompt_that_begins_alike_is_not_read_again_and_gives_the_same_bits() -> None:
    config = dataclasses.replace(CONFIGS["gpt2"], context_length=4 * CHUNK)
    model = random_model(config, 0)
    torch.manual_seed(1)
    prompt = torch.randint(0, 101, (2 * CHUNK + 30,)).tolist()

    def events(made: Engine) -> list[tuple[int | None, float]]:
        return [(event.token, event.logprob) for event in made.run([Request(prompt, 8, GREEDY)])]

    made = Engine(model, slots=2, dtype="fp32", compile="off")
    fresh = events(made)
    assert made.prefilled_tokens == len(prompt)
    made.reset_timings()
    assert events(made) == fresh
    assert made.prefilled_tokens == 30
    # From a slot that is being written to, into another one; and of half of the prompt.
    made.reset_timings()
    half = [*prompt[: CHUNK + 50], 1, 2, 3]
    both = texts(made, [Request(prompt, 8, GREEDY), Request(half, 8, GREEDY)])
    assert made.prefilled_tokens == 30 + 53
    assert both[0] == [token for token, _ in fresh]
    assert both[1] == texts(Engine(model, slots=2, dtype="fp32", compile="off"), [Request(half, 8, GREEDY)])[0]


def test_attention_may_return_its_result_in_another_order_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory-efficient kernel gives [batch, time, heads, head_dim] in memory, not one head after the other."""
    model, request = random_model(CONFIGS["qwen3"], 4), Request([1, 2, 3], 9, GREEDY)
    expected = {way: texts(make(model), [request]) for way, make in ENGINES.items()}
    attention = F.scaled_dot_product_attention

    def transposed(*args: torch.Tensor, **options: object) -> torch.Tensor:
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert {way: texts(make(model), [request]) for way, make in ENGINES.items()} == expected


def test_a_gpu_that_is_short_of_memory_shortens_the_context(tiny: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    config, notes = dataclasses.replace(tiny.config, context_length=1000), list[str]()
    bytes_a_position = 2 * config.n_layers * config.emb_dim * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 3 * 300 * bytes_a_position, 10**12))
    assert Slots.fitting(config, 3, torch.device("cuda"), torch.float32) == 300
    assert Slots.fitting(config, 3, torch.device("cuda"), torch.bfloat16) == 600
    assert Slots.fitting(config, 3, torch.device("cpu"), torch.float32) == 1000
    assert Slots.fitting(config, 1, torch.device("cuda"), torch.float32) == 900
    with pytest.raises(ConfigError, match="too little for 4 texts of 256 tokens: write fewer at once"):
        Slots.fitting(config, 4, torch.device("cuda"), torch.float32)
    monkeypatch.setattr(Slots, "fitting", lambda *_: 10)
    made = Engine(tiny.eval(), slots=3, dtype="fp32", compile="off", note=notes.append)
    assert "3 texts of 32 tokens: each sees its last 10" in notes[0]
    assert len(texts(made, [Request([1] * 15, 20)])[0]) == 20
    assert not Engine(tiny, capacity=12, dtype="fp32", compile="off", note=notes.append).busy
    assert len(notes) == 1, "what was asked for is not shortened"


def test_log_probabilities_are_the_models_own(tiny: GPT) -> None:
    tiny.eval()
    prompt = [3, 1, 4, 1, 5]
    odd = Sampling(0.5, top_k=3, repetition_penalty=1.5, presence_penalty=0.2, frequency_penalty=0.1)
    request = Request(prompt, 6, odd, seed=0, logprobs=4, prompt_logprobs=True, logit_bias={7: 2.0})
    events = list(Engine(tiny, dtype="fp32", compile="off").run([request]))
    tokens = [*prompt, *(event.token for event in events if event.token is not None)]
    with torch.no_grad():
        expected = F.log_softmax(tiny(torch.tensor([tokens]))[0], dim=-1)
    assert events[0].prompt_logprobs == pytest.approx([float(expected[i, t]) for i, t in enumerate(prompt[1:])], abs=1e-5)
    assert events[1].prompt_logprobs is None
    for place, event in enumerate(events, start=len(prompt) - 1):
        assert event.logprob == pytest.approx(float(expected[place, event.token]), abs=1e-5)  # type: ignore[index]
        values, likeliest = expected[place].topk(4)
        assert [token for token, _ in event.best] == likeliest.tolist()
        assert [logprob for _, logprob in event.best] == pytest.approx(values.tolist(), abs=1e-5)


def test_the_end_is_told_once_and_a_slot_is_free_again(tiny: GPT) -> None:
    made = Engine(tiny.eval(), slots=1, dtype="fp32", compile="off")
    endless = [event.token for event in made.run([Request([1], 12, GREEDY)])]
    events = list(made.run([Request([1], 12, GREEDY, stop_ids={endless[5]}), Request([2], 3, GREEDY)]))  # type: ignore[arg-type]
    first = [event for event in events if event.request == 1]
    assert [event.token for event in first] == [*endless[: endless.index(endless[5])], None]
    assert [event.finish for event in first[-2:]] == [None, "stop"]
    assert [event.finish for event in events if event.request == 2] == [None, None, "length"]
    assert not made.busy


def test_a_request_that_is_cancelled_writes_no_more(tiny: GPT) -> None:
    made = Engine(tiny.eval(), slots=1, dtype="fp32", compile="off")
    running, waiting, last = (made.submit(Request([1], 50)) for _ in range(3))
    seen: list[Event] = []
    while len(seen) < 3:
        seen += made.step()
    made.cancel(running)
    made.cancel(waiting)
    rest = list(itertools.chain.from_iterable(iter(made.step, [])))
    assert {event.request for event in rest} == {last}
    assert len(rest) == 50


def test_weights_in_bf16_and_int8_are_near(tiny: GPT) -> None:
    tiny.eval()
    prompt = torch.randint(0, 101, (30,)).tolist()

    def logprobs(dtype: str) -> torch.Tensor:
        (event, *_) = Engine(tiny, dtype=dtype, compile="off").run([Request(prompt, 1, GREEDY, prompt_logprobs=True)])  # type: ignore[arg-type]
        return torch.tensor(event.prompt_logprobs)

    expected = logprobs("fp32")
    assert 0 < (logprobs("bf16") - expected).abs().max() < 0.02
    assert 0 < (logprobs("int8") - expected).abs().max() < 0.05


def test_a_step_that_does_not_compile_is_told_and_done_without(tmp_path: Path) -> None:
    """In a process of its own: torch's workers, which other tests compile with, keep the compiler that they began with."""
    program = """
import onym
from onym.generation.engine import Engine, Request
model = onym.GPT(onym.GPTConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_layers=1)).eval()
made = Engine(model, dtype="fp32", compile="on", note=print)
assert not made.compiled
print(len(list(made.run([Request([1], 5)]))), "tokens")
"""
    environment = {**os.environ, "ONYM_CACHE_DIR": str(tmp_path), "CXX": "/nowhere/g++"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "The step is not compiled (" in done.stdout
    assert "InvalidCxxCompiler" in done.stdout
    assert done.stdout.endswith("5 tokens\n")


class FakeStep:
    """Has nothing but what the decision asks of a step."""

    def __init__(self, compiled: bool) -> None:
        self.compiled, self.known = compiled, Known(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "expected", "compiled"),
    [
        (None, 10, False),  # nothing is known, and it would not pay
        (None, 10**9, True),
        (Measured(5.0, 0.02, 0.01), 100, True),
        (Measured(5.0, 0.02, 0.01), 10**9, True),
        (Measured(5.0, 0.1, 0.05), 10**9, False),
    ],
)
def test_what_was_measured_decides_whether_a_captured_step_is_compiled_first(
    known: Measured | None, expected: int, compiled: bool, tiny: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Engine(tiny.eval(), dtype="fp32", compile="off")
    remembered: list[Measured] = []
    monkeypatch.setattr(Known, "recall", lambda _: known)
    monkeypatch.setattr(Known, "remember", lambda _, measured: remembered.append(measured))
    seconds = iter([0.04, 0.001])
    monkeypatch.setattr(steps, "_seconds", lambda *_: next(seconds))
    monkeypatch.setattr(steps, "CapturedStep", lambda *_, compiled: FakeStep(compiled))
    step = steps.captured_step(made.model, made._cache, "auto", expected, lambda _: None)
    assert step is not None
    assert step.compiled == bool(remembered) == compiled


@pytest.mark.parametrize(
    ("known", "expected_tokens", "way"),
    [
        (None, 10, "off"),  # nothing is known, and it would not pay
        (Measured(40.0, 0.02, 0.01), 1, "load"),
        (Measured(40.0, 0.01, 0.02), 10**9, "off"),
    ],
)
def test_what_was_measured_decides(
    known: Measured | None, expected_tokens: int, way: str, tiny: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(Known, "recall", lambda _: known)
    monkeypatch.setattr(CompiledStep, "load", lambda self: loaded.append(self) is None)
    monkeypatch.setattr(steps, "_seconds", lambda *_: 0.001)
    made = Engine(tiny.eval(), dtype="fp32", expected_tokens=expected_tokens)
    assert made.compiled == bool(loaded) == (way == "load")


@pytest.mark.slow
def test_a_step_that_is_damaged_or_gone_is_compiled_anew(
    compiled_engine: Callable[..., Engine], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(compiled_engine.config, 0)  # type: ignore[attr-defined]
    compiled_engine(model)
    made = CompiledStep.made
    monkeypatch.setattr(CompiledStep, "compile", lambda self: (_ for _ in ()).throw(RuntimeError("compiled anew")))
    kept = {file: file.read_bytes() for file in (cache_folder / "compiled").glob("*/decode/*.pt2")}
    for harm in (lambda file: file.write_bytes(kept[file][:1000]), Path.unlink):
        for file in kept:
            harm(file)  # type: ignore[operator]
        with pytest.raises(AssertionError, match="compiled anew"):
            compiled_engine(model)
        for file, content in kept.items():
            file.write_bytes(content)
    assert compiled_engine(model).compiled
    assert CompiledStep.made == made


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "no tokens"),
        (Request([101]), "token 101, the model knows 101"),
        (Request([-1]), "the model knows 101"),
        (Request([1], 0), "--max-new-tokens"),
        (Request([1], logprobs=21), "--logprobs must be from 0 to 20"),
        (Request([1], seed=-1), "--seed"),
        (Request([1], stop=["x"] * 10_000), "10,000 stop strings"),
        (Request([1], logit_bias={500: 1.0}), "--logit-bias has token 500"),
        (Request([1], logit_bias={5: float("inf")}), "--logit-bias must be a number or -inf, not inf"),
        (Request([1], logit_bias={5: float("nan")}), "--logit-bias must be a number or -inf, not nan"),
        (Request([1], sampling=Sampling(top_p=0)), "--top-p"),
        (Request([1], sampling=Sampling(min_p=2)), "--min-p"),
        (Request([1], sampling=Sampling(repetition_penalty=0)), "--repetition-penalty"),
        (Request([1], sampling=Sampling(presence_penalty=float("nan"))), "--presence-penalty"),
        (Request([1] * 9, 9), "capacity of 16"),
    ],
)
def test_what_cannot_work_is_refused_and_harms_no_other(tiny: GPT, request_: Request, message: str) -> None:
    made = Engine(tiny.eval(), capacity=16, dtype="fp32", compile="off")
    with pytest.raises(ConfigError, match=message):
        made.submit(request_)
    assert not made.busy
    assert len(texts(made, [Request([1], 5)])[0]) == 5


def test_a_bias_that_forbids_all_tokens_is_an_error(tiny: GPT) -> None:
    forbidden = {token: float("-inf") for token in range(tiny.config.vocab_size)}
    made = Engine(tiny.eval(), dtype="fp32", compile="off")
    assert texts(made, [Request([1], 3, logit_bias={**forbidden, 7: 0.0})])[0] == [7, 7, 7]
    with pytest.raises(ConfigError, match="--logit-bias leaves no token to choose"):
        list(made.run([Request([1], 3, logit_bias=forbidden)]))


def test_weights_that_are_not_finite_are_told(tiny: GPT) -> None:
    with torch.no_grad():
        tiny.final_norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="non-finite"):
        list(Engine(tiny.eval(), dtype="fp32", compile="off").run([Request([1], 3)]))


def test_slots_and_slide_have_a_range(tiny: GPT) -> None:
    with pytest.raises(ConfigError, match="slots must be at least 1"):
        Engine(tiny, slots=0)
    with pytest.raises(ConfigError, match="slide must be"):
        Engine(tiny, slide=33)
    assert engine.MOST_LOGPROBS == 20
