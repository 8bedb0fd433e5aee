"""Texts written on a GPU are those of a CPU, whichever way a step is taken; and a step waits for it once."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch

from onym.generation.engine import Engine, Request, generate
from onym.generation.sampling import Sampling, choose
from onym.generation.ways import Compile
from onym.gpt.causal_lm import CausalLM
from onym.gpt.hardware import read_bandwidth, synchronize
from tests.cuda.memory import reserved
from tests.cuda.waits import waits
from tests.generation.test_engine import CONFIGS, GREEDY, SLOTS, as_on_a_gpu, random_model, texts, uncached

WAYS: dict[str, Compile] = {"eager": "off", "captured": "auto", "compiled": "on"}
SAMPLED = {
    "all": Sampling(1.0),
    "sharp": Sampling(0.3),
    "top k": Sampling(1.0, top_k=40),
    "nucleus": Sampling(1.3, top_p=0.9),
    "min p": Sampling(1.0, min_p=0.05),
    "all of it": Sampling(0.9, top_k=100, top_p=0.8, min_p=0.01),
}


def engine(model: CausalLM, device: torch.device, way: str, **options: object) -> Engine:
    """On the device, fp32, with a step of that way; on a CPU, which has no graphs, what would be replayed is called."""
    model, reasons = copy.deepcopy(model).to(device), list[str]()
    if device.type == "cpu" and way != "eager":
        made = as_on_a_gpu(model, WAYS[way], **options)
    else:
        made = Engine(model, slots=SLOTS, dtype="fp32", compile=WAYS[way], note=reasons.append, **options)  # type: ignore[arg-type]
    assert (made.captured, made.compiled) == (way != "eager", way == "compiled"), reasons
    return made


SEEDS = {"gpt2": 631, "qwen3": 568}  # of weights whose likeliest tokens are far ahead, and vary
PROMPT = [26, 59, 11, 14]


# Compiled first alone with grouped queries: one minute of compiling is enough.
@pytest.mark.parametrize(
    ("kind", "way"), [("gpt2", "eager"), ("gpt2", "captured"), ("qwen3", "eager"), ("qwen3", "captured"), ("qwen3", "compiled")]
)
def test_the_likeliest_tokens_are_the_cpus_and_a_text_has_no_neighbours(
    device: torch.device, kind: str, way: str, quick_compiler: Callable[[torch.device], None]
) -> None:
    """Several texts of different lengths side by side, past the context too, and each alone."""
    quick_compiler(device)
    model = random_model(CONFIGS[kind], SEEDS[kind])
    torch.manual_seed(SEEDS[kind])
    prompts = [torch.randint(0, model.config.vocab_size, (length,)).tolist() for length in (1, 7, 30)]
    expected = [uncached(model, prompt, 12) for prompt in prompts]
    assert min(nearest for _, nearest in expected) > 0.05, "no rounding changes which token is the likeliest"
    made = engine(model, device, way, slide=1)
    together = texts(made, [Request(prompt, 12, GREEDY) for prompt in prompts])
    assert together == [tokens for tokens, _ in expected]

    drawn = [Request(prompt, 9, Sampling(1.2, top_p=0.95), seed=number) for number, prompt in enumerate(prompts * 2)]
    beside = texts(made, drawn)
    assert [texts(made, [request])[0] for request in drawn] == beside


def test_a_model_that_trains_writes_as_on_a_cpu(device: torch.device) -> None:
    """Nothing is copied: what a sample during training is."""
    for kind in CONFIGS:
        model = random_model(CONFIGS[kind], SEEDS[kind])
        expected = list(generate(model, PROMPT, 12, GREEDY))
        assert list(generate(copy.deepcopy(model).to(device), PROMPT, 12, GREEDY)) == expected


@pytest.mark.parametrize("how", SAMPLED)
def test_a_draw_from_the_same_logits_is_the_cpus(device: torch.device, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU orders all tokens, where a CPU looks among the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(50_257, generator=generator) for _ in range(8)])
    rows = (4 * torch.special.ndtri((places.double() + 0.5) / 50_257)).float()  # no two alike, which may come in any order
    draws = torch.rand(8, 5, generator=generator, dtype=torch.float64).tolist()
    expected = [[int(choose(row, SAMPLED[how], each)) for each in of_row] for row, of_row in zip(rows, draws, strict=True)]
    monkeypatch.setattr("onym.generation.sampling._PREFIXES", ())
    torch.use_deterministic_algorithms(True)  # under which training draws its samples
    there = rows.to(device)
    found = [[int(choose(row, SAMPLED[how], each)) for each in of_row] for row, of_row in zip(there, draws, strict=True)]
    assert found == expected


@pytest.mark.parametrize("way", ["eager", "captured"])
@pytest.mark.parametrize("how", [GREEDY, *SAMPLED.values()], ids=["greedy", *SAMPLED])
def test_a_step_waits_once_for_all_its_texts(device: torch.device, way: str, how: Sampling) -> None:
    made = engine(random_model(CONFIGS["gpt2"], 1), device, way)
    made.submit_all([Request([number + 1, 2], 12, how, seed=number) for number in range(SLOTS)])
    for _ in range(5):  # all prompts are read, and what is made at a first step is there
        made.step()
    synchronize(device)
    with waits(device) as found:
        events = made.step()
    assert len(events) == SLOTS
    assert len(found) == 1, found


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_engines_that_are_dropped_leave_nothing(device: torch.device, way: str) -> None:
    """A server makes one for each step of a run that it follows."""
    model = random_model(CONFIGS["gpt2"], 1)

    def made_and_dropped() -> None:
        texts(engine(model, device, way), [Request([1, 2, 3], 4, GREEDY)])

    for _ in range(2):
        made_and_dropped()
    before = reserved(device)
    for _ in range(10):
        made_and_dropped()
    assert reserved(device) <= before + (4 << 20 if device.type == "cuda" else 1 << 16)  # a GPU's memory comes in 2 MiB


def test_one_engine_does_not_disturb_another(device: torch.device) -> None:
    """Each has buffers and a graph of its own, and one that is dropped takes nothing along."""
    models = [random_model(CONFIGS["gpt2"], seed) for seed in (1, 2)]
    requests = [Request([3, 1, 4], 9, GREEDY)]
    first, second = (engine(model, device, "captured") for model in models)
    expected = [texts(each, requests) for each in (first, second)]
    assert expected[0] != expected[1]
    assert [texts(each, requests) for each in (first, second)] == expected
    del first
    gc.collect()
    assert texts(second, requests) == expected[1]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_narrow_weights_are_near(device: torch.device, dtype: str) -> None:
    model = random_model(CONFIGS["qwen3"], 6)
    request = Request([1, 2, 3], 3, GREEDY, logprobs=10, logit_bias={7: 1e4})  # the same tokens, whatever is near
    expected = list(Engine(model, dtype="fp32", compile="off").run([request]))
    found = list(Engine(copy.deepcopy(model).to(device), slots=2, dtype=dtype, compile="auto").run([request]))  # type: ignore[arg-type]
    for exact, rounded in zip(expected, found, strict=True):
        assert exact.token == rounded.token == 7
        near = dict(exact.best)
        assert len(near.keys() & dict(rounded.best).keys()) >= 8
        for token, logprob in rounded.best:
            assert logprob == pytest.approx(near.get(token, logprob), abs=0.3)


def test_the_memorys_speed_is_one_that_a_device_can_have(device: torch.device) -> None:
    speed = read_bandwidth(device)
    assert (5e10 if device.type == "cuda" else 1e8) < speed < 2e13
