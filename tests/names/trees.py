"""Random models and random wrappers around any of their parts, for the properties in test_any_nesting.py.

A plan is plain data, so the same model can be built twice, bare and wrapped, and a failing one can be read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations

from onym.names.wrappers import register_wrapper

WIDTH = 4
NAMES = ["a", "b", "module", "_orig_mod", "_orig_modulator", "_checkpoint_wrapped_module", "_original_module", "inner"]


class Tree(nn.Module):
    """Calls its parts one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self._modules.values():  # children() leaves out a part that is there twice
            for call in (
                part.values() if isinstance(part, nn.ModuleDict) else part if isinstance(part, nn.ModuleList) else [part]
            ):
                x = x + 0.5 * torch.tanh(call(x))
        return x


class Odd(nn.Module):
    """A parameter and buffers with hostile names, extra state, one buffer that is not kept, one parameter that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Parameter(torch.randn(WIDTH))
        self._orig_mod = nn.Parameter(torch.randn(WIDTH))
        self.register_parameter("absent", None)
        self.register_buffer("_checkpoint_wrapped_module", torch.randn(WIDTH))
        self.register_buffer("scratch", torch.randn(WIDTH), persistent=False)
        self.count = int(torch.randint(1000, (1,)))

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.module + self._orig_mod * self._checkpoint_wrapped_module


class Fused(nn.Module):
    """Computes with one matrix and stores two: its hooks look for its child's tensor under its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, dim=-1)
        return torch.sigmoid(first) * second

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        first, second = state.pop(f"{prefix}both.weight").detach().chunk(2)
        state.update({f"{prefix}first.matrix": first, f"{prefix}second.matrix": second})

    @staticmethod
    def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        if f"{prefix}first.matrix" in state:
            halves = [state.pop(f"{prefix}{half}.matrix") for half in ("first", "second")]
            state[f"{prefix}both.weight"] = torch.cat(halves)


class Logged(nn.Module):
    """A user's own wrapper, with something of its own to keep out of the way."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.inner = wrapped
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        y: Tensor = self.inner(x)
        return y


register_wrapper(Logged, "inner")

LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "odd": Odd,
    "fused": Fused,
}
SHARDABLE = ["linear", "no bias", "norm", "batch norm", "parametrised"]


def _in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def _sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)
    return module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda module: torch.compile(module, backend="eager"),  # type: ignore[return-value]
    "compiled in place": _in_place,
    "checkpointed": checkpoint_wrapper,
    "offloaded": offload_wrapper,
    "logged": Logged,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "sharded": _sharded,
}
REPLICATED = [name for name in WRAPPERS if name != "sharded"]
SHARDED = ["compiled", "compiled in place", "checkpointed", "logged", "sharded"]


@dataclass(frozen=True)
class Plan:
    """A module: its kind, its parts by name, and which earlier linear layer its weight is tied to."""

    kind: str
    parts: tuple[tuple[str, Plan | int], ...] = ()
    """A number stands for the n-th module that was built before: the same object again."""


@dataclass(frozen=True)
class Wraps:
    """What is put around the parts, in the order in which they are built; used up one by one, then again from the start."""

    layers: tuple[tuple[str, ...], ...] = ((),)
    positions: itertools.count[int] = field(default_factory=itertools.count, compare=False, repr=False)

    def around(self, module: nn.Module) -> nn.Module:
        for name in self.layers[next(self.positions) % len(self.layers)]:
            if isinstance(module, torch._dynamo.OptimizedModule) and name == "compiled":
                continue  # torch.compile of what it returned is a function
            if name == "sharded" and isinstance(module, FSDPModule):
                continue  # once is all that torch allows
            if name in ("distributed", "sharded") and not any(p.requires_grad for p in module.parameters()):
                continue
            try:
                module = WRAPPERS[name](module)
            except AssertionError as error:  # compile(checkpoint(compile(m))) is not possible in torch 2.13
                if "get_compiler_config" not in str(error):
                    raise
        return module


def build(plan: Plan, wraps: Wraps = Wraps(), ties: tuple[tuple[int, int], ...] = (), seed: int = 0) -> nn.Module:
    """The same plan, seed and ties give the same model, whatever is wrapped around its parts."""
    torch.manual_seed(seed)
    wraps = Wraps(wraps.layers)
    built: list[nn.Module] = []

    def module(plan: Plan | int) -> nn.Module:
        if isinstance(plan, int):
            reusable = [part for part in built if not isinstance(part, nn.ModuleList | nn.ModuleDict)]
            return reusable[plan % len(reusable)] if reusable else nn.Linear(WIDTH, WIDTH)
        if plan.kind in LEAVES:
            made = LEAVES[plan.kind]()
            built.append(made)
            return made
        # Bottom-up, so that an outer wrapper goes around inner ones; containers are not called, so nothing can wrap them.
        parts = {name: part(inner) for name, inner in plan.parts}
        made = {"tree": Tree, "list": nn.ModuleList, "dict": nn.ModuleDict, "sequence": nn.Sequential}[plan.kind]()
        for index, (name, child) in enumerate(parts.items()):
            made.add_module(str(index) if plan.kind in ("list", "sequence") else name, child)
        built.append(made)
        return made

    def part(plan: Plan | int) -> nn.Module:
        made = module(plan)
        return made if isinstance(made, nn.ModuleList | nn.ModuleDict) else wraps.around(made)

    root = module(plan)
    linear = [m for m in built if type(m) is nn.Linear]
    for first, second in ties:
        if linear:
            linear[first % len(linear)].weight = linear[second % len(linear)].weight
    return wraps.around(root)


def plans(leaves: list[str], *, shared: bool) -> st.SearchStrategy[Plan]:
    """Models up to a dozen parts, or so."""
    leaf = st.builds(Plan, st.sampled_from(leaves))

    def node(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
        part: st.SearchStrategy[Plan | int] = inner | st.integers(0, 9) if shared else inner
        callable_parts = st.lists(
            st.tuples(st.sampled_from(NAMES), part), min_size=1, max_size=4, unique_by=lambda item: item[0]
        )
        tree = st.builds(Plan, st.just("tree"), callable_parts.map(tuple))
        sequence = st.builds(Plan, st.just("sequence"), callable_parts.map(tuple))
        container = st.builds(Plan, st.sampled_from(["list", "dict"]), callable_parts.map(tuple))
        with_container = st.builds(lambda name, box: Plan("tree", ((name, box),)), st.sampled_from(NAMES), container)
        return tree | sequence | with_container

    return node(st.recursive(leaf, node, max_leaves=6))


def nestings(names: list[str]) -> st.SearchStrategy[Wraps]:
    """Up to three wrappers around each part."""
    around = st.lists(st.sampled_from(names), max_size=3).map(tuple)
    return st.builds(Wraps, st.lists(around, min_size=1, max_size=6).map(tuple))


ties = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2).map(tuple)


def equal(first: Mapping[str, Any], second: Mapping[str, Any], tolerance: float = 0.0) -> bool:
    """Equal names in equal order, equal values."""
    return list(first) == list(second) and all(
        torch.allclose(value, second[name], rtol=tolerance, atol=tolerance, equal_nan=True)
        if isinstance(value, Tensor)
        else value == second[name]
        for name, value in first.items()
    )
