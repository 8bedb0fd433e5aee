"""``origo verify``: every byte of a run, a checkpoint or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from origo.cli.report import print_json
from origo.errors import CheckpointError
from origo.store import remote
from origo.store.reader import Damage, read_checkpoint
from origo.store.run import CHECKPOINTS, find_checkpoint, step_folder, steps

DAMAGED = 1


@dataclass(frozen=True)
class _Arguments:
    """Read every byte and check it: of a run, all its steps. Exit code 1 and a list where something is damaged."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """A run, a checkpoint, a model folder or a file; also a remote one (s3://…)."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: all)")] = ""
    """Of a run, one step alone."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``origo verify``."""
    given = tyro.cli(_Arguments, prog="origo verify", args=arguments)
    results = []
    for path in _wanted(remote.as_path(given.path), given.step):
        if sys.stderr.isatty():
            print(f"reading {path} …", end="\r", file=sys.stderr, flush=True)
        damages, checked = _check(path)
        results.append({"path": path, "damages": damages, "checked": checked})
        if not given.json:
            _say(path, damages, checked)
    if given.json:
        print_json({"good": not any(result["damages"] for result in results), "checked": results})
    return DAMAGED if any(result["damages"] for result in results) else 0


def _wanted(path: Path, step: str) -> list[Path]:
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    available = steps(directory)
    if step:
        number = int(step) if step.isdecimal() else step
        return [find_checkpoint(path, number, verify=False).checkpoint.path]
    return [step_folder(directory, number) for number in available] or [path]


def _check(path: Path) -> tuple[list[dict[str, Any]], str]:
    """What is damaged, and what could be checked."""
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        if not path.exists():
            raise
        return [{"file": path.name, "tensor": None, "reason": str(error)}], "structure"
    found: Iterator[Damage] = checkpoint.damages()
    damages = [{"file": damage.file, "tensor": damage.tensor, "reason": damage.reason} for damage in found]
    if checkpoint.manifest is not None or checkpoint.model.hashes:
        return damages, "every byte"
    return damages, "structure" if hasattr(checkpoint.model, "metadata") else "checksums of the zip"


def _say(path: Path, damages: list[dict[str, Any]], checked: str) -> None:
    if damages:
        print(f"DAMAGED  {path}")
        for damage in damages:
            print(f"  {damage['reason']}")
    elif checked == "every byte":
        print(f"good     {path}")
    else:
        print(f"good     {path} ({checked} only: it holds no hashes; what origo.save writes as .safetensors does)")
