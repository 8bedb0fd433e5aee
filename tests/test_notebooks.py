"""Each notebook runs from top to bottom, as somebody would run it, and prints what it is there to show."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"
SHOWS = {
    "repair": ["7 tensors loaded, 7 renamed", "7 of 7 tensors renamed", "<All keys matched successfully>"],
    "sharded": ["steps 0 to 20", "steps 20 to 40", "good     my-run/step-000000040"],
    "train": ["bitwise identical", "image/png", "Return the", "step 250/250"],
}

pytestmark = pytest.mark.slow


def test_each_notebook_is_here() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONYM_CACHE_DIR", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)
    assert "Traceback" not in printed
    for words in SHOWS[name]:
        assert words in printed, words
