"""The kinds of model that ``--arch`` names, and the shapes that ``--preset`` names."""

from __future__ import annotations

from typing import Any, Literal

from onym.errors import ConfigError, nearest
from onym.gpt.config import GPTConfig
from onym.gpt.decoder_config import DecoderConfig

Arch = Literal["gpt2", "llama", "qwen3"]
"""Kinds of model that ``--arch`` names."""
ARCHS: tuple[Arch, ...] = ("gpt2", "llama", "qwen3")
DEFAULT_ARCH: Arch = "qwen3"
"""Of the presets that every kind has: the lowest loss at equal tokens and at equal time, measured; see docs/performance.md."""
_OF_ONE_ARCH: dict[str, Arch] = {"small": "qwen3", "medium": "qwen3", "qwen3-0.6b": "qwen3", "llama3.2-1b": "llama"}


def presets() -> list[str]:
    """All names of shapes, the smallest first."""
    names = {**GPTConfig.presets, **DecoderConfig.presets}
    return sorted(names, key=lambda name: config_of(arch_of(name), name).multiplied_weights)


def arch_of(preset: str) -> Arch:
    """The kind of model that a preset stands for, where nobody says another.

    Raises:
        ConfigError: there is no such preset.
    """
    known = {**GPTConfig.presets, **DecoderConfig.presets}
    if preset not in known:
        raise ConfigError(f"There is no preset {preset!r}{nearest(preset, known)}; there are {', '.join(presets())}.")
    if preset in _OF_ONE_ARCH:
        return _OF_ONE_ARCH[preset]
    return DEFAULT_ARCH if preset in DecoderConfig.presets else "gpt2"


def config_of(arch: Arch, preset: str, **overrides: Any) -> GPTConfig | DecoderConfig:
    """A preset's shape as one of the three kinds of model.

    Raises:
        ConfigError: it has no such preset, or no such field.
    """
    if arch == "gpt2":
        return GPTConfig.preset(preset, **overrides)
    return DecoderConfig.preset(preset, **{"qk_norm": arch == "qwen3", **overrides})
