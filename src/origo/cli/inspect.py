"""``origo inspect``: what a file or folder is, from its headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from origo.cli.report import age, bytes_of, print_facts, print_json, print_table
from origo.errors import CheckpointError
from origo.store import remote
from origo.store.layout import MANIFEST, Manifest
from origo.store.lease import holder
from origo.store.reader import Checkpoint, TensorFile, read_checkpoint
from origo.store.run import CHECKPOINTS, find_checkpoint, pins, step_folder, steps
from origo.training.display import size


@dataclass(frozen=True)
class _Arguments:
    """Say what a file or folder is: a run, a checkpoint, a model folder, a .safetensors or .pth file. Reads headers only."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """A path, or a remote one (s3://…)."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: the run's list of steps)")] = ""
    """Of a run, one step: its number, the name it is pinned under, or latest."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``origo inspect``."""
    given = tyro.cli(_Arguments, prog="origo inspect", args=arguments)
    path = remote.as_path(given.path)
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not given.step and path.exists() and (steps(directory) or directory != path):
        told = describe_run(path, directory)
        print_json(told) if given.json else _print_run(told)
        return 0
    step: int | str = int(given.step) if given.step.isdecimal() else given.step or "latest"
    checkpoint = find_checkpoint(path, step, verify=False).checkpoint if given.step else read_checkpoint(path)
    told = describe(checkpoint)
    print_json(told) if given.json else _print_checkpoint(told, checkpoint)
    return 0


def describe_run(path: Path, directory: Path) -> dict[str, Any]:
    """A run's steps and who writes to it."""
    names = {step: name for name, step in pins(directory).items()}
    listed = []
    for step in steps(directory):
        row: dict[str, Any] = {"step": step, "pinned": names.get(step)}
        try:
            manifest = Manifest.read(step_folder(directory, step))
        except CheckpointError as error:
            row["damaged"] = str(error)
        else:
            row |= {
                "bytes": sum(entry.bytes for entry in manifest.files.values()),
                "identity": manifest.identity,
                "metrics": manifest.metrics,
                "time": manifest.provenance.get("time"),
            }
        listed.append(row)
    writer = None if remote.is_remote(directory) else holder(directory)
    return {"kind": "run", "path": path, "steps": listed, "writer": str(writer) if writer else None}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that the headers of a checkpoint or file say."""
    manifest, model = checkpoint.manifest, checkpoint.model
    files = {name: entry.bytes for name, entry in manifest.files.items()} if manifest else {}
    tensor_files = {name: _tensors(checkpoint.tensors(name)) for name in manifest.tensors} if manifest else {}
    if manifest is not None:
        kind = "checkpoint" if manifest.step is not None else "model folder"
        total = sum(files.values()) + bytes_of(checkpoint.path, [MANIFEST])
    else:
        kind = ".pth state dict" if not hasattr(model, "metadata") else ".safetensors file"
        kind += " written by Origo" if checkpoint.identity else ""
        tensor_files = {checkpoint.path.name: _tensors(model)}
        total = bytes_of(checkpoint.path.parent, [checkpoint.path.name])
    return {
        "kind": kind,
        "path": checkpoint.path,
        "bytes": total,
        "step": manifest.step if manifest else None,
        "metrics": manifest.metrics if manifest else {},
        "identity": checkpoint.identity,
        "architecture": checkpoint.architecture,
        "config": checkpoint.config,
        "provenance": dict(checkpoint.provenance),
        "files": files,
        "parameters": sum(math.prod(shape) for shape in model.shapes.values()),
        "tensors": tensor_files,
    }


def _tensors(file: TensorFile) -> dict[str, Any]:
    further: dict[str, list[str]] = {}
    for alias, name in file.aliases.items():
        further.setdefault(name, []).append(alias)
    return {
        name: {"dtype": file.dtypes[name], "shape": list(shape)} | ({"aliases": further[name]} if name in further else {})
        for name, shape in file.shapes.items()
    }


def _print_run(told: Mapping[str, Any]) -> None:
    print(f"{told['path']}: a run with {len(told['steps'])} checkpoints")
    rows = [("step", "written", "size", "identity", "")]
    for step in told["steps"]:
        notes = [f"{name} {value:.6g}" for name, value in step.get("metrics", {}).items()]
        notes += [f"pinned as {step['pinned']}"] if step["pinned"] else []
        if "damaged" in step:
            rows.append((str(step["step"]), "?", "?", "?", "damaged; origo verify says more"))
        else:
            rows.append((str(step["step"]), age(step["time"]), size(step["bytes"]), step["identity"][:12], ", ".join(notes)))
    print_table(rows)
    if told["writer"]:
        print(f"Written by {told['writer']}, or left so when that process died.")


def _print_checkpoint(told: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    about = told["provenance"]
    parent = about.get("parent") or {}
    print(f"{told['path']}: a {told['kind']}")
    facts = {
        "step": None if told["step"] is None else str(told["step"]),
        "metrics": ", ".join(f"{name} {value:.6g}" for name, value in told["metrics"].items()),
        "size": f"{size(told['bytes'])}, {told['parameters'] / 1e6:,.2f}M parameters",
        "identity": told["identity"] or "none: it was not written by Origo, or is a .pth, so its bytes cannot be checked",
        "goes on from": f"step {parent.get('step')}, {str(parent.get('identity'))[:12]}" if parent else None,
        "architecture": told["architecture"],
        "config": ", ".join(f"{name}={value}" for name, value in (told["config"] or {}).items()),
        "written": f"{about['time']} ({age(about['time'])}) on {about.get('host')}" if about.get("time") else None,
        "versions": ", ".join(f"{name} {about[name]}" for name in ("origo", "torch", "python") if name in about),
        "git": about.get("git"),
    }
    print_facts(facts)
    for file, tensors in told["tensors"].items():
        total = sum(math.prod(entry["shape"]) for entry in tensors.values())
        kinds = sorted({entry["dtype"] for entry in tensors.values()})
        held = f" ({size(told['files'][file])})" if file in told["files"] else ""
        print(f"{file}{held}: {len(tensors)} tensors, {total:,} numbers, {', '.join(kinds)}")
        if file == checkpoint.model.path.name:
            print_table(_folded(tensors))
    for file, count in told["files"].items():
        if file not in told["tensors"]:
            print(f"{file} ({size(count)})")


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _folded(tensors: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """One row for tensors that differ in one number of their names alone, as those of equal layers do."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, entry in tensors.items():
        ties = "".join(f" = {alias}" for alias in entry.get("aliases", []))
        pattern = _NUMBER.sub("*", name, count=1)
        groups.setdefault((pattern, f"{entry['dtype']} {entry['shape']}", ties), []).append(name)
    rows = []
    for (pattern, what, ties), names in groups.items():
        many = f"{len(names)} x" if len(names) > 1 else ""
        rows.append((many, (pattern if many else names[0]) + ties, what))
    return rows
