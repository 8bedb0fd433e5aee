"""Compiling the model in place: whether it pays, the cache of compiled code, and moving that to another machine."""
