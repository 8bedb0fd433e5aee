"""Compile the model in place, or report in one line why it runs without.

``model.compile()`` changes how the model is called and nothing else: no wrapper, no prefix in any name, the same parameters.
Evaluation and sampling run the same model as it is written (:func:`without_compilation`): they differ from a training step in
shape, in grad mode and in dropout, and each difference would cost a recompilation of half a minute, for work of a second.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from onym.compile.inductor import forget_broken

_MOST_BROKEN = 16  # libraries that a killed compiler can have left unfinished; it works on a few at a time

How = Literal["whole", "blocks", "off"]
"""The whole model as one graph, each of its blocks, or nothing."""


@dataclass(frozen=True)
class Compilation:
    """What came of it."""

    how: How
    seconds: float
    """From the call to the end of the first step."""
    reason: str = ""
    """Why the model runs without, where it was to be compiled."""
    eager_seconds: float = math.nan
    """Of a step's forward and backward passes without compilation; NaN where it was not measured."""
    compiled_seconds: float = math.nan
    """The same, compiled."""

    @property
    def compiled(self) -> bool:
        """Whether anything is."""
        return self.how != "off"

    @property
    def saved_seconds(self) -> float:
        """In each step; NaN where it was not measured."""
        return self.eager_seconds - self.compiled_seconds

    def __str__(self) -> str:
        """In words, with when it is paid back.

        >>> print(Compilation("whole", 21.0, "", 1.0, 0.69))
        the whole model in place; every name stays as it is; took 21 s and saves 0.31 s a step: paid back after 68 steps
        """
        if not self.compiled:
            return "without compilation"
        text = f"{'the whole model' if self.how == 'whole' else 'each block'} in place; every name stays as it is"
        if self.saved_seconds > 0:
            steps = math.ceil(self.seconds / self.saved_seconds)
            text += f"; took {self.seconds:.0f} s and saves {self.saved_seconds:.2g} s a step: paid back after {steps:,} steps"
        return text


def compile_in_place(
    model: nn.Module, how: How, dry_run: Callable[[], None], *, reraise: Callable[[Exception], bool] = lambda _: False
) -> Compilation:
    """Compile and run one step without effect, so that whatever is wrong shows before training starts.

    Args:
        model: compiled with fixed shapes; of ``"blocks"``, each of its ``trf_blocks``.
        how: ``"off"`` for the dry run alone.
        dry_run: one forward and backward pass at the shape of training.
        reraise: which errors compiling is not the cause of.

    Raises:
        Exception: what ``dry_run`` raises without compilation too.
    """
    start = time.perf_counter()
    reason = ""
    if how != "off":
        for _ in range(_MOST_BROKEN):
            try:
                for module in _parts(model, how):
                    module.compile(dynamic=False)
                with no_tf32_warning():
                    dry_run()
                return Compilation(how, time.perf_counter() - start)
            except Exception as error:  # whatever a compiler can raise must not cost the user the run
                uncompile(model)
                if reraise(error):
                    raise
                reason = _short(error)
                if not forget_broken(str(_innermost(error))):
                    break
    dry_run()
    return Compilation("off", time.perf_counter() - start, reason)


@contextmanager
def no_tf32_warning() -> Iterator[None]:
    """Without torch's advice to round products that are left in fp32: ``--precision fp32`` means it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield


def without_compilation() -> AbstractContextManager[object]:
    """A context in which compiled modules run without compilation."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled then, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _parts(model: nn.Module, how: How) -> list[nn.Module]:
    return [model] if how == "whole" else list(model.get_submodule("trf_blocks").children())


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far; more of them during training are recompilations."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # where nothing is compiled, importing it would cost a second
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def why_compiled_again() -> str:
    """The last reason why a graph did not fit and another one was compiled; empty where there was none."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    reasons = [reason for failed in dynamo.guard_failures.values() for reason in failed] if dynamo is not None else []
    return str(reasons[-1]).splitlines()[0][:200] if reasons else ""


def uncompile(model: nn.Module) -> None:
    """Back to running without compilation: the same parameters, the same names, the same optimizer."""
    for module in model.modules():
        module._compiled_call_impl = None


def forget_compiled() -> None:
    """Let torch forget what it compiled in this process, and how often."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _innermost(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None and cause is not error:
        error = cause
    return error


def _short(error: BaseException) -> str:
    """The innermost cause's first line: what a person can act on."""
    error = _innermost(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
