"""``origo diff``: how two models differ."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from origo.cli.report import print_json, print_table
from origo.naming.recovery import recover_names
from origo.store.reader import Checkpoint
from origo.store.run import find_checkpoint

DIFFERENT = 1
_SHOWN = 10


@dataclass(frozen=True)
class _Arguments:
    """Compare two models: equal weights, or which names, shapes, dtypes and values differ. Exit code 1 where they do."""

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A", help_behavior_hint="")]
    """A run, a checkpoint, a model folder or a file."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B", help_behavior_hint="")]
    """What it is compared with."""
    step_a: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: latest)")] = "latest"
    """Where A is a run, which step."""
    step_b: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: latest)")] = "latest"
    """Where B is a run, which step."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``origo diff``."""
    given = tyro.cli(_Arguments, prog="origo diff", args=arguments)
    pair = []
    for path, step in ((given.a, given.step_a), (given.b, given.step_b)):
        found = find_checkpoint(path, int(step) if step.isdecimal() else step)
        for skipped, reason in found.skipped:
            print(f"Passed over '{skipped}': {reason}", file=sys.stderr)
        pair.append(found.checkpoint)
    told = compare(*pair)
    print_json(told) if given.json else _print(told, given.a, given.b)
    return 0 if told["equal"] else DIFFERENT


def compare(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """What differs. One tensor of each is in memory at a time."""
    config = _different_fields(a.config or {}, b.config or {})
    told: dict[str, Any] = {
        "equal": True,
        "config": config,
        "only_a": [],
        "only_b": [],
        "kinds": {},
        "values": {},
        "renamed": {},
    }
    if a.identity is not None and a.identity == b.identity:
        return {**told, "same_identity": a.identity}
    kinds = [{name: _kind(each, name) for name in each.names} for each in (a, b)]
    names = dict.fromkeys(kinds[1])
    if not set(kinds[0]) & set(kinds[1]):  # one of them may have been polluted by wrappers
        for polluted, clean, flipped in ((kinds[0], kinds[1], False), (kinds[1], kinds[0], True)):
            renamed = recover_names(polluted, clean)
            if renamed:
                told["renamed"] = {"of": "b" if flipped else "a", "names": renamed}
                break
    renames = told["renamed"].get("names", {}) if told["renamed"] else {}
    first = {(renames.get(name, name) if told["renamed"] and told["renamed"]["of"] == "a" else name): name for name in kinds[0]}
    second = {(renames.get(name, name) if told["renamed"] and told["renamed"]["of"] == "b" else name): name for name in names}
    told["only_a"] = [name for name in first if name not in second]
    told["only_b"] = [name for name in second if name not in first]
    same = 0
    for name in (name for name in first if name in second):
        was, now = kinds[0][first[name]], kinds[1][second[name]]
        if was != now:
            told["kinds"][name] = [was, now]
        if was[1] == now[1]:
            difference = _difference(a.tensor(first[name]), b.tensor(second[name]))
            if difference is None:
                same += 1
            else:
                told["values"][name] = difference
    told["equal_tensors"] = same
    told["equal"] = not (told["only_a"] or told["only_b"] or told["kinds"] or told["values"])
    return told


def _kind(checkpoint: Checkpoint, name: str) -> tuple[str, list[int]]:
    stored = checkpoint.model.aliases.get(name, name)
    return checkpoint.model.dtypes[stored], list(checkpoint.model.shapes[stored])


def _difference(one: torch.Tensor, other: torch.Tensor) -> dict[str, float] | None:
    """None for equal ones, NaN included."""
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    left, right = one.to(wide), other.to(wide)
    changed = (left != right) & ~((left != left) & (right != right))
    count = int(changed.sum())
    if not count:
        return None
    gap = (left - right).abs()
    scale = float(left.abs().square().sum().sqrt())
    return {
        "largest": float(gap.max()),
        "relative": float(gap.square().sum().sqrt()) / scale if scale else math.inf,
        "changed": count / changed.numel(),
    }


def _different_fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    fields = [*one, *(field for field in other if field not in one)]
    return {field: [one.get(field), other.get(field)] for field in fields if one.get(field) != other.get(field)}


def _print(told: Mapping[str, Any], a: str, b: str) -> None:
    if told["equal"]:
        same = f" (identity {told['same_identity'][:12]})" if "same_identity" in told else ""
        print(f"The same weights{same}: every name, shape, dtype and value.")
    if told["renamed"]:
        names = told["renamed"]["names"]
        print(
            f"Names of {told['renamed']['of'].upper()} that wrappers had changed were put right: {len(names)}, as "
            f"{next(iter(names))}"
        )
    for field, (was, now) in told["config"].items():
        print(f"config: {field} is {was} in A, {now} in B")
    if told["equal"]:
        return
    for which, path, names in (("A", a, told["only_a"]), ("B", b, told["only_b"])):
        if names:
            more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            print(f"Only in {which} ({path}), {len(names)}: {', '.join(names[:_SHOWN])}{more}")
    for name, (was, now) in list(told["kinds"].items())[:_SHOWN]:
        print(f"{name}: {was[0]} {was[1]} in A, {now[0]} {now[1]} in B")
    if len(told["kinds"]) > _SHOWN:
        print(f"and {len(told['kinds']) - _SHOWN} more of other shapes or dtypes")
    values = sorted(told["values"].items(), key=lambda item: -item[1]["relative"])
    if values:
        print(f"{len(values)} tensors have other values, {told['equal_tensors']} are equal. Those that differ most:")
        rows = [("", "relative", "largest", "values changed")]
        for name, by in values[:_SHOWN]:
            rows.append((name, f"{by['relative']:.3g}", f"{by['largest']:.3g}", f"{by['changed']:.1%}"))
        print_table(rows)
