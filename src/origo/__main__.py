"""``python -m origo`` is the command ``origo``."""

from origo.cli.main import program

program()
