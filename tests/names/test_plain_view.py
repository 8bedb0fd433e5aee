"""Names depend on the model's own attributes alone, whatever wraps it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel

import onym
from onym.errors import ConfigError
from onym.names.match import recover_names
from onym.names.wrappers import AVERAGE_COUNTER, register_wrapper
from onym.state.dtensor import full_tensor

Wrap = Callable[[nn.Module], nn.Module]


class Hostile(nn.Module):
    """A model whose own attributes are called like those of wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self._orig_mod = nn.Linear(3, 3)
        self._orig_modulator = nn.Linear(3, 3)
        self._checkpoint_wrapped_module = nn.ModuleDict({"module": nn.Linear(3, 3)})
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(2)])
        self.again = self.blocks[0]  # the same object under a second name
        self.bare = nn.Parameter(torch.zeros(3))
        self.register_buffer("counter", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def each_child(wrap: Wrap, model: nn.Module) -> nn.Module:
    for name, child in list(model._modules.items()):
        assert child is not None
        setattr(model, name, wrap(child))
    return model


def compiled_children(model: nn.Module) -> nn.Module:
    return each_child(torch.compile, model)  # type: ignore[arg-type]


def compiled_blocks(model: nn.Module) -> nn.Module:
    assert isinstance(model, Hostile)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block)  # type: ignore[assignment]
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    return checkpoint_wrapper(model)


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2: no prefix, the parameters are DTensors."""
    fully_shard(onym.unwrap(model.get_submodule("blocks"))[1])  # type: ignore[index]
    fully_shard(model)
    return model


def flat_sharded(model: nn.Module) -> nn.Module:
    """FSDP1."""
    return FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    """A group of one process, for DistributedDataParallel."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPS: dict[str, Wrap] = {
    "plain": lambda model: model,
    "compiled": torch.compile,  # type: ignore[dict-item]
    "compiled in place": in_place,
    "compiled children": compiled_children,
    "compiled root over compiled children": lambda model: torch.compile(compiled_children(model)),  # type: ignore[return-value]
    "compiled blocks": compiled_blocks,
    "data parallel": nn.DataParallel,
    "data parallel over compiled": lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
    "compiled over data parallel": lambda model: torch.compile(nn.DataParallel(model)),  # type: ignore[return-value]
    "distributed": distributed,
    "distributed over compiled": lambda model: distributed(torch.compile(model)),  # type: ignore[arg-type]
    "compiled over distributed": lambda model: torch.compile(distributed(model)),  # type: ignore[return-value]
    "distributed over compiled children": lambda model: distributed(compiled_children(model)),
    "checkpointed": checkpointed,
    "compiled over checkpointed": lambda model: torch.compile(checkpointed(model)),  # type: ignore[return-value]
    "checkpointed over compiled": lambda model: checkpointed(torch.compile(model)),  # type: ignore[arg-type]
    "checkpointed twice": lambda model: checkpointed(checkpointed(model)),
    "checkpointed children": lambda model: each_child(checkpointed, model),
    "checkpointed children, compiled": lambda model: each_child(lambda child: checkpointed(torch.compile(child)), model),  # type: ignore[arg-type]
    "compiled over checkpointed children": lambda model: torch.compile(each_child(checkpointed, model)),  # type: ignore[return-value]
    "offloaded": offload_wrapper,
    "sharded": sharded,
    "sharded, compiled children": lambda model: sharded(compiled_children(model)),
    "compiled over sharded": lambda model: torch.compile(sharded(model)),  # type: ignore[return-value]
    "flat sharded": flat_sharded,
    "flat sharded over compiled children": lambda model: flat_sharded(compiled_children(model)),
    "compiled over flat sharded": lambda model: torch.compile(flat_sharded(model)),  # type: ignore[return-value]
    "averaged": AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrapped_and_plain_have_equal_names_both_ways(wrap: Wrap) -> None:
    plain, source = Hostile(), Hostile()
    wrapped = wrap(source)
    own = [AVERAGE_COUNTER] if isinstance(wrapped, AveragedModel) else []
    assert [name for name in onym.state_dict(wrapped) if name not in own] == list(plain.state_dict())
    assert set(own) <= set(onym.state_dict(wrapped))

    report = onym.load_state_dict(wrapped, plain.state_dict(), strict=not own)
    assert report.loaded == list(plain.state_dict())
    assert report.missing == own
    for name, value in onym.state_dict(wrapped).items():
        assert name in own or torch.equal(full_tensor(value), plain.state_dict()[name]), name

    back = Hostile()
    state = {name: full_tensor(value) for name, value in onym.state_dict(wrapped).items() if name not in own}
    back.load_state_dict(state, strict=True)
    assert onym.load_state_dict(back, onym.state_dict(wrapped), strict=not own).unexpected == own


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_root_is_unwrapped_and_no_child_that_only_looks_like_it(wrap: Wrap) -> None:
    assert isinstance(onym.unwrap(wrap(Hostile())), Hostile)


def test_a_registered_wrapper_is_seen_through() -> None:
    class Logged(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.the_model = model

    model = Logged(nn.Sequential(nn.Linear(2, 2)))
    assert list(onym.state_dict(model)) == ["the_model.0.weight", "the_model.0.bias"]
    register_wrapper(Logged, "the_model")
    assert list(onym.state_dict(torch.compile(model))) == ["0.weight", "0.bias"]


def test_a_wrapper_that_hides_a_name_of_the_model_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model
            self.weight = nn.Parameter(torch.ones(1))

    register_wrapper(Scaled, "inner")
    with pytest.raises(ConfigError, match=r"Scaled and the Linear inside it both have 'weight'"):
        onym.state_dict(Scaled(nn.Linear(2, 1)))


def test_names_that_a_hook_made_up_are_kept() -> None:
    class Split(nn.Module):
        """Trains one fused matrix, stores two."""

        def __init__(self) -> None:
            super().__init__()
            self.fused = nn.Linear(2, 4, bias=False)
            self.register_state_dict_post_hook(self._split)

        @staticmethod
        def _split(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
            first, second = state.pop(f"{prefix}fused.weight").chunk(2)
            state.update({f"{prefix}first.sub.weight": first, f"{prefix}second.sub.weight": second})

    names = ["first.sub.weight", "second.sub.weight"]
    assert list(onym.state_dict(Split())) == names
    assert list(onym.state_dict(torch.compile(Split()))) == names


def test_polluted_names_are_matched_and_ambiguous_ones_left() -> None:
    known = ["a.weight", "a.module.weight", "b.weight"]
    assert recover_names(["_orig_mod.module.b.weight"], known) == {"_orig_mod.module.b.weight": "b.weight"}
    assert recover_names(["_orig_mod.a.weight"], known) == {"_orig_mod.a.weight": "a.weight"}, "wrappers only add"
    assert recover_names(["a._orig_mod.module.weight", "b.weight"], known) == {}, "a.weight or a.module.weight?"
    assert recover_names(["module.b.weight", "_orig_mod.b.weight"], known) == {}, "which of the two?"
    assert recover_names(["x._orig_modulator.weight"], ["x.weight"]) == {}, "whole segments only"


def test_a_name_that_fits_another_parameter_is_not_taken_for_it(tmp_path: Path) -> None:
    """Wrapped, the inner scale has the outer one's name with a segment more; as it is, it fits the wrong parameter."""

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(1))
            self.module = inner

    model, other = Scaled(Scaled(nn.Linear(2, 2))), Scaled(Scaled(nn.Linear(2, 2)))
    for wrapped in (nn.DataParallel(model), AveragedModel(model)):
        torch.save(wrapped.state_dict(), tmp_path / "wrapped.pth")
        onym.load(tmp_path / "wrapped.pth", into=other)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_looking_at_a_model_disturbs_no_class_of_its_authors() -> None:
    closed: list[int] = []
    known: list[str] = []

    class Registering(type):
        def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, object], *, kind: str) -> Registering:
            known.append(f"{kind} {name}")
            return super().__new__(cls, name, bases, attributes)

        def __init__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, object], *, kind: str) -> None:
            super().__init__(name, bases, attributes)

    class Particular(nn.Module, metaclass=Registering, kind="the"):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.compile(nn.Linear(2, 2))

        def __init_subclass__(cls, **kwargs: object) -> None:
            known.append("a subclass")

        def __del__(self) -> None:
            closed.append(1)

    model = Particular()
    assert list(onym.state_dict(model)) == ["part.weight", "part.bias"]
    gc.collect()
    assert known == ["the Particular"]
    assert not closed, "what the class does at its end was not done"

    class Slotted(nn.Module):
        __slots__ = ("cache",)

    slotted = Slotted()
    slotted.part = torch.compile(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Slotted has __slots__"):
        onym.state_dict(slotted)
    loop = nn.ModuleDict({"a": nn.ModuleDict()})
    loop["a"]["b"] = loop  # type: ignore[index]
    with pytest.raises(ConfigError, match="contains itself"):
        onym.state_dict(loop)


def test_a_loading_hook_sees_the_plain_module() -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 2)
            self.register_load_state_dict_pre_hook(self.check)

        @staticmethod
        def check(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
            assert all(prefix + name in state for name, _ in module.named_parameters())

    model = Checking()
    model.part = torch.compile(model.part)  # type: ignore[assignment]
    assert len(onym.load_state_dict(model, Checking().state_dict()).loaded) == 2
