"""The commands of docs/evaluating.md and docs/generating.md are ones that are understood."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from lm_eval._cli.harness import HarnessCLI

from onym.cli.parsing import parse

DOCS = Path(__file__).parents[2] / "docs"
TEXT = "".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("evaluating", "generating"))
COMMANDS = [
    shlex.split(line.partition(" > ")[0], comments=True)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_it_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command[0] == "onym":
        assert command[1] in ("evaluate", "generate")
        given = parse(f"onym {command[1]}", command[1], command[2:])
        assert given.models if command[1] == "evaluate" else given.model
    else:
        assert command[:3] == ["python", "-m", "onym.tools.lm_eval"]
        monkeypatch.setattr(sys, "argv", command[2:])
        assert HarnessCLI().parse_args().model == "onym"
