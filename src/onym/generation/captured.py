"""One decoding step as a CUDA graph.

A step of one token is hundreds of small kernels, and launching one takes Python longer than the GPU takes for it. A graph is
launched whole. It replays what was captured, with the same memory: so tokens and positions are copied into buffers of its own,
and attention is over a fixed number of positions, those behind a text masked. A text is then the same whatever is written
beside it, here too; past 2,048 tokens up to the rounding of sums, which are of more positions where a text beside it is longer.

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
from onym.compile.in_place import no_tf32_warning
from onym.generation.cache import Slots
from onym.generation.step_function import Known, Step
from onym.gpt.causal_lm import CausalLM

_LEAST, _MOST_AT_FIRST = 256, 2048  # tokens that a graph attends to
# Blocks of different sizes are tried out for the sums over rows, which otherwise do not reach the bandwidth of the memory.
_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


def rounded_capacity(tokens: int) -> int:
    """A power of two, so that a step that was compiled for one text is found again for others of about its length."""
    return max(_LEAST, 1 << (tokens - 1).bit_length())


class CapturedStep:
    """A step that is captured when it is made. On a CPU, which has no graphs, it is called instead: that is how it is tested.

    Attention is over all positions that a graph is of. So there is one of up to 2,048, and others of four times as many each,
    captured when a text first needs them. Those are not compiled: nobody would wait for that in the middle of a text.

    Args:
        model: of :func:`onym.generation.weights.for_decoding`, not packed.
        slots: its buffers.
        compiled: whether to compile it first.

    Raises:
        Exception: whatever a compiler can raise, or a lack of memory.
    """

    def __init__(self, model: CausalLM, slots: Slots, *, compiled: bool) -> None:
        self.compiled, self._slots = compiled, slots
        self._step = Step(model)
        self._inputs = torch.zeros((2, slots.slots), dtype=torch.long, device=slots.keys.device)
        self._sizes = [min(slots.capacity, _MOST_AT_FIRST)]
        while self._sizes[-1] < slots.capacity:
            self._sizes.append(min(slots.capacity, 4 * self._sizes[-1]))
        self.known = Known(self._step, slots, f"graph of {self._sizes[0]}")
        self._graphs: dict[int, tuple[Callable[[], object], list[Tensor]]] = {}
        self._kept: list[Callable[[], Tensor]] = []  # kernels are unloaded with the code that launched them
        with _compiling() if compiled else nullcontext():
            self._capture(self._sizes[0], compiled=compiled)

    def __call__(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Logits [slots, vocab] fp32 of tokens [slots] at positions [slots], the highest below ``length``.

        The next call overwrites them.
        """
        self._inputs[0].copy_(tokens, non_blocking=True)
        self._inputs[1].copy_(positions, non_blocking=True)
        size = next(each for each in self._sizes if each >= length)
        if size not in self._graphs:
            self._capture(size, compiled=False)  # what it writes meanwhile is what it is to write
        replay, logits = self._graphs[size]
        replay()
        return logits[0]

    def _capture(self, size: int, *, compiled: bool) -> None:
        keys, values = ([each[:size] for each in buffers] for buffers in (self._slots.keys, self._slots.values))
        function: Callable[..., Tensor] = self._step
        if compiled:
            function = torch.compile(self._step, fullgraph=True, dynamic=False, options=_OPTIONS)

        def run() -> Tensor:
            # Elsewhere in the engine, modules that are compiled run as they are written.
            with torch.compiler.set_stance("default") if compiled else nullcontext():
                return function(self._inputs[0], self._inputs[1], keys, values).float()

        self._kept.append(run)
        self._graphs[size] = _captured(run, self._inputs.device)


@contextmanager
def _compiling() -> Iterator[None]:
    """A process may make engines of any number of shapes; torch takes the ninth compilation of the same lines for a mistake."""
    import torch._dynamo.config as limits  # takes a second

    with warm_start(True), limits.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20), no_tf32_warning():
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
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first calls compile, try out kernels, and wait for the GPU
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU: a server opens one model while another writes.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = [run()]
    return graph.replay, logits


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all engines: cuBLAS keeps memory for each stream that it was used on."""
    return torch.cuda.Stream(device)
