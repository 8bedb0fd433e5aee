"""What the documents say works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_story_in_the_readme_runs(in_fresh_process: Callable[[str], str]) -> None:
    program = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    claimed = re.search(r'# "(\d+ tensors loaded)"', program)
    assert claimed is not None
    assert in_fresh_process(program).strip() == claimed.group(1)


def test_the_guide_prints_what_it_says(in_fresh_process: Callable[[str], str]) -> None:
    """All of its programs are one, and each print is followed by a comment with its output."""
    text = (ROOT / "docs" / "orig-mod.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    claimed = re.findall(r"^print\(.*\)\n# (.*)$", program, re.MULTILINE)
    assert len(claimed) == program.count("print(") >= 5
    assert in_fresh_process(program).splitlines() == claimed


def test_the_loop_of_ones_own_runs_and_goes_on(in_fresh_process: Callable[[str], str], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "durability.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert in_fresh_process(program).strip() == "30"
    kept = sorted(path.name for path in (tmp_path / "my-run").glob("step-*"))
    assert kept[-1] == "step-000000030"
    assert in_fresh_process(program.replace("range(start, 30)", "range(start, 40)")).strip() == "40"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in ("naming", "state", "store", "interop", "models", "data", "generation"):
        for module in (ROOT / "src" / "onym" / folder).glob("*.py"):
            assert module.name in text or module.name == "__init__.py", f"{folder}/{module.name}"
