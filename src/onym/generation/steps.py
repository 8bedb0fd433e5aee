"""Which way a step of decoding is computed: compiled, or not, by what was measured on this machine.

1. where the step of this shape was compiled here before, what it gave is known, and the faster way is taken
2. else it is compiled if that pays within the steps that are to come: as in training (:mod:`onym.compile.policy`), with half
   of the cost counted, because the next process finds it
3. what it took and gave is measured in this process, and remembered; the faster way is taken

On a CPU it is compiled ahead of time (:mod:`onym.generation.compiled`). On a GPU it is captured as a CUDA graph
(:mod:`onym.generation.captured`), which costs next to nothing, and what is asked here is whether to compile it first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onym.compile.policy import Costs, seconds_next_time
from onym.generation.cache import OneStep, Slots
from onym.generation.captured import CapturedStep
from onym.generation.compiled import CompiledStep
from onym.generation.step_function import Measured
from onym.generation.ways import Compile, Dtype
from onym.generation.weights import for_decoding
from onym.gpt.causal_lm import CausalLM
from onym.gpt.hardware import synchronize

StepFunction = CompiledStep | CapturedStep
"""Called with tokens and positions [slots] on the CPU, and one more than the highest position; gives logits [slots, vocab]."""

_ASSUMED = Costs(45.0, 0.4)
"""Seconds to compile, and the share of a step that it saves, where this shape was never compiled here."""
_ASSUMED_OF_GRAPH = Costs(45.0, 0.3)
"""The same on a GPU, where a step that is a CUDA graph already is compared with one that is compiled too; not measured."""
_TRIAL_STEPS = 7


def arrange(
    model: CausalLM, cache: Slots, dtype: Dtype, wanted: Compile, expected: int, note: Callable[[str], None]
) -> tuple[CausalLM, StepFunction | None]:
    """Arrange a model's weights for decoding.

    Args:
        model: plain, or compiled in place.
        cache: the buffers, empty.
        dtype: of the weights.
        wanted: whether to compile.
        expected: steps to come.
        note: called with the reason why the step is not compiled or captured where it was to be.

    Returns:
        The model with :class:`~onym.generation.weights.Product` for its linear layers, and its step if that is compiled or
        captured.
    """
    on_cpu = cache.keys.device.type == "cpu"
    if wanted == "off" or cache.keys.device.type not in ("cpu", "cuda"):
        return for_decoding(model, dtype, pack=on_cpu), None
    if on_cpu:
        return _compiled_if_it_pays(model, cache, dtype, wanted, expected, note)
    ready = for_decoding(model, dtype, pack=False)
    return ready, captured_step(ready, cache, wanted, expected, note)


def _compiled_if_it_pays(
    model: CausalLM, cache: Slots, dtype: Dtype, wanted: Compile, expected: int, note: Callable[[str], None]
) -> tuple[CausalLM, CompiledStep | None]:
    by_rows = for_decoding(model, dtype, pack=False)
    step = CompiledStep(by_rows, cache)
    known = step.known.recall()
    if known is not None and (wanted == "on" or known.compiled < known.eager):
        if step.load():
            return by_rows, step
        known = None  # it was deleted, or is damaged
    if wanted == "auto" and known is not None:
        del by_rows, step  # before another copy is made
        return for_decoding(model, dtype, pack=True), None
    packed = for_decoding(model, dtype, pack=True)
    eager = _seconds(lambda tokens, positions: run_eagerly(packed, cache, tokens, positions, [1] * cache.slots), cache)
    if wanted == "auto" and not pays(expected, eager):
        return packed, None
    began = time.perf_counter()
    try:
        step.compile()
        seconds = time.perf_counter() - began
        compiled = _seconds(lambda tokens, positions: step(tokens, positions, 1), cache)
    except Exception as error:  # whatever a compiler can raise must not cost the user the text
        note(f"The step is not compiled ({_short(error)}).")
        return packed, None
    step.known.remember(Measured(seconds, eager, compiled))
    return (by_rows, step) if wanted == "on" or compiled < eager else (packed, None)


def captured_step(
    model: CausalLM, cache: Slots, wanted: Compile, expected: int, note: Callable[[str], None]
) -> CapturedStep | None:
    """The step as a CUDA graph, compiled first if that is wanted or pays; None where it cannot be captured.

    Args:
        model: of :func:`~onym.generation.weights.for_decoding`, not packed.
        cache, wanted, expected, note: as of :func:`arrange`.
    """
    try:
        plain = CapturedStep(model, cache, compiled=False)
    except Exception as error:  # what a device or a model does not let be captured must not cost the user the text
        note(f"The step is no CUDA graph ({_short(error)}).")
        return None
    eager = _seconds(lambda tokens, positions: plain(tokens, positions, 1), cache)
    known = plain.known.recall()
    costs = _ASSUMED_OF_GRAPH if known is None else Costs(known.seconds, 1 - known.compiled / eager)
    if wanted == "auto" and not pays(expected, eager, costs):
        return plain
    began = time.perf_counter()
    try:
        step = CapturedStep(model, cache, compiled=True)
    except Exception as error:
        note(f"The step is not compiled ({_short(error)}).")
        return plain
    seconds = time.perf_counter() - began
    compiled = _seconds(lambda tokens, positions: step(tokens, positions, 1), cache)
    plain.known.remember(Measured(seconds_next_time(seconds), eager, compiled))
    return step if wanted == "on" or compiled < eager else plain


def pays(steps: int, eager_seconds: float, costs: Costs = _ASSUMED) -> bool:
    """Whether to compile for ``steps`` steps that take ``eager_seconds`` each without; ``costs`` where they are known.

    >>> pays(200, 0.003), pays(10_000, 0.024)
    (False, True)
    """
    return steps * eager_seconds * costs.saved > 0.5 * costs.seconds


def run_eagerly(model: CausalLM, cache: Slots, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
    """One step without compilation: logits [slots, vocab] of tokens [slots] at positions [slots].

    Args:
        lengths: tokens of each slot, the new one included; 0 where it writes nothing.
    """
    keys, values = cache.held(max(lengths))
    return model(tokens[:, None], cache=OneStep(keys, values, positions, lengths))[:, 0]  # type: ignore[no-any-return]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _seconds(step: Callable[[Tensor, Tensor], Tensor], cache: Slots) -> float:
    """Of one step, in the middle of several; the buffers hold nothing yet."""
    tokens = torch.zeros(cache.slots, dtype=torch.long)
    taken = []
    for _ in range(_TRIAL_STEPS):
        began = time.perf_counter()
        step(tokens, tokens)
        synchronize(cache.keys.device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
