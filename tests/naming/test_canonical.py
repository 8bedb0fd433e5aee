"""Names depend on the model's own attributes alone, whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import origo
from origo.errors import ConfigError
from origo.naming.canonical import canonical_names, recover_names
from origo.naming.wrappers import register_wrapper

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


def compiled_children(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, torch.compile(child))
    return model


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
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrapped_and_plain_have_equal_names_both_ways(wrap: Wrap) -> None:
    plain, source = Hostile(), Hostile()
    wrapped = wrap(source)
    assert list(origo.state_dict(wrapped)) == list(plain.state_dict())

    report = origo.load_state_dict(wrapped, plain.state_dict())
    assert report.loaded == list(plain.state_dict())
    for name, value in origo.state_dict(wrapped).items():
        assert torch.equal(value, plain.state_dict()[name]), name

    back = Hostile()
    back.load_state_dict(origo.state_dict(wrapped), strict=True)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_root_is_unwrapped_and_no_child_that_only_looks_like_it(wrap: Wrap) -> None:
    assert isinstance(origo.unwrap(wrap(Hostile())), Hostile)


def test_a_registered_wrapper_is_seen_through() -> None:
    class Logged(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.the_model = model

    model = Logged(nn.Sequential(nn.Linear(2, 2)))
    assert list(origo.state_dict(model)) == ["the_model.0.weight", "the_model.0.bias"]
    register_wrapper(Logged, "the_model")
    assert list(origo.state_dict(torch.compile(model))) == ["0.weight", "0.bias"]


def test_a_wrapper_that_hides_a_name_of_the_model_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model
            self.weight = nn.Parameter(torch.ones(1))

    register_wrapper(Scaled, "inner")
    with pytest.raises(ConfigError, match=r"'weight' and 'inner.weight' would both be called 'weight'"):
        origo.state_dict(Scaled(nn.Linear(2, 1)))


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
    assert list(origo.state_dict(Split())) == names
    assert list(origo.state_dict(torch.compile(Split()))) == names


def test_polluted_names_are_matched_and_ambiguous_ones_left() -> None:
    known = ["a.weight", "a.module.weight", "b.weight"]
    assert recover_names(["_orig_mod.module.b.weight"], known) == {"_orig_mod.module.b.weight": "b.weight"}
    assert recover_names(["_orig_mod.a.weight"], known) == {}, "a.weight or a.module.weight?"
    assert recover_names(["module.b.weight", "_orig_mod.b.weight"], known) == {}, "which of the two?"
    assert recover_names(["x._orig_modulator.weight"], ["x.weight"]) == {}, "whole segments only"


def test_naming_is_linear_in_the_number_of_tensors() -> None:
    """Each prefix is walked once: the walk's steps are counted, not its seconds."""
    model = torch.compile(nn.ModuleList(nn.Sequential(*(nn.Linear(1, 1) for _ in range(10))) for _ in range(20)))
    raw = list(model.state_dict())  # type: ignore[attr-defined]
    import origo.naming.canonical as canonical

    steps, step = 0, canonical._step

    def counted(place: object, segment: str) -> object:
        nonlocal steps
        steps += 1
        return step(place, segment)  # type: ignore[arg-type]

    canonical._step = counted  # type: ignore[assignment]
    try:
        canonical_names(model, raw)  # type: ignore[arg-type]
    finally:
        canonical._step = step
    assert len(raw) == 400
    assert steps == 1 + 20 + 200, "the compiled root, the lists, the layers"
