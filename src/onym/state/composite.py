"""Tensors that are made of others: sparse, nested, quantised ones, and subclasses (torchao's weights, 8-bit optimizer states).

They are taken apart into plain tensors and JSON. All but subclasses are rebuilt by torch. A subclass
(``__tensor_flatten__``) is rebuilt by a live tensor of the same class: a file names the class for messages alone, and nothing
is looked up by that name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onym.errors import CheckpointError
from onym.state.dtensor import is_sharded

_COMPRESSED = {  # layout -> its compressed and its plain indices
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_LAYOUTS = {str(layout).removeprefix("torch."): layout for layout in _COMPRESSED}
_ADDRESS = re.compile(r"\b0x[0-9a-f]+")


def is_composite(value: Any) -> bool:
    """Whether it is a tensor made of others, other than this rank's chunk of a sharded one."""
    if type(value) is Tensor and value.layout is torch.strided:
        return value.is_nested or value.is_quantized
    if not isinstance(value, Tensor) or is_sharded(value) or is_lazy(value):
        return False
    other = value.is_nested or value.is_quantized or value.layout != torch.strided
    return other or is_traceable_wrapper_subclass(value)


def is_subclass(value: Any) -> bool:
    """Whether it is a tensor that only a live one of its class can rebuild."""
    return is_composite(value) and not value.is_nested and is_traceable_wrapper_subclass(value)


def require_loadable(name: str, value: Any) -> None:
    """Refuse as a model's tensor what PyTorch's ``load_state_dict`` cannot load.

    Raises:
        CheckpointError: it is nested, which has no shape to compare.
    """
    if isinstance(value, Tensor) and value.is_nested:
        raise CheckpointError(
            f"{name} is a nested tensor, which PyTorch cannot load into a model: hold its values and sizes as two buffers, or "
            "save it beside the model (onym.Checkpointer)."
        )


def class_name(value: object) -> str:
    """The name of its class, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def take_apart(value: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a composite tensor is, as JSON values, and the tensors that it is made of, which may be composite themselves."""
    value = value.detach()
    if value.is_nested and value.layout == torch.strided:
        rows = value.unbind()
        sizes = torch.tensor([list(row.shape) for row in rows], dtype=torch.int64)
        values = torch.cat([row.reshape(-1) for row in rows]) if rows else torch.empty(0, dtype=value.dtype)
        return {"kind": "nested"}, {"values": values, "sizes": sizes}
    made: Any = value
    if value.is_nested:
        parts = {"values": made._values, "offsets": made._offsets, "lengths": made._lengths}
        return {"kind": "jagged", "dim": made._ragged_idx}, {key: part for key, part in parts.items() if part is not None}
    if value.is_quantized:
        return _take_quantised_apart(value)
    about: dict[str, Any] = {"size": list(value.shape)}
    if value.layout == torch.sparse_coo:
        about |= {"kind": "sparse_coo", "coalesced": value.is_coalesced()}
        return about, {"indices": value._indices(), "values": value._values()}
    if value.layout in _COMPRESSED:
        names = _COMPRESSED[value.layout]
        about |= {"kind": str(value.layout).removeprefix("torch.")}
        return about, {**{name: getattr(value, name)() for name in names}, "values": value.values()}
    names, context = made.__tensor_flatten__()
    about |= {"kind": "subclass", "class": class_name(value), "context": _written(context)}
    about["dtype"] = str(value.dtype).removeprefix("torch.")
    return about, {name: getattr(value, name) for name in names}


def _take_quantised_apart(value: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of torch's own quantised dtypes, which its eager mode quantisation gives."""
    if value.dtype not in (torch.qint8, torch.quint8, torch.qint32):
        raise CheckpointError(f"A tensor of {value.dtype} cannot be saved: save its dequantize().")
    if value.qscheme() == torch.per_tensor_affine:
        return {"kind": "quantized", "scale": value.q_scale(), "zero_point": value.q_zero_point()}, {"values": value.int_repr()}
    parts = {"scales": value.q_per_channel_scales(), "zero_points": value.q_per_channel_zero_points()}
    return {"kind": "quantized", "axis": value.q_per_channel_axis()}, {"values": value.int_repr(), **parts}


def put_together(about: Mapping[str, Any], parts: Mapping[str, Any]) -> Tensor | Unbuilt:
    """The tensor; of a subclass what a live one can build it from.

    Raises:
        CheckpointError: the parts do not fit together.
    """
    try:
        kind = about["kind"]
        if kind == "subclass":
            texts = {key: str(about[key]) for key in ("class", "context", "dtype")}
            return Unbuilt(texts["class"], texts["context"], texts["dtype"], tuple(map(int, about["size"])), dict(parts))
        if kind == "nested":
            sizes = parts["sizes"].tolist()
            rows = parts["values"].split([math.prod(size) for size in sizes]) if sizes else []
            return torch.nested.as_nested_tensor([row.view(size) for row, size in zip(rows, sizes, strict=True)])
        if kind == "quantized":
            if "scale" in about:
                return torch._make_per_tensor_quantized_tensor(parts["values"], about["scale"], about["zero_point"])
            scales, zero_points = parts["scales"], parts["zero_points"]
            # torch's constructor checks neither, and its kernels read as far as they say.
            if not scales.shape == zero_points.shape == (parts["values"].shape[range(parts["values"].dim())[about["axis"]]],):
                raise ValueError("its scales are not one for each channel")
            return torch._make_per_channel_quantized_tensor(parts["values"], scales, zero_points, about["axis"])
        if kind == "jagged":
            _require_within(parts["offsets"], parts.get("lengths"), parts["values"].shape[about["dim"] - 1])
            ragged = torch.nested.nested_tensor_from_jagged
            made: Tensor = ragged(parts["values"], parts["offsets"], parts.get("lengths"), jagged_dim=about["dim"])
            return made
        if kind == "sparse_coo":
            coalesced, size = bool(about["coalesced"]), about["size"]
            indices, values = parts["indices"], parts["values"]
            return torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=True)
        layout, size = _LAYOUTS[kind], about["size"]
        compressed, plain = (parts[name] for name in _COMPRESSED[layout])
        return torch.sparse_compressed_tensor(
            compressed, plain, parts["values"], size=size, layout=layout, check_invariants=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"A stored tensor that is made of others is damaged ({reason[:160]}).") from error


def _require_within(offsets: Tensor, lengths: Tensor | None, rows: int) -> None:
    """Refuse a jagged tensor that reaches out of its values, which torch does not check."""
    starts, ends = offsets[:-1], offsets[1:] if lengths is None else offsets[:-1] + lengths
    inside = offsets.dim() == 1 and offsets.dtype == torch.int64 and bool((starts >= 0).all() and (starts <= ends).all())
    if not inside or bool((ends > rows).any()):
        raise ValueError("it reaches out of its values")


@dataclass(frozen=True, eq=False)
class Unbuilt:
    """A stored subclass tensor. Only a live tensor of the same class can make one of it."""

    class_name: str
    context: str
    """What ``__tensor_flatten__`` gave beside the tensors, as text: it is compared, never evaluated."""
    dtype: str
    shape: tuple[int, ...]
    parts: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Unbuilt) or self.parts.keys() != other.parts.keys():
            return False
        if any((getattr(self, key) != getattr(other, key)) for key in ("class_name", "context", "dtype", "shape")):
            return False
        pairs = [(part, other.parts[key]) for key, part in self.parts.items()]
        return all(one == two if isinstance(one, Unbuilt) else torch.equal(one, two) for one, two in pairs)

    __hash__ = None  # type: ignore[assignment]

    def built_by(self, live: Any, name: str) -> Tensor:
        """The tensor, as one of a live tensor's class and settings.

        Raises:
            CheckpointError: ``live`` is another kind of tensor; says which.
        """
        short = self.class_name.rpartition(".")[2]
        if not is_subclass(live) or class_name(live) != self.class_name:
            is_now = type(live).__name__ if isinstance(live, Tensor) else "nothing"
            raise CheckpointError(
                f"{name} was stored as a {short}, and it is {is_now} here: quantise or convert the model, or build the "
                "optimizer, as it was done where it was saved, and load then."
            )
        names, context = live.__tensor_flatten__()
        if (now := _written(context)) != self.context or set(names) != self.parts.keys():
            raise CheckpointError(f"{name} is a {short} that was stored with other settings: {self.context}; here {now}.")
        parts = {}
        for each in names:
            part, wanted = self.parts[each], getattr(live, each)
            part = part.built_by(wanted, f"{name}.{each}") if isinstance(part, Unbuilt) else part
            if (part.dtype, part.shape) != (wanted.dtype, wanted.shape):
                was, is_now = (f"{each_.dtype} {list(each_.shape)}" for each_ in (part, wanted))
                raise CheckpointError(f"{name} is a {short} whose {each} was stored as {was} and is {is_now} here.")
            parts[each] = part.to(wanted.device)
        built: Tensor = type(live).__tensor_unflatten__(parts, context, live.shape, live.stride())
        return built


def build_like(state: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """A stored state in which each subclass tensor is built by the live one of its name; one of another shape stays as it is.

    Raises:
        CheckpointError: see :meth:`Unbuilt.built_by`; or a tensor is sparse or nested on one side alone.
    """
    built = dict(state)
    for name, value in state.items():
        now = live.get(name)
        if isinstance(value, Unbuilt) and isinstance(now, Tensor) and not now.is_nested and tuple(now.shape) == value.shape:
            built[name] = value.built_by(now, name)
        elif not isinstance(value, Tensor) or not isinstance(now, Tensor) or is_lazy(now):
            continue
        elif value.layout is not now.layout or value.is_nested is not now.is_nested:
            raise CheckpointError(
                f"{name} is stored as a {_form(value)} tensor, and is {_form(now)} here: convert one of them first (to_dense() "
                "makes a sparse one strided)."
            )
    return built


def _form(value: Tensor) -> str:
    return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")


def resize_sparse(live: Any, value: Any) -> None:
    """Give a compressed sparse tensor as many elements as what is copied into it has, which ``copy_`` does not do."""
    if isinstance(live, Tensor) and live.layout in _COMPRESSED and isinstance(value, Tensor) and value.layout == live.layout:
        live.resize_as_sparse_(value)


def _written(context: Any) -> str:
    """The text of what a subclass has beside tensors, without addresses of memory."""
    return _ADDRESS.sub("0x", repr(context))
