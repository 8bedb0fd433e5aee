"""For all tests: several at once share the cores; and each doctest in src has a folder of its own, to save files in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: threads of two that wait for each other on the same core take many times as long.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if type(request.node).__name__ == "DoctestItem":
        monkeypatch.chdir(tmp_path)
