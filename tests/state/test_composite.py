"""Tensors that are made of others (sparse, nested, subclasses) and generators are kept, and come back into live ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import onym
from onym.cli.main import main
from onym.errors import CheckpointError
from onym.format.extra_state import EXTRA_KEY
from onym.format.hashing import NO_HASH
from onym.format.manifest import sealed
from onym.names.mismatch import MismatchError
from onym.state.composite import put_together
from onym.state.tree import flatten, unflatten

PLACES = ("steps", "folder", "m.safetensors")


class Holder(nn.Module):
    """A module with one odd tensor, and an ordinary layer."""

    def __init__(self, odd: Tensor, *, parameter: bool = False) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        if parameter:
            self.odd = nn.Parameter(odd, requires_grad=odd.is_floating_point())
        else:
            self.register_buffer("odd", odd)


def save(model: nn.Module, folder: Path, place: str) -> Path:
    if place == "steps":
        with onym.Checkpointer(folder / place) as checkpointer:
            checkpointer.save(1, {"model": model})
    else:
        onym.save(model, folder / place)
    return folder / place


def load(path: Path, into: nn.Module, **options: Any) -> onym.LoadReport:
    if path.name == "steps":
        report = onym.Checkpointer(path).restore({"model": into}, **options).reports["model"]
        assert isinstance(report, onym.LoadReport)
        return report
    return onym.load(path, into=into, **options)


def parts(value: Tensor) -> list[Tensor]:
    """What a tensor is made of."""
    made: Any = value.detach()
    if value.is_nested:
        return list(value.unbind())
    if value.is_quantized:
        return [made.int_repr(), made.dequantize()]
    if value.layout == torch.sparse_coo:
        return [made._indices(), made._values()]
    if value.layout != torch.strided:
        return [made.values(), made.to_dense()]
    return (
        [each for name in made.__tensor_flatten__()[0] for each in parts(getattr(made, name))]
        if type(made) is not Tensor
        else [made]
    )


def same(one: Tensor, other: Tensor) -> bool:
    return type(one) is type(other) and one.layout == other.layout and all(map(torch.equal, parts(one), parts(other)))


def two(values: float, *sizes: int) -> Any:
    return TwoTensor(torch.full(sizes, values), torch.full(sizes, values + 1))


def ragged(*lengths: int, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(length, 3) for length in lengths], layout=layout)


UNCOALESCED = torch.sparse_coo_tensor(torch.tensor([[1, 1], [0, 0]]), torch.ones(2), (3, 4))
ODD: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {  # what is saved, and what is there before it is loaded
    "coo": (lambda: torch.eye(3).to_sparse(), lambda: torch.zeros(3, 3).to_sparse()),
    "uncoalesced": (UNCOALESCED.clone, lambda: torch.zeros(3, 4).to_sparse()),
    "hybrid coo": (lambda: torch.randn(3, 4).to_sparse(1), lambda: torch.zeros(3, 4).to_sparse(1)),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), lambda: torch.ones(3, 3).to_sparse_csr()),
    "csc": (lambda: torch.eye(3).to_sparse_csc(), lambda: torch.zeros(3, 3).to_sparse_csc()),
    "bsr": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), lambda: torch.ones(4, 4).to_sparse_bsr((2, 2))),
    "bsc": (lambda: torch.eye(4).to_sparse_bsc((2, 2)), lambda: torch.ones(4, 4).to_sparse_bsc((2, 2))),
    "empty": (lambda: torch.zeros(3, 3).to_sparse(), lambda: torch.ones(3, 3).to_sparse()),
    "bfloat16": (lambda: torch.eye(3).bfloat16().to_sparse(), lambda: torch.zeros(3, 3).bfloat16().to_sparse()),
    "per tensor": (
        lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.quint8),
        lambda: torch.quantize_per_tensor(torch.zeros(3, 4), 0.2, 0, torch.quint8),
    ),
    "per channel": (
        lambda: torch.quantize_per_channel(torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), 0, torch.qint8),
        lambda: torch.quantize_per_channel(torch.zeros(2, 3), torch.ones(2), torch.tensor([0, 0]), 0, torch.qint8),
    ),
    "subclass": (lambda: two(1.0, 2, 3), lambda: two(5.0, 2, 3)),
    "subclass in a subclass": (
        lambda: TwoTensor(two(1.0, 2), two(2.0, 2)),
        lambda: TwoTensor(two(0.0, 2), two(0.0, 2)),
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ODD)
def test_a_models_tensors_come_back(kind: str, place: str, tmp_path: Path) -> None:
    saved, before = (make() for make in ODD[kind])
    parameter = kind.startswith("subclass")
    model, fresh = Holder(saved, parameter=parameter), Holder(before, parameter=parameter)
    odd = fresh.odd
    compiled: Any = torch.compile(model)
    report = load(save(compiled, tmp_path, place), fresh)
    assert sorted(report.loaded) == ["line.bias", "line.weight", "odd"]
    assert fresh.odd is odd
    assert same(fresh.odd, model.odd)
    assert torch.equal(fresh.line.weight, model.line.weight)
    with torch.no_grad():  # memory of its own
        fresh.line.weight.zero_()
    checkpoint = onym.open_checkpoint(tmp_path / place)
    checkpoint.verify()
    if place != "steps" and parameter:
        with pytest.raises(CheckpointError, match=r"is a torch.*TwoTensor, which only a model that has one can build"):
            checkpoint.tensor("odd")
    elif place != "steps":
        assert same(checkpoint.tensor("odd"), model.odd)


def test_onym_load_takes_them_from_a_checkpointer_too(tmp_path: Path) -> None:
    model, fresh = Holder(two(1.0, 2, 3), parameter=True), Holder(two(0.0, 2, 3), parameter=True)
    onym.load(save(model, tmp_path, "steps"), into=fresh)
    assert same(fresh.odd, model.odd)
    with pytest.raises(CheckpointError, match="odd was stored as a TwoTensor"):
        onym.load(tmp_path / "steps", into=Holder(torch.zeros(2, 3)))


def test_the_commands_know_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, kind in enumerate(ODD):
        for make, name in zip(ODD[kind], ("a", "b"), strict=True):
            torch.manual_seed(0)
            onym.save(Holder(make(), parameter=kind.startswith("subclass")), tmp_path / f"{name}{number}")
        one, other = (str(tmp_path / f"{name}{number}") for name in ("a", "b"))
        assert main(["inspect", one]) == main(["verify", one]) == 0
        assert main(["diff", one, f"{one}/model.safetensors"]) == 0
        assert main(["diff", one, other]) == 1
        assert main(["convert", one, str(tmp_path / "out.safetensors")]) == 2  # not without it
        assert "'odd' is of" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("place", PLACES)
def test_what_is_there_must_be_of_the_same_class(place: str, tmp_path: Path) -> None:
    path = save(Holder(two(1.0, 2, 3), parameter=True), tmp_path, place)
    fresh = Holder(torch.zeros(2, 3), parameter=True)
    weight = fresh.line.weight.clone()
    with pytest.raises(CheckpointError, match=r"odd was stored as a TwoTensor, and it is (Tensor|Parameter) here: quantise"):
        load(path, fresh)
    assert torch.equal(fresh.line.weight, weight)
    other = Holder(two(1.0, 5, 3), parameter=True)
    with pytest.raises(MismatchError, match=r"odd \[2, 3\] stored, \[5, 3\] in the model"):
        load(path, other)
    assert list(load(path, other, skip_mismatched=["odd"]).skipped) == ["odd"]
    assert load(path, nn.ModuleDict({"line": nn.Linear(2, 2)}), strict=False).unexpected == ["odd"]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("place", [*PLACES, "m.pth"])
def test_what_pytorch_cannot_load_into_a_model_is_not_saved(place: str, layout: torch.layout, tmp_path: Path) -> None:
    model = Holder(ragged(1, 2, layout=layout))
    with pytest.raises((RuntimeError, SystemError)):
        Holder(ragged(1, 2, layout=layout)).load_state_dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"odd is a? ?nested"):
        save(model, tmp_path, place)
    assert list(tmp_path.glob("m*")) == list(tmp_path.glob("folder*")) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_sparse_tensor_is_no_dense_one(place: str, tmp_path: Path) -> None:
    path = save(Holder(torch.eye(2).to_sparse()), tmp_path, place)
    with pytest.raises(CheckpointError, match=r"odd is stored as a sparse_coo tensor, and is strided here: .*to_dense\(\)"):
        load(path, Holder(torch.eye(2)))
    with pytest.raises(CheckpointError, match="odd is stored as a sparse_coo tensor, and is sparse_csr here"):
        load(path, Holder(torch.eye(2).to_sparse_csr()))


class Eighths(Tensor):
    """A moment in one byte an element, as of an optimizer with 8 bits: a subclass with settings."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, block: int) -> Eighths:
        made: Eighths = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        return made

    def __init__(self, codes: Tensor, scale: Tensor, block: int) -> None:
        self.codes, self.scale, self.block = codes, scale, block

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], {"block": self.block, "owner": object()}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], settings: Any, size: Any, stride: Any) -> Eighths:
        return Eighths(inner["codes"], inner["scale"], settings["block"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return Eighths(args[0].codes, args[0].scale, args[0].block)
        raise NotImplementedError(f"{function}")


class Rough(torch.optim.Optimizer):
    """Keeps its moments in 8 bits; they come into being at the first step."""

    def __init__(self, parameters: Any, block: int = 4) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.block, self.steps = block, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    codes = torch.zeros(parameter.shape, dtype=torch.int8)
                    state["moments"] = [Eighths(codes, torch.zeros(1), self.block)]
                    state["plain"] = torch.zeros(parameter.shape)
                moment = state["moments"][0]
                moment.codes.copy_((parameter.grad * 10).to(torch.int8) + torch.randint(0, 3, parameter.shape))
                moment.scale.add_(1)
                parameter.sub_(moment.codes.float() * group["lr"])


def trained(block: int = 4) -> tuple[nn.Module, Rough]:
    model = nn.Linear(3, 2)
    optimizer = Rough(model.parameters(), block)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_an_optimizers_state_comes_back_into_a_fresh_one(tmp_path: Path) -> None:
    model, optimizer = trained()
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
    fresh = nn.Linear(3, 2)
    other = Rough(fresh.parameters())
    torch.optim.lr_scheduler.StepLR(other, 5)  # puts a step of its own into the optimizer, bound to it
    before = torch.get_rng_state()
    restored = onym.Checkpointer(tmp_path).restore({"model": fresh, "optimizer": other}, rng=False)
    assert restored.step == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert (other.steps, optimizer.steps) == (0, 2)
    for one, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        moment, was = other.state[one]["moments"][0], optimizer.state[theirs]["moments"][0]
        assert type(moment) is Eighths
        assert torch.equal(moment.codes, was.codes)
        assert moment.scale == 2
        assert moment.codes.data_ptr() != was.codes.data_ptr()
    onym.load_optimizer_state(fresh, other, *onym.optimizer_state(model, optimizer))  # and into one that has steps behind it
    other.step = None  # type: ignore[assignment]

    rougher = Rough(fresh.parameters(), block=8)
    with pytest.raises(
        CheckpointError, match=r"moments\.0 of weight is a Eighths that was stored with other settings: .*'block': 4"
    ):
        onym.Checkpointer(tmp_path).restore({"model": fresh, "optimizer": rougher})
    assert not rougher.state
    plain = torch.optim.SGD(fresh.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="was stored by Rough, this is SGD"):
        onym.Checkpointer(tmp_path).restore({"model": fresh, "optimizer": plain})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_the_state_of_sparse_gradients_comes_back(kind: Any, tmp_path: Path) -> None:
    settings = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Embedding(6, 3, sparse=True)
        return model, kind(model.parameters(), **settings)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, row: int) -> None:
        optimizer.zero_grad()
        model(torch.tensor([row, 2])).square().sum().backward()
        optimizer.step()

    (model, optimizer), (fresh, other) = made(), made()
    for row in range(2):
        step(model, optimizer, row)
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
        checkpointer.restore({"model": fresh, "optimizer": other})
    for row in range(2, 4):
        step(model, optimizer, row)
        step(fresh, other, row)
    assert torch.equal(next(fresh.parameters()), next(model.parameters()))


def test_elsewhere_a_subclass_is_refused_with_what_to_do(tmp_path: Path) -> None:
    state = {"model": nn.Linear(1, 1), "other": {"deep": [two(1.0, 2)]}}
    with onym.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=r"other\.deep\.0 is a TwoTensor, .*a model's own tensor or an optimizer's"):
            checkpointer.save(1, state)
        assert checkpointer.steps == []


def test_plain_values_may_be_sparse_and_nested(tmp_path: Path) -> None:
    values = [torch.eye(3).to_sparse_csr(), UNCOALESCED, ragged(1, 2), ragged(1, 4, layout=torch.jagged), ragged()]
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": nn.Linear(1, 1), "data": {"parts": values}})
    back = onym.Checkpointer(tmp_path).restore({}).values["data"]["parts"]
    assert all(map(same, values, back))


def test_what_torch_says_of_tensors_is_kept() -> None:
    value = {"dtype": torch.bfloat16, "device": torch.device("cuda:1"), "size": torch.Size([2, 3]), "sizes": [torch.Size([])]}
    tensors, structure = flatten(value, "x")
    back = unflatten(json.loads(json.dumps(structure)), tensors)
    assert back == value
    assert type(back["size"]) is torch.Size
    for name in ("torch.nn", "torch.load", "os", "float32", 3, None):
        with pytest.raises(CheckpointError, match="does not have"):
            unflatten({"$dtype": name}, {})


def test_generators_are_kept_as_their_state(tmp_path: Path) -> None:
    alone, within = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    data = {"generator": within, "listed": [1, copy.deepcopy(alone)]}
    live = {"model": nn.Linear(1, 1), "draws": alone, "data": data}
    with onym.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, live)
        expected = [torch.rand(3, generator=each) for each in (alone, within)]
        checkpointer.restore(live)
        assert data["generator"] is within  # the one that a loader draws from
        assert all(map(torch.equal, expected, [torch.rand(3, generator=each) for each in (alone, within)]))
        values = checkpointer.restore({}).values
        assert torch.equal(torch.rand(3, generator=values["draws"]), expected[0])
        with pytest.raises(CheckpointError, match=r"'data' in .* is a dict, and a Generator was given"):
            checkpointer.restore({"data": torch.Generator()})


INDICES, VALUES = {"$tensor": "i"}, {"$tensor": "v"}
CSR = {"crow_indices": INDICES, "col_indices": INDICES, "values": VALUES}
HOSTILE: list[Any] = [
    {"kind": "sparse_coo", "coalesced": True, "size": [1, 1], "parts": {"indices": INDICES, "values": VALUES}},
    {"kind": "sparse_coo", "coalesced": False, "size": "x", "parts": {"indices": INDICES, "values": VALUES}},
    {"kind": "sparse_csr", "size": [2, 2], "parts": CSR},
    {"kind": "os.system", "parts": {}},
    {"kind": "subclass", "class": "os.system", "context": "{}", "dtype": "float32", "size": [2, 2], "parts": {}},
    {"kind": "subclass", "class": 3, "context": [], "dtype": "float32", "size": 5, "parts": {"a": VALUES}},
    {"kind": "nested", "parts": {"values": VALUES, "sizes": INDICES}},
    {"kind": "jagged", "dim": -7, "parts": {"values": VALUES, "offsets": INDICES}},
    {"kind": ["x"], "parts": []},
    {"parts": {"a": {"$tensor": "w"}}},
    *(
        {"kind": "subclass", "class": name, "context": "None", "dtype": "float32", "size": [2, 2], "parts": {}}
        for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.testing._internal.two_tensor.TwoTensor")
    ),
    5,
]


@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.parametrize("odd", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2), two(1.0, 2, 2), ragged(1, 2)])
def test_hostile_descriptions_are_refused(content: Any, odd: Tensor, tmp_path: Path) -> None:
    values = {"odd": {"$composite": content}}
    text = sealed(json.dumps({"values": values, "tensors": ["i", "v"], "blake3": NO_HASH}))
    model = Holder(odd)
    tensors = {
        "i": torch.tensor([[3, -1], [9, 2**40]]),
        "v": torch.ones(2),
        "line.weight": torch.ones(2, 2),
        "line.bias": torch.ones(2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", {EXTRA_KEY: text})
    with pytest.raises(CheckpointError):
        onym.load(tmp_path / "m.safetensors", into=model)
    assert not torch.equal(model.line.bias, torch.ones(2))


@pytest.mark.parametrize("place", PLACES)
def test_models_of_torchs_eager_quantisation(place: str, tmp_path: Path) -> None:
    def dynamic() -> nn.Module:
        layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        made: nn.Module = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})
        return made

    model, fresh, x = dynamic(), dynamic(), torch.randn(2, 4)
    load(save(model, tmp_path, place), fresh)
    assert torch.equal(fresh(x), model(x))


def test_quantised_weights_and_8_bit_states_of_torchao(tmp_path: Path) -> None:
    quantization, optim = pytest.importorskip("torchao.quantization"), pytest.importorskip("torchao.optim")

    def quantised() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    model = quantised()
    onym.save(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), tmp_path / "plain")
    with pytest.raises(
        CheckpointError, match=r"(?s)nothing was changed: .* load first and convert \(quantise\) the model then"
    ):
        onym.load(tmp_path / "plain", into=model)
    for place in PLACES:
        path, fresh = save(model, tmp_path, place), quantised()
        load(path, fresh)
        assert torch.equal(fresh(x := torch.randn(2, 64)), model(x))
        with pytest.raises(CheckpointError, match=r"0\.weight was stored as a Int8Tensor, and it is .* here: quantise"):
            load(path, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))

    for kind in (optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8):
        model = nn.Linear(64, 128)
        optimizer = kind(model.parameters(), block_size=128)

        def step(model: nn.Module, optimizer: Any) -> None:
            with torch.compiler.set_stance("force_eager"):
                model(torch.ones(2, 64)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        step(model, optimizer)
        with onym.Checkpointer(tmp_path / kind.__name__) as checkpointer:
            checkpointer.save(1, {"model": model, "optimizer": optimizer})
        fresh = nn.Linear(64, 128)
        other = kind(fresh.parameters(), block_size=128)
        onym.Checkpointer(tmp_path / kind.__name__).restore({"model": fresh, "optimizer": other})
        for _ in range(3):
            step(model, optimizer)
            step(fresh, other)
        assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_what_reaches_out_of_its_values_is_refused() -> None:
    values = torch.arange(6.0).reshape(6, 1)
    for offsets, lengths in ([0, 9], None), ([-3, 6], None), ([0, 4, 2], None), ([0, 3, 6], [3, 9]), ([0, 3, 6], [-1, 2]):
        parts = {"values": values, "offsets": torch.tensor(offsets)}
        parts |= {} if lengths is None else {"lengths": torch.tensor(lengths)}
        with pytest.raises(CheckpointError, match="reaches out of its values"):
            put_together({"kind": "jagged", "dim": 1}, parts)
    whole = torch.ones(3, 2, dtype=torch.int8)
    for axis, scales, zero_points in (0, 2, 2), (0, 3, 2), (1, 3, 3), (5, 3, 3), (-3, 2, 2):
        parts = {
            "values": whole,
            "scales": torch.ones(scales, dtype=torch.float64),
            "zero_points": torch.zeros(zero_points, dtype=torch.int64),
        }
        with pytest.raises(CheckpointError):
            put_together({"kind": "quantized", "axis": axis}, parts)
