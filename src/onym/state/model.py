"""A model's state under its own names, whatever wraps it, in both directions.

Values come from the module's own ``state_dict()``, so its hooks, buffers and extra state are honoured. Loading copies into the
tensors that are there, so an optimizer's parameters and compiled code stay valid; all is checked before the first
copy, so a load that fails has changed nothing.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onym.errors import CheckpointError, ConfigError
from onym.names.diagnose import diagnose
from onym.names.mismatch import Described, Differences, MismatchError, compare
from onym.names.plain_view import plain_view
from onym.names.wrappers import require_module
from onym.state.casting import castable, overflows
from onym.state.composite import Unbuilt, build_like, resize_sparse
from onym.state.dtensor import distribute_like, full_parameters, full_tensor, is_sharded, local
from onym.state.offloaded import require_not_offloaded, with_offloaded
from onym.state.patterns import matches, require_patterns, skipping
from onym.state.undo import has_loading_code, has_memory, own_code_or_nothing

DtypePolicy = Literal["exact", "cast"]


@dataclass(frozen=True)
class LoadReport:
    """What a load did. All names are canonical."""

    loaded: list[str]
    missing: list[str] = field(default_factory=list)
    """In the model, not stored: left as they were (only with ``strict=False``)."""
    unexpected: list[str] = field(default_factory=list)
    """Stored, not in the model: not used (only with ``strict=False``; an ``AveragedModel``'s counter in any case)."""
    cast: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stored dtype and model dtype, where they differed (only with ``dtype="cast"``)."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Stored name -> name, where a wrapper had changed it."""
    overflowed: list[str] = field(default_factory=list)
    """With values beyond the range of the model's dtype, which became infinite, or other integers (only with
    ``dtype="cast"``)."""
    skipped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Stored shape and model shape, where they differed: left as they were (only with ``skip_mismatched``)."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for names, what in (
            (self.renamed, "renamed"),
            (self.cast, "cast"),
            (self.overflowed, "with values beyond the dtype's range"),
            (self.skipped, "of another shape, left as they were"),
            (self.missing, "left as they were"),
            (self.unexpected, "not used"),
        ):
            if names:
                shown = list(names)[:3]
                more = ", …" if len(names) > len(shown) else ""
                parts.append(f"{len(names)} {what} ({', '.join(shown)}{more})")
        return ", ".join(parts)


def state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` under the names that the model's author gave, through any nesting of wrappers.

    Equal in names, order and values to the ``state_dict()`` of the same model without wrappers. What a wrapper has of its own
    (``n_averaged`` of ``AveragedModel``) is in it too.

    Returns:
        {canonical name: tensor}. The tensors are the live ones, detached and not copied: clone them if they are needed after
        the next training step. FSDP2's are DTensors, this rank's shards. FSDP1's are full copies; every rank has to call.

    Raises:
        ConfigError: ``model`` is no module (``torch.compile(torch.compile(m))`` is a function, for one), is a TorchScript
            module, or has a lazy parameter, which has no values yet.

    >>> list(state_dict(torch.compile(nn.Linear(2, 1))))
    ['weight', 'bias']
    """
    state = named_state(model)
    for name, value in state.items():
        if isinstance(value, Tensor) and is_lazy(value):
            raise ConfigError(f"{name} has no values yet, because its layer is lazy: run one batch through the model first.")
    return state


def named_state(model: nn.Module) -> dict[str, Any]:
    """As :func:`state_dict`, with the parameters of lazy layers, which have no values yet: for what loads into the model."""
    require_module(model)
    with full_parameters(model) as passing:
        plain = plain_view(model)
        state: dict[str, Any] = with_offloaded(plain.state_dict(), plain)
        return _mapped(state, Tensor.clone) if passing else state


def full_state_dict(state: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The state with sharded tensors all-gathered, and whether this rank writes it.

    Where tensors are sharded every process has to call this, and the first one writes.
    """
    if not any(isinstance(value, Tensor) and is_sharded(value) for value in state.values()):
        return state, True
    return _mapped(state, full_tensor), torch.distributed.get_rank() == 0


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    dtype: DtypePolicy = "exact",
    skip_mismatched: str | Iterable[str] = (),
) -> LoadReport:
    """Copy tensors into a model, plain or wrapped, by canonical name.

    Args:
        model: any module; its tensors keep their identity, device and dtype.
        state: {canonical name: tensor}; not changed. A tied tensor may be given under any of its names. Full tensors load into
            sharded ones (FSDP) and the other way round.
        strict: refuse names that are missing or unexpected. Shapes must agree in any case.
        dtype: ``"exact"`` refuses a tensor of another dtype, ``"cast"`` converts and reports it, though never floating-point
            numbers to integers or complex ones to real.
        skip_mismatched: names, modules or patterns (``["head.*"]``) of tensors that stay as they are where their shapes differ:
            a head for another number of classes. They are the report's ``skipped``.

    Returns:
        What was loaded, and what was not.

    Raises:
        MismatchError: it does not fit; nothing has been changed.
        ConfigError: ``model`` is no module with values to copy into.

    >>> model = nn.Linear(2, 1)
    >>> print(load_state_dict(torch.compile(model), {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}))
    2 tensors loaded
    >>> model.weight
    Parameter containing:
    tensor([[1., 1.]], requires_grad=True)
    """
    if dtype not in ("exact", "cast"):
        raise ConfigError(f'dtype is "exact" or "cast", not {dtype!r}.')
    require_module(model)
    require_not_offloaded(model)
    if not (isinstance(state, Mapping) and all(isinstance(name, str) for name in state)):
        raise ConfigError(
            f"load_state_dict takes a dict of named tensors, not a {type(state).__name__}; onym.load takes a path."
        )
    with full_parameters(model, writeback=True), torch.no_grad():
        plain = plain_view(model)
        live = _live_state(plain)
        _require_writable(live)
        ties = _ties(live)
        complete = build_like(state, live)
        for name, others in ties.items():
            given = next((other for other in others if other in state), None)
            if name not in complete and given is not None:
                complete[name] = state[given]

        stored, target = describe(complete), describe(live, complete)
        patterns = require_patterns(skip_mismatched, live)
        differences = compare(stored, target)
        skipped = {name: pair for name, pair in differences.shapes.items() if matches(patterns, name)}
        if skipped:
            complete |= {name: live[name] for name in skipped}
            differences = compare(stored := describe(complete), target)
        refused = refused_of(differences, strict=strict, dtype=dtype)
        # Modules read the layout version of their state here. A .safetensors file has none, so the present version is assumed.
        versions = getattr(state, "_metadata", getattr(live, "_metadata", OrderedDict()))
        if refused.dtypes:
            raise MismatchError(refused, diagnose(refused, stored, target))
        _require_readable(complete)
        _require_equal_ties(ties, complete)
        storages = _storages(live.values())
        ready = OrderedDict((name, _ready(value, live.get(name), storages)) for name, value in complete.items())
        none_fits = bool(stored and target) and len(differences.missing) == len(target)
        if refused or none_fits:
            # Other names or shapes, or strict=False and no name fits, which nobody wants and few notice. A model may have
            # loading code of its own, for the names of earlier versions of itself or for buffers that grow: it is asked first.
            # Where the file states no versions, it is asked a second time as of a file from before there were any.
            tried = [versions] if hasattr(state, "_metadata") else [versions, OrderedDict()]
            left = _left_by_the_model(plain, ready, tried, strict or none_fits)
            if left is None:
                shown = refused or differences
                raise MismatchError(shown, [*diagnose(shown, stored, target), *skipping(shown, target)])
            missing, unexpected = left
            loaded = [name for name in complete if name not in unexpected and name not in skipped]
        else:
            missing, unexpected = differences.missing, differences.unexpected
            loaded = [name for name in target if name in complete and name not in skipped]
            _copy(plain, OrderedDict((name, ready[name]) for name in loaded), versions, live)
        overflowed = [name for name in differences.dtypes if overflows(complete[name], live[name])]
    if overflowed:
        kind, more = target[overflowed[0]][1], ", …" if len(overflowed) > 1 else ""
        became, into = ("infinite", "bfloat16 or float32") if "float" in kind else ("other numbers", "int64")
        warnings.warn(
            f"Values beyond the range of {kind} became {became} in {len(overflowed)} tensors ({overflowed[0]}{more}): load "
            f"into a model of {into}.",
            stacklevel=2,
        )
    return LoadReport(loaded, missing, unexpected, differences.dtypes, overflowed=overflowed, skipped=skipped)


def refused_of(differences: Differences, *, strict: bool, dtype: DtypePolicy) -> Differences:
    """The differences that :func:`load_state_dict` refuses, unless the model's own loading code takes them."""
    uncastable = {name: kinds for name, kinds in differences.dtypes.items() if not castable(*kinds)}
    return Differences(
        missing=differences.missing if strict else [],
        unexpected=differences.unexpected if strict else [],
        shapes=differences.shapes,
        dtypes=differences.dtypes if dtype == "exact" else uncastable,
    )


def _live_state(plain: nn.Module) -> dict[str, Any]:
    """The parameters and buffers themselves, under the names of the model's ``state_dict()``."""
    try:
        state: dict[str, Any] = plain.state_dict(keep_vars=True)
    except TypeError:  # a state_dict() of its own without that argument
        state = plain.state_dict()
    return state


def _copy(plain: nn.Module, ready: OrderedDict[str, Any], versions: Any, live: Mapping[str, Any]) -> None:
    """All of it, by the model's own ``load_state_dict``, or nothing."""
    ready._metadata = versions  # type: ignore[attr-defined]
    with own_code_or_nothing(plain, ready):
        for name, value in ready.items():
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                resize_sparse(live[name], value)
        # Names were compared already; a model whose state_dict() leaves something out would fail on what it never stored.
        unused = plain.load_state_dict(ready, strict=False)
        if unused is not None and unused.unexpected_keys:
            raise ValueError(f"its load_state_dict does not take what its state_dict gives: {unused.unexpected_keys[:3]}")


def _left_by_the_model(
    plain: nn.Module, ready: OrderedDict[str, Any], versions: Iterable[Any], strict: bool
) -> tuple[list[str], list[str]] | None:
    """Load by the model's own loading code.

    Args:
        plain: the model.
        ready: the values.
        versions: the layout versions to try.
        strict: it has to find a place for every name, and a value for every place.

    Returns:
        The names that are missing and those that were not used; None where it does not take the values, or has no such code.
    """
    if not any(map(has_loading_code, plain.modules())):
        return None
    for tried in versions:
        ready._metadata = tried  # type: ignore[attr-defined]
        try:
            with own_code_or_nothing(plain, ready):
                left = plain.load_state_dict(ready, strict=strict)
        except CheckpointError:
            continue
        return ([], []) if left is None else (list(left.missing_keys), list(left.unexpected_keys))
    return None


def describe(state: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Described:
    """Names with their shapes and dtypes; what a module stores of its own making (``_extra_state``) has none.

    A parameter of a lazy layer takes the shape of what it is ``given``.
    """

    def shape(name: str, value: Tensor) -> tuple[int, ...]:
        if value.is_nested:  # it has no shape of numbers
            return ()
        if not is_lazy(value):
            return tuple(value.shape)
        like = (given or {}).get(name)
        return tuple(like.shape) if isinstance(like, Tensor) and not is_lazy(like) else ()

    return {
        name: (shape(name, value), str(value.dtype).removeprefix("torch."))
        if isinstance(value, Tensor) and not _is_extra(name)
        else (value.shape, value.dtype)
        if isinstance(value, Unbuilt)
        else ((), "value")
        for name, value in state.items()
    }


def tensor_identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two tensors that are the same memory seen the same way; None where a tensor has no memory."""
    tensor = local(tensor)
    if not has_memory(tensor):
        return None
    seen_as = (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *seen_as)


def _mapped(state: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Each tensor changed; tied ones stay tied. All are changed, so that processes which change them together do so in step."""
    changed = {name: change(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    first: dict[Any, str] = {}
    names = {name: first.setdefault(_identity_or_self(value), name) for name, value in state.items()}
    mapped: OrderedDict[str, Any] = OrderedDict((name, changed[names[name]]) for name in state)
    if hasattr(state, "_metadata"):
        mapped._metadata = state._metadata  # type: ignore[attr-defined]
    return mapped


def _identity_or_self(value: Any) -> Any:
    return (tensor_identity(value) if isinstance(value, Tensor) else None) or id(value)


def _require_writable(live: Mapping[str, Any]) -> None:
    """Refuse what would swallow a copy, or fail in the middle of one."""
    for name, value in live.items():
        if not isinstance(value, Tensor):
            continue
        if is_lazy(value):  # its layer makes it as large as what is loaded into it
            continue
        if value.is_meta:
            raise ConfigError(
                f"{name} is on the meta device and can hold no values: use onym.load(path, into=model), which gives it "
                "memory, or call model.to_empty(device='cpu') before loading."
            )
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ConfigError(
                f"{name} was made in torch.inference_mode() and cannot be changed outside of it: load within it too, or build "
                "the model outside."
            )
        shard = local(value)
        if (
            shard.layout == torch.strided
            and not shard.is_nested
            and any(step == 0 and size > 1 for step, size in zip(shard.stride(), shard.shape, strict=True))
        ):
            raise ConfigError(f"{name} is an expanded view, several of whose values are one: call .clone() first.")


def _ties(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each name of a tied tensor, its other names."""
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            groups.setdefault(_identity_or_self(value), []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group if len(group) > 1}


def _require_equal_ties(ties: Mapping[str, list[str]], state: Mapping[str, Any]) -> None:
    for name, others in ties.items():
        for other in others:
            if name < other and name in state and other in state:
                mine, theirs = state[name], state[other]
                # Shards are all-gathered in any case: every rank has to take part, even one whose shard is empty.
                sharded = is_sharded(mine) or is_sharded(theirs)
                same = not sharded and _identity_or_self(mine) == _identity_or_self(theirs)
                if not same and not _equal(full_tensor(mine), full_tensor(theirs)):
                    raise CheckpointError(
                        f"{name} and {other} are one tensor in this model but differ in what is stored: build the model "
                        "with them untied (for a GPT: tie_embeddings=False)."
                    )


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    """Equal in every value, NaN included."""
    return torch.equal(mine, theirs) or bool(((mine == theirs) | ((mine != mine) & (theirs != theirs))).all())


def _require_readable(given: Mapping[str, Any]) -> None:
    """Refuse what has no values to copy."""
    for name, value in given.items():
        if isinstance(value, Tensor) and (is_lazy(value) or value.is_meta):
            raise CheckpointError(
                f"The tensor given for {name} has no values (it is on the meta device, or lazy); nothing was changed."
            )


def _ready(value: Any, target: Any, storages: set[int]) -> Any:
    """A value as the model's own ``load_state_dict`` can copy it."""
    if not isinstance(value, Tensor) or not isinstance(target, Tensor) or is_lazy(target) or target.is_nested:
        return value
    if value.shape != target.shape:
        return value
    value = distribute_like(value, target)
    # Two layers swapped, say: the copy into one must not change what is still to be copied from it.
    overlaps = bool(storages & _storages([value])) and tensor_identity(value) != tensor_identity(target)
    return value.clone() if overlaps else value


def _storages(values: Iterable[Any]) -> set[int]:
    """Where the memory behind some tensors is."""
    shards = [local(value) for value in values if isinstance(value, Tensor)]
    return {shard.untyped_storage().data_ptr() for shard in shards if has_memory(shard)}


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"
