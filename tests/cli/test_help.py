"""Help pages: there for every command, with every option explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from onym.cli.reference import reference
from tests.conftest import Run


def test_the_overview_names_every_command(onym: Run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        done = onym(*arguments)
        assert done.returncode == 0
        assert "onym train" in done.stdout
        assert "generate" in done.stdout
    assert onym("--version").stdout.startswith("onym 0.")


@pytest.mark.parametrize("command", ["doctor", "train", "generate", "ladder", "inspect", "verify", "diff", "prune", "cache"])
def test_every_option_is_explained(onym_process: Run, command: str) -> None:
    done = onym_process(command, "--help", COLUMNS="100")
    assert done.returncode == 0
    assert "{None}" not in done.stdout
    assert "(default: None)" not in done.stdout
    lines = [line.strip("│ ").strip() for line in done.stdout.splitlines()]
    for index, line in enumerate(lines):
        if line.startswith("--"):
            explanation = line.partition("  ")[2].strip() or lines[index + 1]
            assert len(explanation) > 10, line


def test_the_option_reference_is_that_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == reference(), "make reference writes it anew"
