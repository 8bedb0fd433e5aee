"""``onym inspect``: what a file or folder is, from its headers alone."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onym.checkpoint.steps import find_checkpoint, is_ours, pins, step_folder, steps
from onym.cli.arguments import InspectArguments
from onym.cli.inspect_tokens import describe_text, describe_tokens, is_token_folder, print_text, print_tokens
from onym.cli.report import (
    as_step,
    bytes_of,
    checkpoints_folder,
    found_facts,
    print_facts,
    print_heading,
    print_json,
    print_table,
)
from onym.cli.tree import tree
from onym.errors import CheckpointError
from onym.format.manifest import Manifest
from onym.format.reader import Checkpoint
from onym.format.safetensors import item_size
from onym.format.tensors import TensorFile
from onym.storage.lock import LEASE, holder, lock
from onym.storage.paths import as_path, is_local
from onym.units import format_age, format_size, plural

LORA = "lora"  # the architecture of adapters alone; its module would import torch
_VALUE = "value"  # what a module stores of its own making: no tensor


def run(given: InspectArguments) -> int:
    """``onym inspect``."""
    path = as_path(given.path)
    directory = checkpoints_folder(path)
    if directory is not None and not given.step:
        report = describe_run(path, directory)
        print_json(report) if given.json else _print_run(report)
        return 0
    if is_local(path) and is_token_folder(path):
        tokens = describe_tokens(path)
        print_json(tokens) if given.json else print_tokens(tokens)
        return 0
    checkpoint = _open(path, given)
    report = describe(checkpoint)
    print_json(report) if given.json else _print_checkpoint(report, checkpoint)
    return 0


def _open(path: Path, given: InspectArguments) -> Checkpoint:
    """A checkpoint or file. Where Onym wrote it and it names its architecture, torch is not imported, which takes a second."""
    step = as_step(given.step or "latest")
    if given.part is None and is_ours(path):
        own = find_checkpoint(path, step, verify=False).checkpoint
        if own.architecture is not None:
            return own
    from onym.convert.opening import open_any

    return open_any(path, step, verify=False, part=given.part, complete=False).checkpoint


def describe_run(path: Path, directory: Path) -> dict[str, Any]:
    """A run's steps, and who writes to it."""
    names: dict[int, list[str]] = {}
    for name, step in pins(directory).items():
        names.setdefault(step, []).append(name)
    listed = []
    for step in steps(directory):
        folder = step_folder(directory, step)
        row: dict[str, Any] = {"step": step, "pinned": names.get(step, [])}
        try:
            manifest = Manifest.read(folder)
            row |= {
                "bytes": bytes_of(folder),
                "identity": manifest.identity,
                "metrics": manifest.metrics,
                "time": manifest.provenance.get("time"),
            }
        except (CheckpointError, OSError) as error:
            if not folder.exists():  # the run, which continues, has deleted it
                continue
            row["damaged"] = str(error)
        listed.append(row)
    text = describe_text(path) if is_local(path) else None
    return {"kind": "run", "path": path, "steps": listed, "writer": _writer(directory), "text": text}


def _writer(directory: Path) -> dict[str, Any] | None:
    """Who has the lease, and whether that process lives; None where this machine cannot know."""
    who = None if not is_local(directory) else holder(directory)
    if who is None:
        return None
    lives = None
    if who.host == platform.node():
        try:
            descriptor = lock(directory / LEASE)
            lives = descriptor is None
            if descriptor is not None:
                os.close(descriptor)
        except FileNotFoundError:  # given back just now
            return None
        except OSError:
            pass
    return {**asdict(who), "lives": lives, "said": str(who)}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that the headers of a checkpoint or file state."""
    manifest, model, origin = checkpoint.manifest, checkpoint.model, checkpoint.origin
    main = model.path.name
    if origin is not None:  # what is there, under the names that it has there
        main, kind = checkpoint.path.name, origin.kind
        files = {main: _tensors(origin.contents.tensors)}
    elif manifest is not None:
        kind = "a checkpoint" if manifest.step is not None else "a model folder"
        wholes = checkpoint.chunk_index.tensors if checkpoint.chunk_index else manifest.tensors
        files = {name: _tensors(checkpoint.tensors(name)) for name in wholes}
    else:
        kind = "a .safetensors file written by Onym" if checkpoint.identity else "a .safetensors file"
        files = {main: _tensors(model)}
    totals = {name: _totals(tensors) for name, tensors in files.items()}
    return {
        "kind": kind,
        "path": checkpoint.path,
        "bytes": bytes_of(checkpoint.path),
        "step": manifest.step if manifest else None,
        "metrics": manifest.metrics if manifest else {},
        "identity": checkpoint.identity,
        "architecture": checkpoint.architecture,
        "config": checkpoint.config,
        "provenance": dict(checkpoint.provenance),
        "files": {name: entry.bytes for name, entry in manifest.files.items()} if manifest else {},
        "parameters": sum(total["parameters"] for total in totals[main].values()),
        "totals": totals,
        "tensors": files,
        "found": origin.summary() if origin is not None else None,
        **_adapter(checkpoint),
    }


def _adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of LoRA adapters, what they are and the model that they belong to; nothing of others."""
    if checkpoint.architecture is not None and checkpoint.architecture != LORA:
        return {}
    from onym.adapters.opening import stored_adapter

    found = stored_adapter(checkpoint)
    if found is None:
        return {}
    base = found.config.base or {}
    named = str(base.get("path") or found.base_name) or None
    if found.base is not None:
        named = "in the same file"
    settings = {name: value for name, value in found.config.to_dict().items() if name != "base"}
    return {
        "adapter": {"said": f"{found.said}, {found.kind}", **settings, "base": named, "base_identity": base.get("identity")}
    }


def _tensors(file: TensorFile) -> dict[str, Any]:
    """What each tensor is; the further names of a tied one are with the first."""
    tensors: dict[str, Any] = {
        name: {"dtype": file.dtypes[name], "shape": list(shape)}
        for name, shape in file.shapes.items()
        if name not in file.aliases
    }
    for alias, name in file.aliases.items():
        tensors[name].setdefault("aliases", []).append(alias)
    return tensors


def _totals(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """By dtype, how many parameters and bytes."""
    counts: dict[str, int] = {}
    for entry in tensors.values():
        if entry["dtype"] != _VALUE:
            counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
    return {
        name: {"parameters": count, "bytes": None if (size := item_size(name)) is None else count * size}
        for name, count in counts.items()
    }


def _print_run(report: Mapping[str, Any]) -> None:
    print_heading(f"{report['path']}: a run with {plural(len(report['steps']), 'checkpoint')}")
    rows = [("step", "written", "size", "identity", "")]
    for step in report["steps"]:
        notes = [f"{name} {value:.6g}" for name, value in step.get("metrics", {}).items()]
        notes += [f"pinned as {name}" for name in step["pinned"]]
        about = ("?", "?", "?")
        if "damaged" in step:
            notes.insert(0, "damaged: see onym verify")
        else:
            about = (format_age(step["time"]), format_size(step["bytes"]), step["identity"][:12])
        rows.append((str(step["step"]), *about, ", ".join(notes)))
    if report["steps"]:
        print_table(rows)
    if report["text"]:
        print_text(report["text"])
    writer = report["writer"]
    if writer:
        lives = {True: "Being written by {}.", False: "Left by {}, which is gone.", None: "Written by {}, or left by it."}
        print_heading(lives[writer["lives"]].format(writer["said"]), style="")


def _print_checkpoint(report: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    about = report["provenance"]
    parent, config = about.get("parent") or {}, dict(report["config"] or {})
    labels = config.pop("labels", [])
    print_heading(f"{report['path']}: {report['kind']}")
    facts = {
        "step": None if report["step"] is None else str(report["step"]),
        "metrics": ", ".join(f"{name} {value:.6g}" for name, value in report["metrics"].items()),
        "size": f"{format_size(report['bytes'])}, {plural(report['parameters'], 'parameter')}",
        "identity": report["identity"] or "none: it holds no hashes (what onym.save writes as .safetensors does)",
        "continues": f"step {parent.get('step')}, {str(parent.get('identity'))[:12]}" if parent else None,
        "architecture": report["architecture"],
        "config": ", ".join(f"{name}={value}" for name, value in config.items()),
        "labels": ", ".join(map(str, labels)) or None,
        "written": f"{about['time']} ({format_age(about['time'])}) on {about.get('host')}" if about.get("time") else None,
        "versions": ", ".join(f"{name} {about[name]}" for name in ("onym", "torch", "python") if name in about),
        "git": None if about.get("git") is None else str(about["git"]),
    }
    if adapter := report.get("adapter"):
        base = adapter["base"]
        if adapter["base_identity"]:
            base += f" (identity {adapter['base_identity'][:12]})"
        facts |= {
            "config": None,
            "adapters": adapter["said"],
            "targets": ", ".join(adapter["targets"]),
            "base": base or "not recorded: onym convert SRC DST --merge BASE",
        }
    if report["found"] is not None:
        found = _found_facts(report["found"], report["config"])
        facts |= found if report["found"]["format"] is not None else {"not read": found["not read"]}
    print_facts(facts)
    for file, tensors in report["tensors"].items():
        held = f" ({format_size(report['files'][file])})" if file in report["files"] else ""
        totals = [
            (f"{total['parameters']:,} {dtype}", "" if total["bytes"] is None else f"({format_size(total['bytes'])})")
            for dtype, total in report["totals"][file].items()
        ]
        alone = f", {' '.join(totals[0])}" if len(totals) == 1 else ""
        print_heading(f"{file}{held}: {plural(len(tensors), 'tensor')}{alone}")
        if not alone:
            print_table(totals)
        if file in (checkpoint.model.path.name, checkpoint.path.name):
            said = {name: _said(entry) for name, entry in tensors.items()}
            ties = {alias: name for name, entry in tensors.items() for alias in entry.get("aliases", [])}
            print_table(tree(said, ties))
    for file, count in report["files"].items():
        if file not in report["tensors"]:
            print_heading(f"{file} ({format_size(count)})", style="")


def _found_facts(found: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, str | None]:
    """How another program's checkpoint was understood, and what can be done with it."""
    facts = {name: value for name, value in found_facts(found).items() if name != "found"}
    rules = ", ".join(f"{word} {count}" for word, count in found["rules"].items())
    if config is not None:
        done = f" ({rules})" if rules else ""
        model = "onym.Decoder" if "n_kv_groups" in config else "onym.GPT"
        by = "classify and convert" if config.get("labels") else "generate, train --from and convert"
        facts["as ours"] = f"an {model}: onym.load_model, {by} take it{done}"
    elif found["not_ours"] or found["problem"]:
        facts["as ours"] = f"no: {found['not_ours'] or found['problem']}"
    if found["wrappers"]:
        facts["next"] = "onym convert PATH --in-place removes the wrappers from its names; a folder: onym convert SRC DST"
    return facts | {"note": " ".join(found["notes"]) or None}


def _said(entry: Mapping[str, Any]) -> str:
    return "a value, no tensor" if entry["dtype"] == _VALUE else f"{entry['dtype']} {entry['shape']}"
