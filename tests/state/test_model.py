"""Loading in place: all or nothing, strict, and plainly told."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import onym
from onym import GPT, GPTConfig, MismatchError
from onym.errors import CheckpointError, ConfigError


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def small(**changes: object) -> GPT:
    base = {"vocab_size": 101, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    return GPT(GPTConfig(**{**base, **changes}))  # type: ignore[arg-type]


def test_a_load_keeps_the_parameters_that_the_optimizer_has() -> None:
    model = small()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    onym.load_state_dict(model, small().state_dict())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_switching_between_compiled_and_eager_changes_no_name_and_no_parameter() -> None:
    model = small()
    tokens = torch.randint(0, 101, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    names, parameters = list(onym.state_dict(model)), [id(p) for p in model.parameters()]
    losses = []
    for compiled in (False, True, False):
        if compiled:
            model.compile()
        else:
            model._compiled_call_impl = None
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert list(onym.state_dict(model)) == names
        assert [id(p) for p in model.parameters()] == parameters
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_layers": 4}, r"Stored with 4 blocks, this model has 2: build it with n_layers=4"),
        ({"vocab_size": 128}, r"Stored with a vocabulary of 128, this model has 101"),
        ({"emb_dim": 64}, r"Stored with a width of 64, this model has 32"),
        ({"qkv_bias": True}, r"2 stored but not in the model: trf_blocks\.0\.att\.qkv\.bias"),
    ],
)
def test_a_mismatch_is_explained_and_changes_nothing(other: dict[str, object], message: str) -> None:
    model = small()
    before = values(model)
    with pytest.raises(MismatchError, match=message):
        onym.load_state_dict(model, small(**other).state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_polluted_names_are_explained() -> None:
    polluted = torch.compile(small()).state_dict()  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match=r"`_orig_mod\.`.*torch\.compile.*onym\.load") as caught:
        onym.load_state_dict(small(), polluted)
    assert len(caught.value.differences.missing) == len(polluted)
    assert len(str(caught.value).splitlines()) <= 20


def test_another_dtype_is_refused_or_cast_and_reported() -> None:
    model, half = small(), small().to(torch.bfloat16)
    with pytest.raises(MismatchError, match='dtype="cast"'):
        onym.load_state_dict(model, half.state_dict())
    report = onym.load_state_dict(model, half.state_dict(), dtype="cast")
    assert report.cast["tok_emb.weight"] == ("bfloat16", "float32")
    assert "cast" in str(report)
    assert model.tok_emb.weight.dtype == torch.float32
    assert torch.equal(model.tok_emb.weight, half.tok_emb.weight.float())
    with pytest.raises(ConfigError, match='"exact" or "cast"'):
        onym.load_state_dict(model, half.state_dict(), dtype="float32")  # type: ignore[arg-type]


def test_a_load_that_is_not_strict_says_what_it_left() -> None:
    model = small()
    state = small(qkv_bias=True).state_dict()
    del state["pos_emb.weight"]
    before = model.pos_emb.weight.clone()
    report = onym.load_state_dict(model, state, strict=False)
    assert report.missing == ["pos_emb.weight"]
    assert report.unexpected == ["trf_blocks.0.att.qkv.bias", "trf_blocks.1.att.qkv.bias"]
    assert torch.equal(model.pos_emb.weight, before)


def test_the_callers_dict_is_not_touched() -> None:
    state = small(tie_embeddings=True).state_dict()
    del state["out_head.weight"]
    names = list(state)
    onym.load_state_dict(torch.compile(small(tie_embeddings=True)), state)  # type: ignore[arg-type]
    assert list(state) == names


def test_tied_tensors_are_restored_and_contradictions_refused() -> None:
    tied, untied = small(tie_embeddings=True), small()
    with pytest.raises(CheckpointError, match=r"out_head\.weight and tok_emb\.weight are one tensor .* tie_embeddings=False"):
        onym.load_state_dict(tied, untied.state_dict())
    onym.load_state_dict(tied, small(tie_embeddings=True).state_dict())
    assert tied.out_head.weight is tied.tok_emb.weight


def test_what_is_no_module_is_said_to_be_none() -> None:
    twice = torch.compile(torch.compile(small()))
    with pytest.raises(ConfigError, match="applied twice"):
        onym.state_dict(twice)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="This is a dict"):
        onym.load_state_dict({}, {})  # type: ignore[arg-type]


def test_extra_state_and_buffers_are_kept() -> None:
    class Counting(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.count = count

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    source, target = Counting(7), Counting(0)
    source.norm(torch.randn(8, 3))
    onym.load_state_dict(torch.compile(target), onym.state_dict(source))  # type: ignore[arg-type]
    assert target.count == 7
    assert torch.equal(target.norm.running_mean, source.norm.running_mean)  # type: ignore[arg-type]


def test_what_has_no_values_is_said() -> None:
    with pytest.raises(ConfigError, match=r"TorchScript module \(Sequential\).*scripted"):
        onym.state_dict(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ConfigError, match="contains, a TorchScript"):
        onym.state_dict(nn.ModuleDict({"a": torch.jit.script(nn.Linear(2, 2))}))
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ConfigError, match=r"0\.weight has no values yet, because its layer is lazy: run one batch"):
        onym.state_dict(lazy)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="no values yet"):
        onym.save(empty, "never.safetensors")
    with pytest.raises(ConfigError, match=r"meta device.*to_empty"):
        onym.load_state_dict(empty, nn.Linear(2, 2).state_dict())
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="inference_mode"):
        onym.load_state_dict(frozen, nn.Linear(2, 2).state_dict())
    with torch.inference_mode():
        onym.load_state_dict(frozen, nn.Linear(2, 2).state_dict())


class Fragile(nn.Module):
    """Its own loading code fails after the tensors before it were copied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.last = nn.Linear(2, 2)
        self.version = 1
        self.last.register_load_state_dict_pre_hook(self._refuse)

    @staticmethod
    def _refuse(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        raise KeyError("no such thing")

    def get_extra_state(self) -> int:
        return self.version

    def set_extra_state(self, state: int) -> None:
        self.version = state


@pytest.mark.parametrize("compiled", [False, True])
def test_a_load_that_fails_in_the_models_own_code_is_undone(compiled: bool) -> None:
    model = Fragile()
    before = {name: value.clone() for name, value in model.named_parameters()}
    if compiled:
        model.first = torch.compile(model.first)  # type: ignore[assignment]
    state = Fragile().state_dict() | {"_extra_state": 2}
    with pytest.raises(CheckpointError, match=r"own loading code failed, and nothing was changed: .*no such thing"):
        onym.load_state_dict(model, state)
    assert model.version == 1
    assert all(torch.equal(before[name.replace("_orig_mod.", "")], value) for name, value in model.named_parameters())


def test_layers_are_swapped_by_loading_a_models_own_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    first, second = (layer.weight.detach().clone() for layer in model)
    onym.load_state_dict(model, {"0.weight": model[1].weight, "1.weight": model[0].weight})
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)


def test_an_average_has_the_models_names_and_its_counter() -> None:
    model = small()
    average = AveragedModel(torch.compile(model))  # type: ignore[arg-type]
    average.update_parameters(model)
    average.update_parameters(small(qkv_bias=False))
    state = onym.state_dict(average)
    assert set(state) == {*model.state_dict(), "n_averaged"}
    other = AveragedModel(small())
    onym.load_state_dict(other, state)
    assert other.n_averaged == 2
    assert torch.equal(other.module.tok_emb.weight, average.module.tok_emb.weight)
    assert isinstance(onym.unwrap(average), GPT)


@pytest.mark.parametrize("keep", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"])
def test_a_model_compiled_in_place_is_copied_and_pickled(keep: Any, tmp_path: Path) -> None:
    model = small()
    model.compile(backend="eager")
    tokens = torch.randint(0, 101, (2, 16))
    expected = model(tokens)
    if keep == "torch.save":
        torch.save(model, tmp_path / "whole.pth")
        again = torch.load(tmp_path / "whole.pth", weights_only=False)
    else:
        again = keep(model)
    assert list(onym.state_dict(again)) == list(onym.state_dict(model))
    assert again._compiled_call_impl is None, "PyTorch drops it: docs/orig-mod.md says so"
    torch.testing.assert_close(again(tokens), expected)  # attention is written out where it is compiled, and rounds otherwise
    again.compile(backend="eager")
    assert torch.equal(again(tokens), expected)


def test_a_whole_training_switches_between_compiled_and_eager() -> None:
    """The same losses as without switching, by the same optimizer, and one file at every point."""

    def run(switching: bool) -> tuple[list[float], GPT]:
        torch.manual_seed(3)
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tokens = torch.randint(0, 101, (4, 17))
        losses = []
        for step in range(9):
            if switching and step == 3:
                model.compile()
            if switching and step == 6:
                model._compiled_call_impl = None
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, model

    straight, plain = run(False)
    switched, model = run(True)
    assert switched == pytest.approx(straight, rel=1e-4)
    assert straight[-1] < straight[0] - 1
    assert list(onym.state_dict(model)) == list(plain.state_dict())


def test_a_file_loads_where_the_compiler_was_never_imported(tmp_path: Path, in_fresh_process: Callable[[str], str]) -> None:
    model = small()
    compiled = torch.compile(model)
    tokens = torch.randint(0, 101, (1, 16))
    with torch.no_grad():
        expected = compiled(tokens).sum().item()  # type: ignore[operator]
    onym.save(compiled, tmp_path / "m.safetensors")  # type: ignore[arg-type]
    printed = in_fresh_process(f"""
import sys, torch, onym
model = onym.GPT(onym.GPTConfig(**{model.config.to_dict()!r}))
print(onym.load("m.safetensors", into=model))
with torch.no_grad():
    print(model(torch.tensor({tokens.tolist()})).sum().item())
print([name for name in sys.modules if name.startswith("torch._dynamo")])
""").splitlines()
    assert float(printed[1]) == pytest.approx(expected, rel=1e-4)
    assert printed[2] == "[]"


def test_keeping_and_loading_a_compiled_model_recompiles_nothing() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2)))
    for index, block in enumerate(model):
        model[index] = torch.compile(block, backend=counting)  # type: ignore[assignment]
    x = torch.randn(3, 2)
    model(x).sum().backward()
    compiled = graphs
    for _ in range(3):
        onym.load_state_dict(model, {name: value + 1 for name, value in onym.state_dict(model).items()})
        model(x).sum().backward()
    assert 0 < graphs == compiled


class Versioned(nn.Module):
    """Its second version stores what the first did, times ten."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_files_layout_version_reaches_the_module(tmp_path: Path) -> None:
    polluted = torch.compile(nn.Sequential(Versioned())).state_dict()  # type: ignore[attr-defined]
    polluted._metadata["_orig_mod.0"]["version"] = 1
    torch.save(polluted, tmp_path / "old.pth")
    model = nn.Sequential(Versioned())
    onym.load(tmp_path / "old.pth", into=model)
    assert model[0].weight.tolist() == [10, 10]
    onym.save(model, tmp_path / "new.pth")
    for load in (
        lambda into: onym.load(tmp_path / "new.pth", into=into),
        lambda into: into.load_state_dict(torch.load(tmp_path / "new.pth", weights_only=True)),
    ):
        again = nn.Sequential(Versioned())
        load(again)
        assert again[0].weight.tolist() == [10, 10], "already of this version"


def test_a_conjugate_is_no_second_name_of_its_tensor(tmp_path: Path) -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("f", torch.randn(3, dtype=torch.complex64))
            self.register_buffer("g", self.f.conj())

    model = Waves()
    for name in ("m.safetensors", "m.pth"):
        onym.save(model, tmp_path / name)
        stored = onym.open_checkpoint(tmp_path / name).model.state()
        assert torch.equal(stored["g"], model.g.resolve_conj())  # type: ignore[operator,arg-type]


def test_tensors_made_of_tensors_are_not_taken_for_one_another(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    class LazyTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(TwoTensor(torch.randn(2, 2), torch.randn(2, 2))) for _ in range(2))

    model, other = LazyTensor(), LazyTensor()
    with pytest.raises(CheckpointError, match=r"a is a TwoTensor, .*dequantize"):
        onym.save(model, tmp_path / "m.pth")
    onym.load_state_dict(other, model.state_dict())
    assert torch.equal(other.b.a, model.b.a)  # type: ignore[attr-defined]
    assert not torch.equal(other.b.a, other.a.a)  # type: ignore[attr-defined]


UNFIT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "a number for a tensor": (lambda: nn.Linear(1, 1), lambda: {"weight": torch.ones(1, 1), "bias": 3.0}, "shape|no tensors"),
    "meta": (
        lambda: nn.Linear(1, 1),
        lambda: {"weight": torch.ones(1, 1), "bias": torch.ones(1, device="meta")},
        "has no values",
    ),
    "floats for integers": (
        lambda: nn.BatchNorm1d(1),
        lambda: {**nn.BatchNorm1d(1).state_dict(), "num_batches_tracked": torch.tensor(1.7)},
        "num_batches_tracked float32 stored, int64 in the model",
    ),
    "a path": (lambda: nn.Linear(1, 1), lambda: "model.pth", r"onym\.load takes a path"),
    "another model": (lambda: nn.Linear(1, 1), lambda: nn.Linear(1, 1), "not a Linear"),
    "numbered": (lambda: nn.Linear(1, 1), lambda: {0: torch.ones(1)}, "dict of named tensors"),
}


@pytest.mark.parametrize(("model", "state", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_copied_is_refused_before_anything_is(
    model: Callable[[], nn.Module], state: Callable[[], Any], message: str
) -> None:
    target = model()
    before = values(target)
    with pytest.raises(onym.OnymError, match=message):
        onym.load_state_dict(target, state(), dtype="cast")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_arguments_in_the_wrong_order_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="This is a str"):
        onym.save("m.pth", small())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a path"):
        onym.load(small(), small())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="This is a str"):
        onym.load("m.pth", "m.pth")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="applied twice"):
        onym.unwrap(torch.compile(torch.compile(small())))  # type: ignore[arg-type]


def test_an_expanded_buffer_is_refused() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.zeros(1).expand(3))
    with pytest.raises(ConfigError, match="mask is an expanded view"):
        onym.load_state_dict(model, {"mask": torch.ones(3)})


def test_a_model_with_a_state_dict_of_its_own() -> None:
    class Trained(nn.Module):
        """Keeps only what is trained."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
            return {name: value for name, value in super().state_dict(*arguments, **options).items() if "head" in name}

    class Delegating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
            return self.inner.state_dict()

        def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
            return self.inner.load_state_dict(state, strict)

    for cls in (Trained, Delegating):
        model, other = cls(), cls()
        report = onym.load_state_dict(torch.compile(model), onym.state_dict(other))  # type: ignore[arg-type]
        assert len(report.loaded) == 2
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_that_a_models_own_loading_code_knows_are_taken() -> None:
    def old() -> nn.Module:
        return torch.nn.utils.weight_norm(nn.Linear(2, 2))

    new = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    state = old().state_dict()
    assert "weight_g" in state
    assert "weight_g" not in new.state_dict()
    onym.load_state_dict(torch.compile(new), state)  # type: ignore[arg-type]
    assert torch.equal(new.parametrizations.weight.original0, state["weight_g"])  # type: ignore[union-attr]


def test_a_diverged_models_tied_tensors_load() -> None:
    model = small(tie_embeddings=True)
    with torch.no_grad():
        model.tok_emb.weight[0] = float("nan")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert onym.load_state_dict(small(tie_embeddings=True), state).loaded


def test_a_configuration_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Odd:
        dtype: Any = torch.float32

    class Model(nn.Module):
        def __init__(self, config: Odd) -> None:
            super().__init__()
            self.config, self.line = config, nn.Linear(1, 1)

    onym.register_architecture("odd", Model, Odd)
    for value in (torch.float32, {1: 2}):
        with pytest.raises(ConfigError, match=r"Odd\.dtype is .*, which JSON cannot hold"):
            onym.save(Model(Odd(value)), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="model_cls"):
        onym.register_architecture("number", int, Odd)  # type: ignore[arg-type]


def test_a_cast_that_overflows_is_reported() -> None:
    model = nn.Linear(3, 1).half()
    state = {"weight": torch.tensor([[1.0, 1e6, float("inf")]]), "bias": torch.tensor([65504.0])}
    with pytest.warns(UserWarning, match=r"beyond the range of float16 became infinite in 1 tensors \(weight\)"):
        report = onym.load_state_dict(model, state, dtype="cast")
    assert report.overflowed == ["weight"]
    assert "1 with values beyond the dtype's range (weight)" in str(report)
    state["weight"] = torch.tensor([[1.0, float("nan"), float("-inf")]])  # they were so before
    assert onym.load_state_dict(model, state, dtype="cast").overflowed == []
    assert onym.load_state_dict(model.bfloat16(), {**state, "bias": torch.tensor([1e30])}, dtype="cast").overflowed == []


@pytest.mark.parametrize(
    ("value", "dtype", "overflows"),
    [(300, "int8", True), (2**40, "int32", True), (-1, "uint8", True), (127, "int8", False), (-(2**31), "int32", False)],
)
def test_integers_beyond_the_range_are_reported(value: int, dtype: str, overflows: bool) -> None:
    model = nn.Module()
    model.register_buffer("count", torch.zeros(1, dtype=getattr(torch, dtype)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = onym.load_state_dict(model, {"count": torch.tensor([value])}, dtype="cast")
    assert report.overflowed == (["count"] if overflows else [])
    assert [f"beyond the range of {dtype} became other numbers" in str(each.message) for each in said] == [True] * overflows


@pytest.mark.parametrize(("was", "now"), [("float32", "int64"), ("complex64", "float32"), ("int64", "bool")])
def test_where_no_cast_exists_none_is_advised(was: str, now: str) -> None:
    model = nn.Module()
    model.register_buffer("b", torch.zeros(1, dtype=getattr(torch, now)))
    for dtype in ("exact", "cast"):
        with pytest.raises(MismatchError, match="No load converts that") as caught:
            onym.load_state_dict(model, {"b": torch.ones(1, dtype=getattr(torch, was))}, dtype=dtype)  # type: ignore[arg-type]
        assert "Pass dtype" not in str(caught.value)
