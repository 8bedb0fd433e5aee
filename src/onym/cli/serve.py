"""``onym serve``: models for programs and people, until it is stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from onym.cli.arguments import ServeArguments
from onym.errors import ConfigError, storage_error
from onym.storage.paths import as_path, is_local
from onym.train.options import RunOptions
from onym.train.precision import choose_compute
from onym.train.run_folder import DESCRIPTION
from onym.units import parse_duration, plural

if TYPE_CHECKING:
    from onym.serve.models import Models, Source

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY = "ONYM_API_KEY"


def run(given: ServeArguments) -> int:
    """``onym serve``."""
    try:
        from onym.serve.guard import Access
        from onym.serve.models import Opening
        from onym.serve.server import ServeOptions, bind, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"onym serve needs {error.name}: pip install 'onym[serve]'.") from error
    for option, value, least in (("--slots", given.slots, 1), ("--queue", given.queue, 0)):
        if not least <= value <= 10_000:
            raise ConfigError(f"{option} must be from {least} to 10,000, not {value}.")
    key = _key(given)
    if given.host not in _LOOPBACK and key is None:
        raise ConfigError(
            f"Others could use this server at {given.host}: give --api-key-file FILE, or leave out --host so that only this "
            "machine reaches it."
        )
    grace = parse_duration(given.grace, "--grace")
    sources, runs = _sources(given)
    opening = Opening(
        device=choose_compute(given.device, "fp32").device,
        slots=given.slots,
        dtype=given.dtype,
        compile=given.compile,
        tokenizer=given.tokenizer,
        chat_template=given.chat_template,
        settings={name: getattr(given, name) for name in ("n_heads", "rope_base", "context_length")},
        note=_note,
    )
    alone = next((source.path for source in sources.values() if source.run is not None), None) if runs is None else None
    options = ServeOptions(
        sources,
        runs,
        alone,
        opening,
        Access(key, given.allow_host, given.allow_origin),
        queue_length=given.queue,
        grace_seconds=grace,
        follow=given.follow,
    )
    bound = bind(given.host, given.port)
    host = f"[{given.host}]" if ":" in given.host else given.host
    address = f"http://{host}:{bound.getsockname()[1]}"
    if sources or runs is not None:
        print(f"Write        {address}/")
    if runs is not None or alone is not None:
        print(f"Runs         {address}/runs")
    print(f"For clients  {address}/v1", flush=True)
    if sources:
        _note(f"Loading {', '.join(sources)} … (a large model's step is compiled the first time, which takes a minute)")
    number = serve(options, bound, _report(given))
    return 128 + number


def _report(given: ServeArguments) -> Callable[[Models], None]:
    def ready(models: Models) -> None:
        for model in models.opened:
            engine = model.writer.engine
            step = "" if model.step is None else f"step {model.step}, "
            _note(
                f"{model.name}: {step}{model.parameters:,} parameters, {engine.dtype}, "
                f"{engine.how}, context {model.context:,} tokens"
                f"{', chat' if model.template is not None else ''}"
            )
        _note(f"Ready: {plural(given.slots, 'text')} at once, {given.queue} in the queue. Ctrl-C stops the server.")

    return ready


def _key(given: ServeArguments) -> str | None:
    if given.api_key_file is None:
        key = os.environ.get(_KEY) if given.api_key is None else given.api_key
    elif given.api_key is not None:
        raise ConfigError("--api-key and --api-key-file exclude each other: give one of them.")
    else:
        try:
            key = given.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise storage_error("read the API key", given.api_key_file, error) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"The API key in '{given.api_key_file}' is no text.") from error
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError(
            "The API key must have at least 8 characters of ASCII without spaces: openssl rand -hex 16 makes one."
        )
    return key


def _sources(given: ServeArguments) -> tuple[dict[str, Source], Path | None]:
    """Models by name, and the folder of runs."""
    from onym.serve.models import named, source_of

    sources: dict[str, Source] = {}
    runs: Path | None = None
    wanted: Iterable[tuple[str | None, str]] = [*map(named, given.models), *map(named, given.model)]
    if not wanted:
        if not RunOptions().runs_dir.is_dir():
            raise ConfigError("There is nothing to serve: name a model, a run or a folder of runs. onym train makes a run.")
        wanted = [(None, str(RunOptions().runs_dir))]
    for name, path in wanted:
        if name is None and _holds_runs(as_path(path)):
            if runs is not None:
                raise ConfigError(f"'{path}' and '{runs}' are both folders of runs: serve one of them.")
            runs = as_path(path)
            continue
        source = source_of(path)
        name = name or path.rstrip("/").rpartition("/")[2]
        if name in sources:
            raise ConfigError(f"Two models are called {name!r}: name them yourself, with --model NAME=PATH.")
        sources[name] = source
    return sources, runs


def _holds_runs(path: Path) -> bool:
    if not is_local(path) or not path.is_dir() or (path / DESCRIPTION).exists():
        return False
    try:
        return any((each / DESCRIPTION).is_file() for each in path.iterdir()) or path == RunOptions().runs_dir
    except OSError as error:
        raise storage_error("look into", path, error) from error


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
