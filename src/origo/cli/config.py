"""A TOML file of options, as the arguments that it stands for."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from origo.errors import ConfigError, nearest, storage_error
from origo.training.options import TrainOptions, flag


def arguments_of(path: Path) -> list[str]:
    """The options in a file, as if they had been typed.

    A key is an option without its dashes (``learning-rate`` or ``learning_rate``), at the top or in a table named after the
    help page's sections (``[optimization]``).

    Raises:
        ConfigError: it is no TOML file, or has a key that is no option.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise storage_error("read the configuration", path, error) from error
    except ValueError as error:  # of the text's encoding, too
        raise ConfigError(f"'{path}' is no TOML file: {error}.") from error
    sections = {
        subject.name: {flag(field.name).lstrip("-") for field in dataclasses.fields(getattr(TrainOptions(), subject.name))}
        for subject in dataclasses.fields(TrainOptions)
    }
    every = set().union(*sections.values())
    arguments: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in sections:
                raise ConfigError(f"'{path}' has a table [{key}]{nearest(key, sections)}: there are {', '.join(sections)}.")
            for name, inner in value.items():
                arguments += _argument(name, inner, sections[key], path)
        else:
            arguments += _argument(key, value, every, path)
    return arguments


def _argument(key: str, value: Any, known: set[str], path: Path) -> list[str]:
    name = key.replace("_", "-")
    if name not in known:
        raise ConfigError(f"'{path}' has {key!r}{nearest(name, known)}, which is no option: see origo train --help.")
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str | int | float) for part in parts):
        raise ConfigError(f"{key!r} in '{path}' has to be a text, a number, true or false, or a list of texts, not {value!r}.")
    if isinstance(value, bool) and name in _SWITCHES:
        return [f"--{'' if value else 'no-'}{name}"]
    return [f"--{name}", *map(str, parts)]


_SWITCHES = {
    flag(field.name).lstrip("-")
    for subject in dataclasses.fields(TrainOptions)
    for field in dataclasses.fields(getattr(TrainOptions(), subject.name))
    if isinstance(field.default, bool)
}
