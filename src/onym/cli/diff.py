"""``onym diff``: how two models differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onym.cli.arguments import DiffArguments
from onym.cli.report import checkpoints_folder, open_noting, print_heading, print_json, print_table, shown
from onym.format.manifest import MODEL
from onym.format.reader import Checkpoint
from onym.format.safetensors import as_bytes
from onym.names.match import recover_names
from onym.storage.paths import as_path
from onym.units import plural

DIFFERENT = 1

_SHOWN = 10
_CHUNK = 1 << 22  # values that are widened at a time
_VALUE = "value"  # what a module stores of its own making: no tensor


def run(given: DiffArguments) -> int:
    """``onym diff``."""
    pair = []
    for path, step in ((given.a, given.step_a), (given.b, given.step_b)):
        checkpoints_folder(as_path(path))  # raises where a storage cannot be reached
        pair.append(open_noting(path, step))
    report = compare(*pair)
    print_json(report) if given.json else _print(report, given.a, given.b)
    return 0 if report["equal"] else DIFFERENT


@dataclass
class _Gap:
    """How far values are from others; of one tensor, or of several together."""

    values: int = 0
    changed: int = 0
    largest: float = 0.0
    squares: float = 0.0
    """Of the differences, summed."""
    scale: float = 0.0
    """The squares of A's values, summed."""

    def add(self, other: _Gap) -> None:
        self.values += other.values
        self.changed += other.changed
        self.largest = max(self.largest, other.largest)
        self.squares += other.squares
        self.scale += other.scale

    def report(self) -> dict[str, float]:
        relative = math.sqrt(self.squares / self.scale) if self.scale else math.inf if self.squares else 0.0
        return {"largest": self.largest, "relative": relative, "changed": self.changed / max(self.values, 1)}


def compare(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """What differs. One tensor of each is in memory at a time.

    Raises:
        CheckpointError: one of them is damaged.
    """
    report: dict[str, Any] = {
        "equal": True,
        "identity": [a.identity, b.identity],
        "found": [each.origin.kind if each.origin is not None else None for each in (a, b)],
        "config": _different_fields(a.config, b.config),
        "renamed": {},
        "only_a": [],
        "only_b": [],
        "kinds": {},
        "values": {},
        "other_values": [],
        "groups": {},
    }
    if a.identity is not None and a.identity == b.identity:
        for each in (a, b):  # the identity is of what was written; whether that is still there, only the bytes say
            each.verify([MODEL] if each.manifest else None)
        return report
    renamed = _renames(a.names, b.names)
    report["renamed"] = {**_cleaned(a=a, b=b), **renamed}
    first, second = _originals(a, renamed.get("a", {})), _originals(b, renamed.get("b", {}))
    report["only_a"] = [name for name in first if name not in second]
    report["only_b"] = [name for name in second if name not in first]
    total, groups, same = _Gap(), dict[str, _Gap](), 0
    known: dict[tuple[str, str], _Gap | bool] = {}  # tied names are compared once
    for name in (name for name in first if name in second):
        one, other = first[name], second[name]
        was, now = _kind(a, one), _kind(b, other)
        if was != now:
            report["kinds"][name] = [was, now]
        if was[1] != now[1] or (_VALUE in (was[0], now[0]) and was != now):
            continue
        again = (one, other) in known
        if not again:
            known[one, other] = _difference(a.model.tensor(one), b.model.tensor(other))
        gap = known[one, other]
        if isinstance(gap, bool):
            same += gap
            if not gap:
                report["other_values"].append(name)
            continue
        same += not gap.changed
        if gap.changed:
            report["values"][name] = gap.report()
        if not again:
            total.add(gap)
            groups.setdefault(_family(name), _Gap()).add(gap)
    report["equal_tensors"] = same
    report["groups"] = {family: gap.report() for family, gap in groups.items() if gap.changed}
    report["total"] = total.report()
    report["equal"] = not any(report[what] for what in ("only_a", "only_b", "kinds", "values", "other_values"))
    return report


def _renames(a: Sequence[str], b: Sequence[str]) -> dict[str, dict[str, str]]:
    """Names of one of the two that wrappers have changed -> the other's; by "a" or "b"."""
    for which, polluted, clean in (("b", b, a), ("a", a, b)):
        renamed = recover_names(polluted, clean)
        if renamed:
            return {which: renamed}
    return {}


def _cleaned(**checkpoints: Checkpoint) -> dict[str, dict[str, str]]:
    """Names that were cleaned when the file was opened."""
    origins = {which: checkpoint.origin for which, checkpoint in checkpoints.items()}
    return {which: origin.renamed() for which, origin in origins.items() if origin is not None and origin.wrappers}


def _originals(checkpoint: Checkpoint, renames: Mapping[str, str]) -> dict[str, str]:
    """Clean names -> those that the tensors are stored under."""
    aliases = checkpoint.model.aliases
    return {renames.get(name, name): aliases.get(name, name) for name in checkpoint.names}


def _kind(checkpoint: Checkpoint, name: str) -> tuple[str, list[int]]:
    return checkpoint.model.dtypes[name], list(checkpoint.model.shapes[name])


def _difference(one: Any, other: Any) -> _Gap | bool:
    """How far two tensors of one shape are apart. Whether they are equal where there is nothing to subtract."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return _equal(one, other)
    try:
        left, right = (_dense(each.detach()).reshape(-1) for each in (one, other))
        gap = _Gap(left.numel())
        for start in range(0, gap.values, _CHUNK):
            _add_chunk(gap, left[start : start + _CHUNK], right[start : start + _CHUNK])
        return gap
    except (RuntimeError, NotImplementedError):  # a dtype that torch stores and cannot compute with
        return one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


def _add_chunk(gap: _Gap, left: Tensor, right: Tensor) -> None:
    integers = not any(each.is_floating_point() or each.is_complex() for each in (left, right))
    if integers:  # float64 has not all of int64's values
        differs = left.to(torch.int64) != right.to(torch.int64)
    wide = torch.complex128 if left.is_complex() or right.is_complex() else torch.float64
    left, right = left.to(wide), right.to(wide)
    if not integers:
        differs = (left != right) & ~(left.isnan() & right.isnan())
    apart = (left - right).abs()
    apart = apart.clamp(min=1) if integers else apart.nan_to_num(nan=math.inf, posinf=math.inf)
    apart = torch.where(differs, apart, 0.0)
    gap.changed += int(differs.sum())
    gap.largest = max(gap.largest, float(apart.max()))
    gap.squares += float(apart.square().sum())
    gap.scale += float(left.abs().nan_to_num(nan=0.0, posinf=0.0).square().sum())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        gap = _difference(one, other)
        return gap if isinstance(gap, bool) else not gap.changed
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    return type(one) is type(other) and bool(one == other)


def _family(name: str) -> str:
    """A name with ``*`` for the numbers in it, as all layers have it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _different_fields(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """Those of the configuration that differ; none where one of the two has no configuration."""
    if one is None or other is None:
        return {}
    fields = dict.fromkeys([*one, *other])
    return {field: [one.get(field), other.get(field)] for field in fields if one.get(field) != other.get(field)}


def _print(report: Mapping[str, Any], a: str, b: str) -> None:
    if report["equal"]:
        identity = report["identity"][0]
        same = f" (identity {identity[:12]})" if identity is not None and identity == report["identity"][1] else ""
        print_heading(f"The same weights{same}: every name, shape, dtype and value.")
    for which, kind in zip("AB", report["found"], strict=True):
        if kind is not None:
            print(shown(f"{which} is {kind}."))
    for which, names in report["renamed"].items():
        print(f"Names of {which.upper()} that wrappers had changed were cleaned, {len(names)}:")
        _print_some([(name, f"-> {clean}") for name, clean in names.items()])
    for field, (was, now) in report["config"].items():
        print(shown(f"config: {field} is {was} in A, {now} in B"))
    if report["equal"]:
        return
    for which, path, names in (("A", a, report["only_a"]), ("B", b, report["only_b"])):
        if names:
            print_heading(f"Only in {which} ({path}), {len(names)}:")
            print_table(_families(names))
    if report["kinds"]:
        print_heading(f"Of other shapes or dtypes, {len(report['kinds'])}:")
        kinds = [(name, *(f"{dtype} {shape}" for dtype, shape in pair)) for name, pair in report["kinds"].items()]
        _print_some(kinds, ("", "A", "B"))
    if report["other_values"]:
        print_heading(f"With other values that have no distance, {len(report['other_values'])}:")
        _print_some([(name,) for name in report["other_values"]])
    if report["values"]:
        _print_values(report)


def _print_values(report: Mapping[str, Any]) -> None:
    values = sorted(report["values"].items(), key=lambda item: -item[1]["relative"])
    verb = "has" if len(values) == 1 else "have"
    more = " Those that differ most:" if len(values) > _SHOWN else ""
    print_heading(f"{plural(len(values), 'tensor')} {verb} other values, {report['equal_tensors']} are equal.{more}")
    titles = ("", "relative L2", "largest", "values changed")
    rows = [titles, *(_gap_row(name, gap) for name, gap in values[:_SHOWN])]
    print_table([*rows, _gap_row("all tensors of both", report["total"])])
    if len(values) > _SHOWN:
        print_heading("By kind, all layers together:")
        print_table([titles, *(_gap_row(family, gap) for family, gap in report["groups"].items())])


def _gap_row(name: str, gap: Mapping[str, float]) -> tuple[str, str, str, str]:
    return name, f"{gap['relative']:.3g}", f"{gap['largest']:.3g}", f"{gap['changed']:.2%}"


def _families(names: Iterable[str]) -> list[tuple[str, str]]:
    """One row for the same name in several layers."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_family(name), []).append(name)
    return [(family, f"({len(all_of)}x)") if len(all_of) > 1 else (all_of[0], "") for family, all_of in families.items()]


def _print_some(rows: list[tuple[str, ...]], titles: tuple[str, ...] | None = None) -> None:
    print_table([*([titles] if titles else []), *rows[:_SHOWN]])
    if len(rows) > _SHOWN:
        print(f"  and {len(rows) - _SHOWN} more; --json has all")
