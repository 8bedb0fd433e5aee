"""Compiling the model in place: whether it pays, where the code is kept, and how it is carried to another machine."""
