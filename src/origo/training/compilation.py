"""Compile the model in place, or say in one line why it runs without.

``model.compile()`` changes how the model is called and nothing else: no wrapper, no prefix in any name, the same parameters.
Evaluation and sampling call the same model without compilation (:mod:`origo.models.eager`), so they cause no recompilation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Compilation:
    """What came of it."""

    compiled: bool
    seconds: float
    """From the call to the end of the first step."""
    reason: str = ""
    """Why the model runs without, where it was to be compiled."""


def compile_in_place(
    model: nn.Module, wanted: bool, dry_run: Callable[[], None], *, reraise: Callable[[Exception], bool] = lambda _: False
) -> Compilation:
    """Compile and run one step without effect, so that whatever is wrong shows before training starts.

    Args:
        model: compiled with fixed shapes.
        wanted: False for the dry run alone.
        dry_run: one forward and backward pass at the shape of training.
        reraise: which errors compiling is not the cause of.

    Raises:
        Exception: what ``dry_run`` raises without compilation too.
    """
    start = time.perf_counter()
    reason = ""
    if wanted:
        try:
            model.compile(dynamic=False)
            dry_run()
            return Compilation(True, time.perf_counter() - start)
        except Exception as error:  # whatever a compiler can raise must not cost the user the run
            uncompile(model)
            if reraise(error):
                raise
            reason = _short(error)
    dry_run()
    return Compilation(False, time.perf_counter() - start, reason)


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far; more of them during training are recompilations."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # where nothing is compiled, importing it would cost a second
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def uncompile(model: nn.Module) -> None:
    """Back to running without compilation: the same parameters, the same names, the same optimizer."""
    model._compiled_call_impl = None


def _short(error: BaseException) -> str:
    """The innermost cause's first line: what a person can act on."""
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None and cause is not error:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
