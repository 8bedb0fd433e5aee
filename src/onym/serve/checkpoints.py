"""The checkpoints of a run as the Runs page shows them, and which of them were read back. Everything here blocks."""

from __future__ import annotations

import math
import os
from pathlib import Path
from threading import Lock
from typing import Any

from onym.checkpoint.steps import pins, step_folder, steps
from onym.errors import OnymError
from onym.format.manifest import MANIFEST, Manifest
from onym.format.reader import read_checkpoint
from onym.serve.errors import ApiError
from onym.serve.run_folders import ServedRuns

Stamps = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of change of each file in a folder: equal while nobody writes to them."""
_MOST_REMEMBERED = 10_000  # checkpoints


class Checkpoints:
    """Lists and verifies the checkpoints of runs. Any thread may ask.

    That a checkpoint was verified is remembered in memory, for as long as its files are those that were read: nothing in a
    checkpoint says that it was read back after it was written.
    """

    def __init__(self, runs: ServedRuns) -> None:
        self._runs = runs
        self._described: dict[Path, tuple[Stamps, dict[str, Any]]] = {}
        self._damages: dict[Path, tuple[Stamps, str | None]] = {}
        self._verifying = Lock()

    def list(self, name: str) -> dict[str, Any]:
        """GET /api/runs/{name}/checkpoints.

        Raises:
            ApiError: there is no such run, or its folder cannot be read.
        """
        directory = self._runs.find(name).checkpoints
        try:
            present = steps(directory) if directory.is_dir() else []
            pinned = pins(directory) if present else {}
        except OnymError as error:
            raise ApiError(404, str(error)) from error
        listed = []
        for step in reversed(present):
            folder = step_folder(directory, step)
            stamps = _stamps(folder)
            if not stamps:  # the run, which continues, has deleted it
                continue
            names = sorted(name for name, number in pinned.items() if number == step)
            listed.append({"step": step, **self._about(folder, stamps), "pinned": names})
        return {"checkpoints": listed}

    def _about(self, folder: Path, stamps: Stamps) -> dict[str, Any]:
        kept = self._described.get(folder)
        if kept is None or kept[0] != stamps:
            _make_place(self._described)
            kept = self._described[folder] = stamps, self._described_by_manifest(folder, stamps)
        about, verified = kept[1], None
        seen = self._damages.get(folder)
        if seen is not None and seen[0] == stamps:
            verified = seen[1] is None
            about = {**about, "damaged": about["damaged"] or seen[1]}
        return {**about, "verified": verified}

    def _described_by_manifest(self, folder: Path, stamps: Stamps) -> dict[str, Any]:
        about: dict[str, Any] = {"bytes": sum(size for _, _, size, _ in stamps)}
        about |= {"identity": None, "saved": None, "val_loss": None, "damaged": None}
        if not self._runs.is_inside(folder):
            return {**about, "damaged": "It holds a link that leads out of the folder that is served."}
        try:
            manifest = Manifest.read(folder)
        except OnymError as error:
            return {**about, "damaged": str(error)}
        loss, saved = manifest.metrics.get("val_loss", math.nan), manifest.provenance.get("time")
        about["identity"], about["saved"] = manifest.identity, saved if isinstance(saved, str) else None
        about["val_loss"] = loss if math.isfinite(loss) else None
        return about

    def verify(self, name: str, step: str) -> dict[str, Any]:
        """POST /api/runs/{name}/checkpoints/{step}/verify: read every byte of a checkpoint. One at a time; others wait.

        Raises:
            ApiError: there is no such checkpoint, or it was deleted meanwhile.
        """
        directory = self._runs.find(name).checkpoints
        try:
            known = {str(number): number for number in (steps(directory) if directory.is_dir() else [])}
        except OnymError as error:
            raise ApiError(404, str(error)) from error
        if step not in known:
            raise ApiError(404, f"The run {name!r} has no checkpoint of step {step[:20]}: list its checkpoints again.")
        folder = step_folder(directory, known[step])
        if not self._runs.is_inside(folder):
            raise ApiError(403, f"The checkpoint of step {step} holds a link that leads out of the folder that is served.")
        with self._verifying:
            stamps, reason = _stamps(folder), None
            try:
                reason = next((damage.reason for damage in read_checkpoint(folder).damages()), None)
            except (OnymError, OSError) as error:
                reason = str(error)
        if not (folder / MANIFEST).exists():
            raise ApiError(404, f"The checkpoint of step {step} was deleted while it was read: list the checkpoints again.")
        _make_place(self._damages)
        self._damages[folder] = stamps, reason
        verified = {"step": known[step], "verified": reason is None}
        return verified if reason is None else {**verified, "reason": reason}


def _stamps(folder: Path) -> Stamps:
    """Empty where the folder is not there."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                found.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError:
        return ()
    return tuple(sorted(found))


def _make_place(kept: dict[Path, Any]) -> None:
    if len(kept) >= _MOST_REMEMBERED:
        kept.clear()
