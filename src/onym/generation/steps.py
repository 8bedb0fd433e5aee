"""Which way a step of decoding is computed: compiled, or not, by what was measured on this machine.

1. where the step of this shape was compiled here before, what it gave is known, and the faster way is taken
2. else it is compiled if that pays within the steps that are to come: as in training (:mod:`onym.compile.policy`), with half
   of the cost counted, because the next process finds it
3. what it took and gave is measured in this process, and remembered; the faster way is taken
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onym.compile.policy import Costs
from onym.generation.cache import OneStep, Slots
from onym.generation.compiled import CompiledStep, Measured
from onym.generation.ways import Compile, Dtype
from onym.generation.weights import for_decoding
from onym.gpt.causal_lm import CausalLM

_ASSUMED = Costs(45.0, 0.4)
"""Seconds to compile, and the share of a step that it saves, where this shape was never compiled here."""
_TRIAL_STEPS = 7


def arrange(
    model: CausalLM, cache: Slots, dtype: Dtype, wanted: Compile, expected: int, note: Callable[[str], None]
) -> tuple[CausalLM, CompiledStep | None]:
    """Arrange a model's weights for decoding.

    Args:
        model: plain, or compiled in place.
        cache: the buffers, empty.
        dtype: of the weights.
        wanted: whether to compile.
        expected: steps to come.
        note: called with the reason why the step is not compiled where that was asked for.

    Returns:
        The model with :class:`~onym.generation.weights.Product` for its linear layers, and its step if it is compiled.
    """
    on_cpu = cache.keys.device.type == "cpu"
    if wanted == "off" or (wanted == "auto" and not on_cpu):  # nobody has measured it on a GPU
        return for_decoding(model, dtype, pack=on_cpu), None
    by_rows = for_decoding(model, dtype, pack=False)
    step = CompiledStep(by_rows, cache)
    known = step.recall()
    if known is not None and (wanted == "on" or known.compiled < known.eager):
        if step.load():
            return by_rows, step
        known = None  # it was deleted, or is damaged
    if wanted == "auto" and known is not None:
        del by_rows, step  # before another copy is made
        return for_decoding(model, dtype, pack=on_cpu), None
    packed = for_decoding(model, dtype, pack=on_cpu)
    eager = _seconds(lambda tokens, positions: run_eagerly(packed, cache, tokens, positions, [1] * cache.slots), cache)
    if wanted == "auto" and not pays(expected, eager):
        return packed, None
    began = time.perf_counter()
    try:
        step.compile()
        seconds = time.perf_counter() - began
        compiled = _seconds(lambda tokens, positions: step(tokens, positions, 1), cache)
    except Exception as error:  # whatever a compiler can raise must not cost the user the text
        note(f"The step is not compiled ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}).")
        return packed, None
    step.remember(Measured(seconds, eager, compiled))
    return (by_rows, step) if wanted == "on" or compiled < eager else (packed, None)


def pays(steps: int, eager_seconds: float) -> bool:
    """Whether to compile for ``steps`` steps that take ``eager_seconds`` each without, where nothing is known.

    >>> pays(200, 0.003), pays(10_000, 0.024)
    (False, True)
    """
    return steps * eager_seconds * _ASSUMED.saved > 0.5 * _ASSUMED.seconds


def run_eagerly(model: CausalLM, cache: Slots, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
    """One step without compilation: logits [slots, vocab] of tokens [slots] at positions [slots].

    Args:
        lengths: tokens of each slot, the new one included; 0 where it writes nothing.
    """
    keys, values = cache.held(max(lengths))
    return model(tokens[:, None], cache=OneStep(keys, values, positions, lengths))[:, 0]  # type: ignore[no-any-return]


def _seconds(step: Callable[[Tensor, Tensor], Tensor], cache: Slots) -> float:
    """Of one step, in the middle of several; the buffers hold nothing yet."""
    tokens = torch.zeros(cache.slots, dtype=torch.long, device=cache.keys.device)
    taken = []
    for _ in range(_TRIAL_STEPS):
        began = time.perf_counter()
        step(tokens, tokens)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
