"""The runs that are served, by name. A name from a request is never joined to a path: it is looked up among those there are.

A link that leads out of the served folder is not followed, because whoever made a run that somebody downloaded could show any
file of this machine with it. A run with such a link is listed with that reason, and nothing of it is read.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from onym.checkpoint.steps import CHECKPOINTS
from onym.errors import nearest
from onym.format.manifest import is_text
from onym.serve.errors import ApiError
from onym.train.run_folder import DESCRIPTION, METRICS, RunFolder

SAMPLES = "samples"
_PARTS = ("", DESCRIPTION, METRICS, CHECKPOINTS, SAMPLES)
_SAMPLE = re.compile(r"step-(\d{9,18})\.txt")


class ServedRuns:
    """The runs of a folder, or one run.

    Args:
        root: nothing outside of it is read.
        alone: it is itself the only run.
    """

    def __init__(self, root: Path, *, alone: bool) -> None:
        self.shown = str(root)
        """As the user gave it."""
        self._root, self._alone = root.resolve(), alone

    def all(self) -> dict[str, RunFolder]:
        """The runs by name, those too that lead out of the folder."""
        if self._alone:
            return {self._root.name: RunFolder(self._root)} if (self._root / DESCRIPTION).is_file() else {}
        try:
            names = [name for name in _names_in(self._root) if is_text(name)]  # others cannot be asked for
        except OSError:  # deleted, or not readable now
            return {}
        return {name: RunFolder(self._root / name) for name in names if _is_file(self._root / name / DESCRIPTION)}

    def find(self, name: str) -> RunFolder:
        """The run of this name.

        Raises:
            ApiError: 404, there is none; 403, it leads out of the folder.
        """
        if self._alone:
            found = name == self._root.name and (self._root / DESCRIPTION).is_file()
            folder = self._root
        else:
            folder = self._root / name if self._holds(name) else self._root
            found = folder is not self._root and _is_file(folder / DESCRIPTION)
        if not found:
            known = nearest(name, self.all()) if len(name) < 256 else ""
            raise ApiError(
                404, f"There is no run {name[:100]!r} here{known}: GET /api/runs lists those there are.", code="run_not_found"
            )
        run = RunFolder(folder)
        if (reason := self.leads_out(run)) is not None:
            raise ApiError(403, f"The run {name!r} is not served: {reason}.")
        return run

    def _holds(self, name: str) -> bool:
        try:
            return name in _names_in(self._root)
        except OSError:
            return False

    def leads_out(self, run: RunFolder) -> str | None:
        """What of a run is a link to somewhere outside of the served folder, as a sentence without its full stop."""
        for part in _PARTS:
            if not self._is_inside(f"{run.path}/{part}" if part else run.path):
                return f"its {part or 'folder'} is a link that leads out of the folder that is served"
        return None

    def _is_inside(self, path: Path | str) -> bool:
        """Of a path whose parent is inside."""
        try:
            linked = stat.S_ISLNK(os.lstat(path).st_mode)
        except OSError:  # it is not there
            return True
        return not linked or Path(path).resolve().is_relative_to(self._root)

    def samples(self, run: RunFolder) -> dict[str, Path]:
        """The samples by step, as text, in ascending order."""
        folder = run.path / SAMPLES
        try:
            names = _names_in(folder)
        except OSError:
            return {}
        found = {int(match[1]): folder / name for name in names if (match := _SAMPLE.fullmatch(name))}
        return {str(step): found[step] for step in sorted(found) if self._is_inside(found[step])}

    def is_inside(self, path: Path) -> bool:
        """Whether a step's folder is, and each file in it."""
        try:
            return self._is_inside(path) and all(self._is_inside(path / name) for name in _names_in(path))
        except OSError:
            return True


def _names_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False
