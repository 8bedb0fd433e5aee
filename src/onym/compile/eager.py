"""Run a compiled model as it is written, for a while.

Evaluation and sampling differ from a training step in shape, in grad mode and in dropout; each difference would be a
recompilation of half a minute, for work of a second.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def without_compilation() -> AbstractContextManager[object]:
    """A context in which compiled modules run without compilation."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled then, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
