"""Where state is kept: written whole or not at all, and checked before it is used."""
