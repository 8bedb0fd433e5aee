"""Sizes, counts, ages and durations: how people write them, and how they are shown to people.

Imports nothing but the standard library, so that the command line can use it before torch is loaded.
"""

from __future__ import annotations

import re
import time
from calendar import timegm

from onym.errors import ConfigError

_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def format_size(count: float) -> str:
    """``52_300_000`` bytes as ``52.3 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_clock(seconds: float) -> str:
    """``95.0`` seconds as ``1:35``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def utc(seconds: float) -> str:
    """A time of the system's clock, as manifests have it.

    >>> utc(0)
    '1970-01-01T00:00:00Z'
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def format_age(written: str | None) -> str:
    """How long ago a manifest's time (``2026-01-31T12:00:00Z``) was, in words; ``?`` for text that is no time."""
    try:
        seconds = time.time() - timegm(time.strptime(written or "", "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return "?"
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            return f"{plural(int(seconds // length), unit)} ago"
    return "just now"


def plural(count: int, noun: str) -> str:
    """``3 tensors``, ``1 tensor``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def parse_duration(text: str, option: str) -> float:
    """Seconds of a duration as people write it.

    Raises:
        ConfigError: it is none; ``option`` names the option.

    >>> parse_duration("3h55m", "--time-limit"), parse_duration("1d", "--time-limit"), parse_duration("90", "--time-limit")
    (14100.0, 86400.0, 90.0)
    """
    given = text.replace(" ", "")
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", given + "s" * given.isdecimal(), re.ASCII)
    counts = parts.groups() if parts else ()
    seconds = sum(int(count or 0) * unit for count, unit in zip(counts, _SECONDS.values(), strict=False))
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{option} is a time as 3h55m, 90m or 1d12h, not {text!r}.")
    return float(seconds)


def parse_count(text: str, option: str) -> int:
    """A number of tokens as people write it.

    Raises:
        ConfigError: it is none; ``option`` names the option.

    >>> parse_count("32k", "--tokens-per-step"), parse_count("1.5B", "--tokens"), parse_count("1_000", "--tokens")
    (32000, 1500000000, 1000)
    """
    parts = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([kmbt]?)", text.strip().lower(), re.ASCII)
    number = round(float(parts[1]) * _COUNTS[parts[2]]) if parts else 0
    if not 0 < number < 2**62:
        raise ConfigError(f"{option} is a number of tokens as 10M, 32k or 1_000_000, not {text!r}.")
    return number


def parse_size(text: str, option: str) -> int:
    """Bytes of a size as people write it.

    Raises:
        ConfigError: it is none; ``option`` names the option.

    >>> parse_size("5GB", "--shard-size"), parse_size("1.5 MiB", "--shard-size")
    (5000000000, 1572864)
    """
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _SIZES.get(parts[2].upper()) if parts else None
    if parts is None or unit is None or float(parts[1]) * unit < 1:
        raise ConfigError(f"{option} {text!r} is no size: give a number with KB, MB or GB, as 5GB.")
    return int(float(parts[1]) * unit)
