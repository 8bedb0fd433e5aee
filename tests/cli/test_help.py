"""Help pages: there for every command, with every option explained."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from onym.cli.arguments import COMMANDS, TOOLS
from tests.conftest import Run


def test_the_overview_names_every_command(onym: Run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        done = onym(*arguments)
        assert done.returncode == 0
        assert "onym train" in done.stdout
        assert "generate" in done.stdout
        assert "\n  doctor" not in done.stdout, "it is one of the tools"
    assert onym("--version").stdout.startswith("onym 0.")


@pytest.mark.parametrize("command", [*COMMANDS, *(f"tools {tool}" for tool in TOOLS)])
def test_every_option_is_explained(onym_process: Run, command: str) -> None:
    done = onym_process(*command.split(), "--help", COLUMNS="100")
    assert done.returncode == 0
    assert "{None}" not in done.stdout
    assert "(default: None)" not in done.stdout
    lines = [line.strip("│ ").strip() for line in done.stdout.splitlines()]
    for index, line in enumerate(lines):
        if line.startswith("--"):
            explanation = line.partition("  ")[2].strip() or lines[index + 1]
            assert len(explanation) > 10, line


def test_a_command_that_moved_is_named(onym: Run) -> None:
    assert onym("tools").stdout == onym("tools", "--help").stdout
    assert "check-resume" in onym("tools").stdout
    assert "There is no command 'doctor' (onym tools doctor is one)" in onym("doctor").stderr
    assert "There is no command 'docter' (did you mean 'doctor'?)" in onym("tools", "docter").stderr


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("tools",), ("train", "--help"), ("train", "--bogus"), ("diff", "a")]
)
def test_what_needs_no_torch_does_not_import_it(
    onym_process: Run, in_fresh_process: Callable[[str], str], arguments: Sequence[str]
) -> None:
    program = f"""
import sys
from onym.cli.main import main
try:
    main({list(arguments)!r})
except SystemExit:
    pass
print(sorted({{"torch", "numpy", "matplotlib"}} & set(sys.modules)))
"""
    assert in_fresh_process(program).splitlines()[-1] == "[]"


def test_completion_is_installed_for_a_shell(onym_process: Run, tmp_path: Path) -> None:
    done = onym_process("--install-completion", "bash", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    script = tmp_path / ".local/share/bash-completion/completions/onym"
    assert str(script) in done.stdout
    offered = subprocess.run(
        ["bash", "-c", f"source '{script}'; COMP_WORDS=(onym tools ''); COMP_CWORD=2; _tyro_onym; echo ${{COMPREPLY[@]}}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {"doctor", "ladder", "check-resume", "cache"} <= set(offered.split())
    refused = onym_process("--install-completion", "fish", HOME=str(tmp_path))
    assert refused.returncode == 2
    assert "name one of bash, zsh" in refused.stderr
