"""``onym chat``: a conversation in the terminal, or with a pipe, one message a line.

Replies go to standard output and everything else to standard error. Of lines that begin with a slash, see :data:`_HELP`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from onym.cli.arguments import ChatArguments
from onym.cli.report import as_step
from onym.cli.standard_input import lines_of_input
from onym.data.chat_template import ChatTemplate
from onym.errors import ConfigError, OnymError, nearest
from onym.generation.chat import Chat, template_of_model
from onym.generation.engine import Engine
from onym.generation.opening import open_model
from onym.train.precision import choose_compute

_HELP = """\
/reset         forget what was said
/system TEXT   tell the model what it is; without a text, no more
/save FILE     write the conversation to a new file, a row for training; /save! FILE overwrites one
/help          this list
/quit          leave, as Ctrl-D does
Ctrl-C stops a reply. A message that begins with a slash is typed with two."""
_COMMANDS = ("/reset", "/system", "/save", "/save!", "/help", "/quit")


def run(given: ChatArguments) -> int:
    """``onym chat``."""
    if given.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, not {given.max_new_tokens}.")
    given.sampling.check()
    model, tokenizer, checkpoint = open_model(
        given.model,
        step=as_step(given.step),
        part=given.part,
        settings={name: getattr(given, name) for name in ("n_heads", "rope_base", "context_length")},
        tokenizer=given.tokenizer,
        note=_note,
        device=choose_compute(given.device, "fp32").device,
    )
    if given.chat_template is None:
        template = template_of_model(checkpoint, tokenizer)
    else:
        template = ChatTemplate.named(given.chat_template, tokenizer)
    if template is None:
        _note("The model has no chat template: it was not taught to converse. It continues your text as it stands.")
    engine = Engine(model, dtype=given.dtype, compile=given.compile, expected_tokens=given.max_new_tokens, note=_note)
    chat = Chat(
        engine,
        tokenizer,
        template,
        system=given.system,
        max_new_tokens=given.max_new_tokens,
        sampling=given.sampling,
        stop=given.stop,
        stop_ids=given.stop_ids,
        seed=given.seed,
        note=_note,
    )
    if sys.stdin.isatty():
        _converse(chat)
        return 0
    for line in lines_of_input():
        if not _answer(chat, line):
            break
    return 0


def _converse(chat: Chat) -> None:
    """With somebody at a terminal, until they leave; a mistake of theirs is reported and does not end it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has a history and can be edited
    _note("/help lists what can be typed besides messages; Ctrl-D leaves.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            _put("\n")
            return
        except KeyboardInterrupt:
            _note("\nCtrl-D leaves.")
            continue
        except UnicodeDecodeError:
            _note("onym: That is not UTF-8 text.")
            continue
        try:
            if not _answer(chat, line):
                return
        except OnymError as error:
            _note(f"onym: {error}")


def _answer(chat: Chat, line: str) -> bool:
    """Do what one line says; False where it says to leave."""
    if not line.strip():
        return True
    if line.startswith("/") and not line.startswith("//"):
        command, _, rest = line.partition(" ")
        return _obey(chat, command, rest.strip())
    with _stops_by_ctrl_c() as is_stopped:
        pieces = chat.reply(line.removeprefix("/"))
        with contextlib.closing(pieces):
            for piece in pieces:
                _put(piece)
                if is_stopped():
                    break
    _put("\n")
    if chat.finish == "length" and chat.template is not None:
        _note(f"(The reply was cut: --max-new-tokens is {chat.max_new_tokens}, the context {chat.engine.context}.)")
    return True


def _obey(chat: Chat, command: str, rest: str) -> bool:
    if command == "/quit":
        return False
    if command == "/help":
        _note(_HELP)
    elif command == "/reset":
        chat.reset()
        _note("Forgotten.")
    elif command == "/system":
        chat.set_system(rest)
        _note("From the next reply on." if rest else "There is no system message now.")
    elif command in ("/save", "/save!"):
        if not rest:
            raise ConfigError(f"{command} needs the name of a file.")
        chat.save(rest, overwrite=command == "/save!")
        _note(f"Saved to '{rest}'.")
    else:
        raise ConfigError(f"There is no command {command!r}{nearest(command, _COMMANDS)}: /help lists them.")
    return True


@contextlib.contextmanager
def _stops_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the block. It takes effect between two tokens; pressed again, at once."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    if threading.current_thread() is not threading.main_thread() or not sys.stdin.isatty():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
