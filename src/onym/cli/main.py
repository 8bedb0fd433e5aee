"""``onym``: picks the command, and turns errors into one sentence and an exit code.

Exit codes: 0 done; 1 the answer is no (``verify``: damaged; ``diff``: different; ``tools doctor``: a problem that matters);
2 the user's input or surroundings are at fault (one sentence on standard error); 3 ``verify`` found nothing damaged, and no
weights. ``train`` that stopped with everything saved:
130 by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1, 75 by its ``--time-limit``. ``serve`` ends with the first two.

Arguments are parsed before anything slow is imported: help pages and mistyped options are answered without torch.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import sys
import threading
from typing import NoReturn

from onym.errors import LESS_MEMORY, ConfigError, OnymError, ReportedElsewhere, is_out_of_memory, nearest

INTERRUPTED = 130

_COMMANDS = {
    "train": "train a GPT on text",
    "evaluate": "measure how well models predict a text: loss, perplexity, bits per byte",
    "generate": "continue a text with a trained GPT",
    "chat": "converse with a model in the terminal",
    "serve": "serve models to programs and people: OpenAI's interface, a page to write in, a page of runs",
    "classify": "tell the labels of texts with a trained classifier",
    "runs": "list runs: how far each is, and how well it does; draw their losses",
    "inspect": "show what a file or folder is: steps, tensors, configuration, origin, tokens",
    "verify": "read and check every byte of a run, a checkpoint or a file",
    "diff": "compare two models: equal, or what differs and by how much",
    "convert": "write a checkpoint in another format, or repair one in place",
    "prune": "delete checkpoints that are no longer needed, or pin one",
    "tools": "examine this machine, measure techniques, prove exact resume, manage caches",
}

_TOOLS = {
    "doctor": "examine this machine: what it can do, the best settings, what is wrong",
    "ladder": "measure what each technique for faster training gains on this machine",
    "check-resume": "kill a run at random moments, resume it, and compare every bit",
    "cache": "list, move, prune or delete what is cached: compiled code, tokenised text",
}

_COMPLETION = "--install-completion"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? rather than nothing at all
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except ReportedElsewhere:
        return 2
    except OnymError as error:
        print(f"onym: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"onym: Out of memory: {LESS_MEMORY}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("onym: stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def program() -> NoReturn:
    """The command, as a process of its own.

    A rank of several leaves before Python takes torch down: that aborts now and then on a busy machine after all work is done
    ("terminate called without an active exception", torch 2.13.0), because a thread of gloo outlives Python.
    """
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    # As Python does: pools are shut down (the compiler leaves one), and threads are waited for.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(_overview("onym", _COMMANDS))
        return 0
    if first in ("-V", "--version"):
        from onym import __version__

        print(f"onym {__version__}")
        return 0
    if first == _COMPLETION:
        from onym.cli.completion import install_completion

        print(install_completion(arguments[1:]))
        return 0
    if first == "tools":
        if not arguments[1:] or arguments[1] in ("-h", "--help", "help"):
            print(_overview("onym tools", _TOOLS))
            return 0
        return _run("onym tools", _TOOLS, arguments[1:])
    return _run("onym", _COMMANDS, arguments)


def _run(program: str, commands: dict[str, str], arguments: list[str]) -> int:
    """Parse the arguments of one command, and only then import its module."""
    command, *rest = arguments
    if command not in commands:
        other = f" (onym tools {command} is one)" if command in _TOOLS else nearest(command, commands)
        raise ConfigError(f"There is no command {command!r}{other}: see {program} --help.")
    from onym.cli.parsing import parse

    try:
        given = parse(f"{program} {command}", command, rest)
    except OnymError as error:
        raise error if os.environ.get("RANK", "0") == "0" else ReportedElsewhere from error  # all ranks have the same arguments
    code: int = importlib.import_module(f"onym.cli.{command.replace('-', '_')}").run(given)
    return code


def _overview(program: str, commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in commands.items())
    if program != "onym":
        return f"usage: {program} COMMAND [options]\n\n{lines}\n\n{program} COMMAND --help shows the options of one."
    return (
        "Onym: train a GPT at compiled speed; keep the model, not its wrappers.\n\n"
        f"usage: onym COMMAND [options]\n\n{lines}\n\n"
        f"onym COMMAND --help shows the options of one. onym {_COMPLETION} completes them in your shell.\n"
        "To begin: onym train"
    )


if __name__ == "__main__":
    program()
