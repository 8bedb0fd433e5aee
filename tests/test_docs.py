"""The programs, links and generated pages of the documents are right."""

from __future__ import annotations

import re
import runpy
import subprocess
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


def test_the_orig_mod_guide_prints_what_its_comments_claim(in_fresh_process: Callable[[str], str]) -> None:
    """All of its programs are one, and each print is followed by a comment with its output."""
    text = (ROOT / "docs" / "orig-mod.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    claimed = re.findall(r"^print\(.*\)\n# (.*)$", program, re.MULTILINE)
    assert len(claimed) == program.count("print(") >= 5
    assert in_fresh_process(program).splitlines() == claimed


def test_the_training_loop_of_the_guide_runs_and_continues(in_fresh_process: Callable[[str], str], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "durability.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert in_fresh_process(program).strip() == "30"
    saved = sorted(path.name for path in (tmp_path / "my-run").glob("step-*"))
    assert saved[-1] == "step-000000030"
    assert in_fresh_process(program.replace("range(start, 30)", "range(start, 40)")).strip() == "40"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_generated_pages_are_those_of_the_code() -> None:
    for name, page in runpy.run_path(str(ROOT / "docs/reference.py"))["PAGES"].items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), "make reference writes it anew"


def test_the_modules_page_has_every_module() -> None:
    text = (ROOT / "docs/modules.md").read_text(encoding="utf-8")
    for path in (ROOT / "src/onym").rglob("*/*.py"):
        assert path.name == "__init__.py" or f"| `{path.name}` |" in text, path
        assert path.name == "__init__.py" or f"## {path.parent.relative_to(ROOT / 'src/onym').as_posix()}/" in text, path


def test_no_file_is_longer_than_500_lines() -> None:
    assert [path for path in (ROOT / "src").rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []


def test_the_former_name_is_in_the_changelog_alone() -> None:
    """It belongs to another project: 'pip install' with it would install a stranger's package."""
    former = "".join(("ori", "go"))
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    lines = [
        (name, line)
        for name in tracked.split("\0")
        if name and (ROOT / name).is_file()
        for line in (ROOT / name).read_text(encoding="utf-8", errors="ignore").splitlines()
        if former in line.lower()
    ]
    assert [name for name, _ in lines] == ["CHANGELOG.md"] * (1 if tracked else 0)
