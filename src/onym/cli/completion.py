"""``onym --install-completion``: tyro's completion of commands and options, written to where the shell looks for it."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from onym.cli.arguments import COMMANDS, TOOLS
from onym.errors import ConfigError, storage_error

_PLACES = {
    "bash": Path("~/.local/share/bash-completion/completions/onym"),
    "zsh": Path("~/.zfunc/_onym"),
}
_REMARKS = {
    "bash": "It takes effect in the next shell (it needs the package bash-completion).",
    "zsh": "Put 'fpath+=~/.zfunc; autoload -Uz compinit && compinit' into ~/.zshrc; it takes effect in the next shell.",
}


def install_completion(arguments: list[str]) -> str:
    """Write the script for a shell, and return a message for the user.

    Args:
        arguments: the shell's name, or nothing for that of ``$SHELL``.

    Raises:
        ConfigError: the shell is not one of those that are known.
        StorageError: the script cannot be written.
    """
    shell = arguments[0] if arguments else Path(os.environ.get("SHELL", "bash")).name
    if shell not in _PLACES:
        raise ConfigError(f"There is no completion for {shell!r}: name one of {', '.join(_PLACES)}.")
    place = _PLACES[shell].expanduser()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(completion_script(shell), encoding="utf-8")
    except OSError as error:
        raise storage_error("write the completion", place, error) from error
    return f"Completion for {shell} is in '{place}'. {_REMARKS[shell]}"


def completion_script(shell: str) -> str:
    """The script that completes ``onym`` in a shell (``bash``, ``zsh``)."""
    tools: Any = _subcommands(TOOLS)
    every: Any = Union[_subcommands(COMMANDS), Annotated[tools, tyro.conf.subcommand("tools")]]  # noqa: UP007  # a runtime value
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(every, prog="onym", args=["--tyro-print-completion", shell], config=(tyro.conf.OmitArgPrefixes,))
    return printed.getvalue()


def _subcommands(commands: dict[str, type]) -> Any:
    return Union[tuple(Annotated[known, tyro.conf.subcommand(name)] for name, known in commands.items())]  # noqa: UP007
