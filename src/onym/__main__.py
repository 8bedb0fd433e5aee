"""``python -m onym`` is the command ``onym``."""

from onym.cli.main import program

program()
