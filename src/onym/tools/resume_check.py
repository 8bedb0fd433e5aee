"""Whether a run that is killed again and again ends bitwise identical to one that is not.

Both runs are processes as a user starts them; the kills are placed by step and at a random moment inside one, and nothing can
clean up.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onym.api import open_checkpoint
from onym.checkpoint.restore import stored_generators, stored_values
from onym.errors import RunError
from onym.format.safetensors import as_bytes
from onym.train.planned_kill import AT_THE_START, KILL_AT
from onym.train.run_folder import RunFolder
from onym.train.state import KEY

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and of how much (0: unknown)."""

# Durations, which differ from run to run.
_CLOCKS = {"seconds", "tokens_per_second", "data_wait"}


@dataclass
class Comparison:
    """The result."""

    tensors: int = 0
    rows: int = 0
    kills: list[int] = field(default_factory=list)
    """The last steps that metrics.jsonl had when a process was killed; -1 before the first."""
    differences: list[str] = field(default_factory=list)
    """In words; none where everything is bitwise identical."""


def compare_killed(
    arguments: Sequence[str], folder: Path, kills: int, seed: int, progress: Progress, *, ranks: int = 1
) -> Comparison:
    """Train twice, once straight and once with kills, and compare.

    Args:
        arguments: of ``onym train``, without a name or a folder.
        folder: for both runs.
        kills: how many; fewer where the run has fewer than two steps.
        seed: of their moments.
        progress: is called with what is being done.
        ranks: the processes of the run; one of them is killed each time.

    Raises:
        RunError: a run fails by itself.
    """
    straight, killed = RunFolder(folder / "straight"), RunFolder(folder / "killed")
    progress("straight", 0, 0)
    began = time.monotonic()
    process = _start(arguments, straight)
    seconds_to_first = 0.0
    while process.poll() is None:
        if not seconds_to_first and _last_step(straight) >= 0:
            seconds_to_first = time.monotonic() - began
        time.sleep(0.01)
    _require_success(process, process.communicate()[1])
    described = straight.description()
    if described is not None and described.get("compiled"):  # measured times decide what pays: let them decide once
        arguments = [*arguments, "--compile", described["compiled"]]
    last = _last_step(straight) - 1  # the last step that another one follows

    moments = random.Random(seed)
    result = Comparison()
    for number, step in enumerate(sorted(moments.randrange(last) for _ in range(kills if last > 0 else 0))):
        progress(f"kill {number + 1} of {kills}", number, kills)
        moment = moments.random()
        if moments.random() < 0.2:  # while it starts, reads what is there, or compiles
            step, moment = AT_THE_START, moment * seconds_to_first
        rank = moments.randrange(ranks) if ranks > 1 else os.environ.get("RANK", "")
        process = _start(arguments, killed, kill_at=f"{step}:{rank}:{moment}")
        _, errors = process.communicate()
        if process.returncode in (-signal.SIGALRM, -signal.SIGKILL) or re.search(rb"ended by SIG(ALRM|KILL)", errors):
            result.kills.append(_last_step(killed))
        else:
            _require_success(process, errors)
    progress("to the end", kills, kills)
    process = _start(arguments, killed)
    _require_success(process, process.communicate()[1])
    _compare(straight, killed, result)
    return result


def _start(arguments: Sequence[str], run: RunFolder, kill_at: str = "") -> subprocess.Popen[bytes]:
    where = ["--name", run.path.name, "--runs-dir", str(run.path.parent)]
    command = [sys.executable, "-P", "-m", "onym", "train", *arguments, *where]
    with (run.path.parent / f"{run.path.name}.log").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, env={**os.environ, KILL_AT: kill_at})


def _require_success(process: subprocess.Popen[bytes], errors: bytes) -> None:
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        raise RunError(f"A run ended by itself with exit code {process.returncode}: {lines[-1].removeprefix('onym: ')}")


def _last_step(run: RunFolder) -> int:
    """The last step in metrics.jsonl; -1 of none."""
    rows = run.read_metrics()
    return int(rows[-1]["step"]) if rows else -1


def _compare(straight: RunFolder, killed: RunFolder, result: Comparison) -> None:
    one, other = open_checkpoint(straight.path), open_checkpoint(killed.path)
    assert one.manifest is not None
    assert other.manifest is not None
    manifests = (one.manifest, other.manifest)
    files = [sorted(file for file in each.files if file.endswith(".safetensors")) for each in manifests]
    if files[0] != files[1]:
        result.differences.append(f"one has {', '.join(files[0])}, the other {', '.join(files[1])}")
    for file in files[0] if files[0] == files[1] else ():
        mine, theirs = one.tensors(file).state(), other.tensors(file).state()
        result.tensors += len(mine)
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs:
                result.differences.append(f"{name} in {file} is in one of them only")
            elif not torch.equal(*(as_bytes(each[name].contiguous()) for each in (mine, theirs))):  # so NaN is equal to NaN
                result.differences.append(f"{name} in {file} differs")
    values = [{k: v for k, v in stored_values(each)[KEY].items() if k not in _CLOCKS} for each in (one, other)]
    _compare_values("the training state", values[0], values[1], result)
    generators = [stored_generators(each) for each in (one, other)]
    _compare_values("the random number generators", generators[0], generators[1], result)
    rows = [[{k: v for k, v in row.items() if k not in _CLOCKS} for row in run.read_metrics()] for run in (straight, killed)]
    result.rows = len(rows[0])
    if len(rows[0]) != len(rows[1]):
        result.differences.append(f"metrics.jsonl has {len(rows[0])} rows, and {len(rows[1])} of the run that was killed")
    for mine_row, their_row in zip(*rows, strict=False):
        _compare_values(f"the row of step {mine_row['step']}", mine_row, their_row, result)


def _compare_values(what: str, one: dict[str, Any], other: dict[str, Any], result: Comparison) -> None:
    for key in sorted(one.keys() | other.keys()):
        mine, theirs = json.dumps(one.get(key)), json.dumps(other.get(key))  # as text NaN is equal to itself
        if mine != theirs:
            result.differences.append(f"{key} in {what} is {mine[:80]}, and {theirs[:80]} of the run that was killed")
