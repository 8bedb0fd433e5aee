"""Adapters as a module of their own: what gets them, what they are called, and that training and saving work on them alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onym
from onym import GPT, Checkpointer, LoRA
from onym.adapters.layer import LoRALinear
from onym.adapters.lora import matches
from onym.errors import ConfigError
from onym.names.plain_view import plain_view
from onym.state.dtensor import full_tensor
from tests.conftest import TINY
from tests.names.trees import LEAVES, REPLICATED, WIDTH, Plan, Wraps, build, nestings, plans

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ["att.qkv", "att.proj", "ff.layers.0", "ff.layers.2"]
NAMES = [f"trf_blocks.{n}.{layer}.lora_{each}.weight" for n in range(2) for layer in LAYERS for each in "AB"]


def drawn(lora: LoRA, seed: int = 0) -> LoRA:
    """With values that change what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return lora


@pytest.fixture
def lora(tiny: GPT) -> LoRA:
    return drawn(LoRA.apply(tiny, rank=4))


def test_nothing_changes_before_the_first_step(tiny: GPT, tokens: Tensor) -> None:
    before = tiny(tokens)
    LoRA.apply(tiny)
    assert torch.equal(tiny(tokens), before)


def test_names_are_the_models_with_the_matrices_beside_them(tiny: GPT) -> None:
    plain = list(tiny.state_dict())
    lora = LoRA.apply(tiny, rank=4)
    assert list(lora.state_dict()) == list(onym.state_dict(lora)) == NAMES
    assert [name for name in onym.state_dict(tiny) if name not in NAMES] == plain
    assert {name for name, parameter in plain_view(tiny).named_parameters() if parameter.requires_grad} == set(NAMES)
    assert lora.config.to_dict() == {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all"]}


def test_it_computes_the_product_in_the_base_s_dtype_and_trains_in_fp32(tiny: GPT, tokens: Tensor) -> None:
    tiny.to(torch.bfloat16)
    lora = drawn(LoRA.apply(tiny, rank=4, alpha=6))
    assert {parameter.dtype for parameter in lora.parameters()} == {torch.float32}
    layer = tiny.trf_blocks[0].att.qkv
    assert isinstance(layer, LoRALinear)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    expected = layer.base_layer(x) + (1.5 * x.float() @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()).bfloat16()
    assert torch.allclose(layer(x), expected, rtol=0.02, atol=0.02)
    assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        tiny(tokens).float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in lora.parameters())
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (32, 96, torch.bfloat16)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all", LAYERS),
        ("att", LAYERS[:2]),
        ("att.qkv,ff", [LAYERS[0], *LAYERS[2:]]),
        (["*qkv"], LAYERS[:1]),
        (["layers.?"], LAYERS[2:]),
    ],
)
def test_targets_are_runs_of_segments_or_patterns(tiny: GPT, targets: Any, layers: list[str]) -> None:
    lora = LoRA.apply(tiny, targets=targets)
    assert [place.path.split(".", 2)[2] for place in lora._places] == layers * 2
    assert not matches("t", "trf_blocks.0.att.qkv")


def test_a_target_may_be_one_block_or_the_head(tiny: GPT) -> None:
    paths = [place.path for place in LoRA.apply(tiny, targets=["trf_blocks.1.att", "out_head"])._places]
    assert paths == ["trf_blocks.1.att.qkv", "trf_blocks.1.att.proj", "out_head"]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"rank": 0}, "The rank of LoRA is a whole number of at least 1, not 0."),
        ({"rank": 2.0}, "rank of LoRA"),
        ({"alpha": 0}, "The alpha of LoRA is a number above 0, not 0."),
        ({"dropout": 1.0}, "from 0 to below 1, not 1.0"),
        (
            {"targets": "at.qkv"},
            r"'at.qkv' matches no linear layer \(did you mean 'att.qkv'\?\); there are trf_blocks.\*.att.qkv",
        ),
        ({"targets": "norm1"}, "'norm1' matches no linear layer"),
        ({"targets": []}, "targets takes parts of names"),
        ({"rank_pattern": {"trf_blocks.0.att.qvk": 3}}, "did you mean 'trf_blocks.0.att.qkv'"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(tiny: GPT, how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LoRA.apply(tiny, **how)
    assert LoRA.of(tiny) is None
    assert all(parameter.requires_grad for parameter in tiny.parameters())


def test_models_that_cannot_have_adapters_are_told_why(tiny: GPT) -> None:
    LoRA.apply(tiny)
    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        LoRA.apply(tiny)
    with pytest.raises(ConfigError, match="has no linear layer inside it"):
        LoRA.apply(nn.Sequential(nn.Conv1d(2, 2, 1)))
    tied = GPT(type(TINY).from_dict({**TINY.to_dict(), "tie_embeddings": True}))
    with pytest.raises(ConfigError, match=r"The weight of out_head is tok_emb.weight too"):
        LoRA.apply(tied, targets="out_head")
    fused = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    assert [place.path for place in LoRA.apply(fused)._places] == ["linear"], "its kernel reads the weights themselves"


def test_merged_is_the_same_model(lora: LoRA, tiny: GPT, tokens: Tensor) -> None:
    expected, before = tiny(tokens), tiny.trf_blocks[0].att.qkv.weight.clone()
    own = {id(each) for each in lora.parameters()}
    state, parameters = lora.merged_state(), [id(each) for each in plain_view(tiny).parameters() if id(each) not in own]
    assert torch.equal(tiny.trf_blocks[0].att.qkv.weight, before), "the live model stays as it is"
    other = GPT(TINY).eval()
    other.load_state_dict(state, strict=True)
    assert torch.allclose(other(tokens), expected, atol=1e-6)
    assert lora.merge() is tiny
    assert torch.allclose(tiny(tokens), expected, atol=1e-6)
    assert [id(each) for each in tiny.parameters()] == parameters, "an optimizer's parameters stay"
    assert all(each.requires_grad for each in tiny.parameters())
    assert list(tiny.state_dict()) == list(other.state_dict())
    with pytest.raises(ConfigError, match="merged or removed already"):
        lora.merge()


def test_removed_the_model_is_as_it_was(tiny: GPT, tokens: Tensor) -> None:
    tiny.tok_emb.weight.requires_grad_(False)
    before = tiny(tokens)
    drawn(LoRA.apply(tiny)).remove()
    assert torch.equal(tiny(tokens), before)
    assert [name for name, each in tiny.named_parameters() if not each.requires_grad] == ["tok_emb.weight"]


def test_adapters_are_found_in_a_model_and_in_its_copy(lora: LoRA, tiny: GPT, tokens: Tensor) -> None:
    clone = copy.deepcopy(tiny)
    for model in (tiny, torch.compile(tiny, backend="eager"), clone):
        found = LoRA.of(model)
        assert found is not None
        assert found.config == lora.config
        assert list(found.state_dict()) == NAMES
    found.merge()
    assert torch.allclose(clone(tokens), tiny(tokens), atol=1e-6)
    assert LoRA.of(tiny) is not None


def test_compiled_in_place_it_is_one_graph_and_trains(lora: LoRA, tiny: GPT, tokens: Tensor) -> None:
    plain = tiny(tokens)
    tiny.compile(backend="eager", fullgraph=True)
    compiled = tiny(tokens)
    assert torch.allclose(compiled, plain, atol=1e-6)
    compiled.square().mean().backward()
    gradients = [parameter.grad for parameter in lora.parameters()]
    assert all(each is not None and bool(each.any()) for each in gradients)
    assert list(onym.state_dict(lora)) == NAMES
    lora.merge()
    assert torch.allclose(tiny(tokens), plain, atol=1e-6), "it is compiled again without them"


def test_a_layer_that_is_compiled_by_itself_keeps_its_name(tokens: Tensor) -> None:
    model = GPT(TINY).eval()
    model.trf_blocks[0].att.qkv = torch.compile(model.trf_blocks[0].att.qkv, backend="eager")
    lora = drawn(LoRA.apply(model, rank=4))
    assert list(lora.state_dict()) == NAMES
    model.trf_blocks[1].att.qkv = torch.compile(model.trf_blocks[1].att.qkv, backend="eager")
    expected = model(tokens)
    found = LoRA.of(model)
    assert found is not None
    assert list(found.state_dict()) == NAMES
    found.merge()
    assert torch.allclose(model(tokens), expected, atol=1e-6)


def test_dropout_acts_while_training_alone(tiny: GPT, tokens: Tensor) -> None:
    drawn(LoRA.apply(tiny, dropout=0.5))
    assert torch.equal(tiny(tokens), tiny(tokens))
    tiny.train()
    assert not torch.equal(tiny(tokens), tiny(tokens))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        batch = torch.randint(0, TINY.vocab_size, (2, 16), generator=torch.Generator().manual_seed(number))
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def trained(compiled: bool) -> tuple[GPT, LoRA, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = GPT(TINY)
    lora = LoRA.apply(model, rank=4, generator=torch.Generator().manual_seed(1))
    if compiled:
        model.compile(backend="eager")
    return model, lora, torch.optim.AdamW(lora.parameters(), lr=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_holds_adapters_alone_and_restores_exactly(tmp_path: Path, compiled: bool) -> None:
    model, lora, optimizer = trained(compiled)
    steps(model, optimizer, range(3))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"model": lora, "optimizer": optimizer})
    expected = steps(model, optimizer, range(3, 6))
    stored = onym.stored_optimizer_state(tmp_path)[0]
    assert {name.split(".", 2)[2] for name in stored} == set(NAMES)
    model, lora, optimizer = trained(False)
    steps(model, optimizer, range(7, 9))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore({"model": lora, "optimizer": optimizer})
        folder = tmp_path / "step-000000003"
    assert steps(model, optimizer, range(3, 6)) == expected
    assert sum(file.stat().st_size for file in folder.glob("model*")) < 40_000, "the base is not in it"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "folder"])
def test_saved_and_loaded_as_any_module(tmp_path: Path, lora: LoRA, name: str) -> None:
    onym.save(lora, tmp_path / name)
    onym.save(lora, tmp_path / name)  # and replaced
    other = LoRA.apply(GPT(TINY), rank=4)
    assert onym.load(tmp_path / name, into=other).loaded == NAMES
    assert all(torch.equal(one, two) for one, two in zip(lora.parameters(), other.parameters(), strict=True))
    assert onym.load(tmp_path / name, into=other.model if name != "x.pth" else other).loaded == NAMES


def test_merged_it_is_saved_as_the_model(tmp_path: Path, lora: LoRA, tiny: GPT, tokens: Tensor) -> None:
    onym.save(lora, tmp_path / "merged", merged=True)
    assert torch.allclose(onym.load_model(tmp_path / "merged")(tokens), tiny(tokens), atol=1e-6)
    with pytest.raises(ConfigError, match=r"merged=True is for an onym.LoRA"):
        onym.save(tiny, tmp_path / "other", merged=True)


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_sharded_by_fsdp_it_trains_saves_and_merges_into_a_file(tmp_path: Path, tokens: Tensor) -> None:
    from torch.distributed.fsdp import fully_shard

    model = GPT(TINY).to(torch.bfloat16)
    lora = drawn(LoRA.apply(model, rank=4))
    expected = {name: value.clone() for name, value in lora.merged_state().items()}
    for block in model.trf_blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.0, momentum=0.9)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).backward()
    optimizer.step()
    assert {name: tuple(full_tensor(value).shape) for name, value in onym.state_dict(lora).items()}.keys() == set(NAMES)
    onym.save(lora, tmp_path / "merged.safetensors", merged=True)
    stored = onym.open_checkpoint(tmp_path / "merged.safetensors").model.state()
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": lora, "optimizer": optimizer})
    assert set(onym.stored_optimizer_state(tmp_path / "run")[0]) == {f"state.momentum_buffer.{name}" for name in NAMES}
    with pytest.raises(ConfigError, match=r"call onym.LoRA.apply before that"):
        LoRA.apply(model)
    with pytest.raises(ConfigError, match="The weights are sharded"):
        lora.merge()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans([*LEAVES], shared=True), nestings([each for each in REPLICATED if each != "distributed"]), st.integers(0, 3))
def test_names_under_any_wrappers_are_those_of_the_plain_model(plan: Plan, wraps: Wraps, seed: int) -> None:
    plain, wrapped = build(plan, seed=seed), build(plan, wraps, seed=seed)
    try:
        one, other = drawn(LoRA.apply(plain, rank=2)), drawn(LoRA.apply(wrapped, rank=2))
    except ConfigError as error:
        assert "linear layer" in str(error)  # there is none in it, or the weight of each is another's
        return
    assert list(one.state_dict()) == list(other.state_dict()) == list(onym.state_dict(other))
    assert list(onym.state_dict(plain)) == list(onym.state_dict(wrapped))
    x = torch.randn(5, WIDTH)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(plain.eval()(x), wrapped.eval()(x))
        expected = wrapped(x)
        other.merge()
        assert torch.allclose(wrapped(x), expected, atol=1e-4)
    found = LoRA.of(wrapped)
    assert found is None
