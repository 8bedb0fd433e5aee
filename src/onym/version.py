"""The version of Onym."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As it was installed; its sources can also be used as they are, and then nothing says it."""
    try:
        return version("onym")
    except PackageNotFoundError:
        return "not installed"
