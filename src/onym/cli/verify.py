"""``onym verify``: every byte of a run, a checkpoint or a file."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onym.checkpoint.steps import find_checkpoint, is_ours, step_folder, steps
from onym.cli.arguments import VerifyArguments
from onym.cli.report import as_step, bytes_of, checkpoints_folder, print_heading, print_json, shown
from onym.errors import CheckpointError, NoWeightsError
from onym.format.reader import Checkpoint, read_checkpoint
from onym.storage.paths import as_path
from onym.units import format_size

DAMAGED, NO_WEIGHTS = 1, 3

_EVERY_BYTE, _ZIP, _STRUCTURE = "every byte", "checksums of the zip", "structure"


def run(given: VerifyArguments) -> int:
    """``onym verify``."""
    wanted = _wanted(as_path(given.path), given.step)
    results = []
    for number, (step, path) in enumerate(wanted, 1):
        with _progress(path, f"{number} of {len(wanted)}"):
            result = _check(path, step)
        if result is None:
            print(f"'{shown(path)}' was deleted meanwhile.", file=sys.stderr)
            continue
        results.append(result)
        if not given.json:
            _print(result)
    damaged = any(result["damages"] for result in results)
    unusable = any(result["no_weights"] for result in results)
    if given.json:
        print_json({"good": not damaged and not unusable, "checked": results})
    return DAMAGED if damaged else NO_WEIGHTS if unusable else 0


def _wanted(path: Path, step: str) -> list[tuple[int | None, Path]]:
    """What to check, with the number of a run's step."""
    directory = checkpoints_folder(path)
    if directory is not None and step in ("", "latest"):
        numbers = steps(directory)[-1:] if step else steps(directory)  # the newest one itself, also where it is damaged
        if not numbers:
            raise CheckpointError(f"The run '{path}' has no checkpoints yet: there is nothing to check.")
        return [(number, step_folder(directory, number)) for number in numbers]
    if step:
        found = find_checkpoint(path, as_step(step), verify=False).checkpoint
        return [(found.manifest.step if found.manifest else None, found.path)]
    return [(None, path)]


def _check(path: Path, step: int | None) -> dict[str, Any] | None:
    """What is damaged, and what could be checked; None for a step that its run has deleted meanwhile."""
    checked, no_weights = _STRUCTURE, None
    try:
        checkpoint = _open(path) if step is None else read_checkpoint(path)
        found = [(damage.file, damage.tensor, damage.reason) for damage in checkpoint.damages()]
        if checkpoint.manifest is not None or checkpoint.identity is not None:
            checked = _EVERY_BYTE
        elif checkpoint.origin is not None and checkpoint.origin.contents.summed:
            checked = _ZIP
    except NoWeightsError as error:
        if path.is_dir() and not any(path.iterdir()):
            raise
        no_weights, checked = str(error), _ZIP
        damage = _zip_damage(path)
        found = [(path.name, None, damage)] if damage else []
    except CheckpointError as error:
        if step is None and not path.exists():
            raise
        found = [("" if path.is_dir() else path.name, None, str(error))]
    if step is not None and not path.exists():
        return None
    damages = [{"step": step, "file": file or None, "tensor": tensor, "reason": reason} for file, tensor, reason in found]
    return {"step": step, "path": path, "damages": damages, "no_weights": no_weights, "checked": checked}


def _zip_damage(path: Path) -> str | None:
    """Of something without weights: what the checksums say, where it is a zip."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    from onym.format.pth import zip_damage

    return zip_damage(path)


def _open(path: Path) -> Checkpoint:
    if is_ours(path):
        return find_checkpoint(path, verify=False).checkpoint
    from onym.convert.opening import open_any  # with torch, which Onym's own files do not need

    return open_any(path, verify=False, complete=False).checkpoint


@contextmanager
def _progress(path: Path, which: str) -> Iterator[None]:
    """A line on a terminal's standard error while something is read; it is erased afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    line = f"reading {which}: {shown(path)} ({format_size(bytes_of(path)) if path.exists() else '?'}) …"
    line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps could not be erased
    print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    if result["damages"]:
        print_heading(f"DAMAGED  {result['path']}", style="bold red")
        for damage in result["damages"]:
            print(f"  {shown(damage['reason'])}")
        return
    if result["no_weights"]:
        print(f"whole, but holds no weights that can be read: {shown(result['no_weights'])}")
        return
    only = {
        _EVERY_BYTE: "",
        _ZIP: " (the checksums of its zip: it holds no hashes of tensors)",
        _STRUCTURE: " (its structure only: it holds no hashes, so its values cannot be checked)",
    }
    print(f"good     {shown(result['path'])}{only[result['checked']]}")
