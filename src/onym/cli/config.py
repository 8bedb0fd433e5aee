"""A TOML file of options, as the arguments that it stands for."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from onym.errors import ConfigError, nearest, storage_error
from onym.train.options import LENGTHS, SIZES, TrainOptions, flag

_UNITS = {LENGTHS: "how long to train", SIZES: "how much goes into a step"}


def arguments_of(path: Path, instead: Collection[str] = ()) -> list[str]:
    """The options in a file, as if they had been typed.

    A key is an option without its dashes (``learning-rate`` or ``learning_rate``), at the top or in a table named after the
    help page's sections (``[optimization]``).

    Args:
        path: of the file.
        instead: lengths and sizes that are skipped, because they are given otherwise: from :func:`one_of_each`.

    Raises:
        ConfigError: it is no TOML file, has a key that is no option, or one thing in two units.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise storage_error("read the configuration", path, error) from error
    except ValueError as error:  # of the text's encoding, too
        raise ConfigError(f"'{path}' is no TOML file: {error}.") from error
    sections = {
        subject: {flag(name).lstrip("-"): hint for name, hint in get_type_hints(options).items()}
        for subject, options in get_type_hints(TrainOptions).items()
    }
    every = {name: hint for section in sections.values() for name, hint in section.items()}
    arguments: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in sections:
                raise ConfigError(f"'{path}' has a table [{key}]{nearest(key, sections)}: there are {', '.join(sections)}.")
            for name, inner in value.items():
                arguments.append(_argument(name, inner, sections[key], path))
        else:
            arguments.append(_argument(key, value, every, path))
    one_of_each([words[0] for words in arguments], f"'{path}': ")
    return [word for words in arguments if words[0].lstrip("-").replace("-", "_") not in instead for word in words]


def one_of_each(arguments: Sequence[str], where: str) -> set[str]:
    """The lengths and sizes that are to be given in no other unit elsewhere: those of each kind that arguments have one of.

    Raises:
        ConfigError: they have two of a kind; ``where`` begins the sentence.
    """
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    found: set[str] = set()
    for names, what in _UNITS.items():
        both = [name for name in names if name in given]
        if len(both) > 1:
            raise ConfigError(f"{where}{' and '.join(map(flag, both))} each say {what}: give one of them.")
        if both:
            found.update(names)
    return found


def _argument(key: str, value: Any, known: Mapping[str, Any], path: Path) -> list[str]:
    name = key.replace("_", "-")
    if name not in known:
        raise ConfigError(f"'{path}' has {key!r}{nearest(name, known)}, which is no option: see onym train --help.")
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str | int | float) for part in parts):
        raise ConfigError(f"{key!r} in '{path}' has to be a text, a number, true or false, or a list of texts, not {value!r}.")
    if wanted := _wanted(known[name], value):
        raise ConfigError(f"{key!r} in '{path}' has to be {wanted}, not {value!r}.")
    if isinstance(value, bool) and known[name] is bool:
        return [f"--{'' if value else 'no-'}{name}"]
    return [f"--{name}", *map(str, parts)]


def _wanted(hint: Any, value: Any) -> str:
    """What an option of this type takes, in words; empty where the value is such a one."""
    kinds = [kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint]) if kind is not type(None)]
    if get_origin(kinds[0]) is Literal:
        known = get_args(kinds[0])
        return "" if value in known else f"one of {', '.join(known)}"
    if len(kinds) > 1 or kinds[0] not in _KINDS:
        return ""
    words, fitting = _KINDS[kinds[0]]
    return "" if isinstance(value, fitting) and isinstance(value, bool) == (kinds[0] is bool) else words


_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
}
