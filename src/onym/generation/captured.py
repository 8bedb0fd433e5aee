"""One decoding step as a CUDA graph.

A step of one token is hundreds of small kernels, and launching one takes Python longer than the GPU takes for it. A graph is
launched whole. It replays what was captured, with the same memory: so tokens and positions are copied into buffers of its own,
and attention is over all positions that the slots can hold, those behind a text masked. A text is then the same whatever is
written beside it, here too.

Captured without compilation, it is there in a second. Compiled first, neighbouring operations are one kernel, and a matrix
times one vector is a loop that reads each weight once; that takes a minute, or seconds where the cache has the code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from onym.compile.cache import warm_start
from onym.generation.cache import Slots
from onym.generation.step_function import Known, Step
from onym.gpt.causal_lm import CausalLM

# Blocks of different sizes are tried out for the sums over rows, which otherwise do not reach the bandwidth of the memory.
_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


class CapturedStep:
    """A step that is captured when it is made. On a CPU, which has no graphs, it is called instead: that is how it is tested.

    Args:
        model: of :func:`onym.generation.weights.for_decoding`, not packed.
        slots: its buffers.
        compiled: whether to compile it first.

    Raises:
        Exception: whatever a compiler can raise, or a lack of memory.
    """

    def __init__(self, model: CausalLM, slots: Slots, *, compiled: bool) -> None:
        self.compiled, self._slots = compiled, slots
        step = Step(model)
        self.known = Known(step, slots)
        self._inputs = torch.zeros((2, slots.slots), dtype=torch.long, device=slots.keys.device)
        keys, values = list(slots.keys), list(slots.values)
        function: Callable[..., Tensor] = step
        if compiled:
            function = torch.compile(step, fullgraph=True, dynamic=False, options=_OPTIONS)

        def run() -> Tensor:
            # Elsewhere in the engine, modules that are compiled run as they are written.
            with torch.compiler.set_stance("default") if compiled else nullcontext():
                return function(self._inputs[0], self._inputs[1], keys, values).float()

        with _for_many_engines() if compiled else nullcontext():
            self._replay, self._logits = _captured(run, self._inputs.device)

    def __call__(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Logits [slots, vocab] fp32 of tokens [slots] at positions [slots], which the next call overwrites."""
        del length  # a graph attends to all positions
        self._inputs[0].copy_(tokens, non_blocking=True)
        self._inputs[1].copy_(positions, non_blocking=True)
        self._replay()
        return self._logits[0]


@contextmanager
def _for_many_engines() -> Iterator[None]:
    """Each engine compiles the same lines once more, as often as a process makes one; torch takes eight times for a mistake."""
    import torch._dynamo.config as limits  # takes a second

    with warm_start(True), limits.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


def _captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], list[Tensor]]:
    """What runs it again, and where its result is from then on."""
    if device.type != "cuda":
        logits = [run()]

        def again() -> None:
            with torch.inference_mode(False), torch.no_grad():  # as it was compiled
                logits[0] = run()

        return again, logits
    with torch.cuda.device(device):
        aside = _stream(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is made at the first call, such as cuBLAS's memory, must not be part of the graph
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU: a server opens one model while another writes.
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            logits = [run()]
    return graph.replay, logits


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all engines: cuBLAS keeps memory for each stream that it was used on."""
    return torch.cuda.Stream(device)
