"""``onym``: picks the command, and turns errors into one sentence and an exit code.

Exit codes: 0 done; 1 the answer is no (``verify``: damaged; ``diff``: different; ``doctor``: there is a problem that matters);
2 something of the user's is in the way (said in a sentence on standard error). Of ``train``, stopped with everything kept: 130
by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1, 75 by its ``--time-limit``.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import sys
import threading
from importlib.metadata import version
from typing import NoReturn

from onym.errors import LESS_MEMORY, ConfigError, OnymError, ReportedElsewhere, is_out_of_memory, nearest

INTERRUPTED = 130

# Each command is a module here with a function `run(arguments) -> exit code`; only the one that is called is imported.
_COMMANDS = {
    "doctor": "look at this machine: what it can do, which settings suit it, what is wrong",
    "train": "train a GPT on text, and keep it under its own names",
    "check-resume": "try out whether a run of these options, killed at random, ends with the same bits",
    "generate": "continue a text with a trained GPT",
    "runs": "list the runs in a folder: how far each is, and how well it does",
    "plot": "draw the losses of several runs into one picture",
    "ladder": "measure what each technique for faster training is worth on this machine",
    "inspect": "say what a file or folder is: steps, tensors, configuration, where it comes from",
    "verify": "read every byte of a run, a checkpoint or a file, and check it",
    "diff": "compare two models: equal, or what differs and by how much",
    "convert": "write a checkpoint in another layout: transformers', nanoGPT's, the book's, plain files",
    "repair": "mend a file in place whose names or index are wrong",
    "prune": "delete checkpoints that need not stay, or pin one so that it does",
    "cache": "list, move or delete the compiled code that is kept for the next start",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? rather than nothing at all
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        if arguments[0] in ("-V", "--version"):
            print(f"onym {version('onym')}")
            return 0
        command = arguments[0]
        if command not in _COMMANDS:
            raise ConfigError(f"There is no command {command!r}{nearest(command, _COMMANDS)}: see onym --help.")
        code: int = importlib.import_module(f"onym.cli.{command.replace('-', '_')}").run(arguments[1:])
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

    One of several that trained together leaves before Python takes torch down, which aborts now and then on a busy machine when
    all is done ("terminate called without an active exception", torch 2.13.0): a thread of gloo's outlives Python.
    """
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    # As Python does: pools are told to end (the compiler leaves one), and threads are waited for.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in _COMMANDS.items())
    return (
        "Onym: train a GPT at compiled speed; keep the model, not its wrappers.\n\n"
        f"usage: onym COMMAND [options]\n\n{commands}\n\n"
        "onym COMMAND --help tells the options of one. To begin: onym train"
    )


if __name__ == "__main__":
    program()
