"""What a command is given on its standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from onym.errors import ConfigError


def lines_of_input() -> Iterator[str]:
    """The lines of standard input, as they come.

    Raises:
        ConfigError: one is no UTF-8.
    """
    lines = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else (line.encode() for line in sys.stdin)
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"Line {number:,} of standard input is not UTF-8 text.") from error
