"""Seals that somebody made: refused in a sentence, and nothing outside the folder is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onym.errors import CheckpointError
from onym.format.hashing import NO_HASH
from onym.format.manifest import sealed
from onym.integrations.sealed import SEAL, _hash, require_sealed, seal


@pytest.mark.parametrize("name", ["../outside", "/absolute", "inner/../../outside", "a" * 5000, "a\0", "\ud800"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    name = str(tmp_path / "outside") if name == "/absolute" else name
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    entry = {"bytes": 1, "blake3": _hash(tmp_path / "outside")}
    text = json.dumps({"files": {name: entry}, "blake3": NO_HASH})
    (tmp_path / "folder" / SEAL).write_text(sealed(text))
    with pytest.raises(CheckpointError):
        require_sealed(tmp_path / "folder")


@pytest.mark.parametrize("files", [[], None, 3, {"a": 3}, {"a": {}}, {"a": {"bytes": 1}}])
def test_odd_content(tmp_path: Path, files: Any) -> None:
    (tmp_path / "a").write_text("x")
    seal(tmp_path)
    (tmp_path / SEAL).write_text(sealed(json.dumps({"files": files, "blake3": NO_HASH})))
    with pytest.raises(CheckpointError):
        require_sealed(tmp_path)
