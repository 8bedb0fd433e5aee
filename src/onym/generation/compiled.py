"""One decoding step as one compiled function: from a token of each slot to its logits.

It is compiled ahead of time (AOTInductor) for a shape of model, a dtype of weights and a number of slots, and kept in the cache
of compiled code (:mod:`onym.compile.cache`). The weights are arguments of it, so it fits any weights of the shape; positions
are a tensor, and how many of them are attended to may differ from step to step, so nothing is ever compiled again. The next
process loads it in hundredths of a second, where ``torch.compile`` would trace for 4 to 6 (docs/performance.md).

    <cache>/compiled/<key>/decode/<hash>.pt2     the function
    <cache>/compiled/<key>/decode/<hash>.json    what it took and gave, see :mod:`onym.generation.step_function`
"""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from onym.compile.cache import warm_start
from onym.generation.cache import ROUND, Slots
from onym.generation.step_function import Known, Step, weights_of
from onym.gpt.causal_lm import CausalLM
from onym.storage.paths import replace_file


class _Pure(nn.Module):
    """The same with the weights as an argument. It holds the module out of sight, so that they are no constants of it."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = (step,)

    def forward(
        self, weights: dict[str, Tensor], tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        return functional_call(self.step[0], weights, (tokens, positions, keys, values))  # type: ignore[no-any-return]


class CompiledStep:
    """A step that is compiled, or will be.

    Args:
        model: of :func:`onym.generation.weights.for_decoding`, not packed.
        slots: its buffers.
    """

    made = 0
    """How many this process has compiled."""
    compiled = True

    def __init__(self, model: CausalLM, slots: Slots) -> None:
        self._step, self._slots = Step(model), slots
        self._weights = weights_of(self._step)
        self.known = Known(self._step, slots)
        self._function: Any = None

    def __call__(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Logits [slots, vocab] of tokens [slots] at positions [slots], the highest below ``length``."""
        keys, values = self._slots.held(max(length, 2 * ROUND))
        logits: Tensor = self._function([*self._weights.values(), tokens, positions, *keys, *values])[0]
        return logits

    def load(self) -> bool:
        """Take the function from the cache; whether it is there."""
        with suppress(Exception):  # whatever is wrong with it: it is made anew
            if self.known.function.exists():
                self._function = _loaded(self.known.function)
                os.utime(self.known.function)
                return True
        return False

    def compile(self) -> None:
        """Make it, and put it into the cache.

        Raises:
            Exception: whatever a compiler can raise.
        """
        slots, device = self._slots.keys.shape[2], self._slots.keys.device
        # Two tensors: one that is given twice would be taken for one argument.
        tokens, positions = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        keys, values = (
            [each[: 2 * ROUND].contiguous() for each in buffers] for buffers in (self._slots.keys, self._slots.values)
        )
        # A Dim of its own for each would be found out to be equal only in the end; derived ones say so at once.
        length = torch.export.Dim("length", min=2, max=1 << 20) * ROUND
        shapes = (dict.fromkeys(self._weights), None, None, [{0: length}] * len(keys), [{0: length}] * len(values))
        with warm_start(True), warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Pure(self._step), (self._weights, tokens, positions, keys, values), dynamic_shapes=shapes, strict=False
            )
            made = torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(Path(folder, "step.pt2")),
                # A product and its sum as one instruction: eight texts at once take two thirds of the time.
                inductor_configs={"cpp.enable_floating_point_contract_flag": "fast"},
            )
            CompiledStep.made += 1
            replace_file(self.known.function, Path(made).read_bytes())
        self._function = _loaded(self.known.function)


def _loaded(path: Path) -> Any:
    """A function of a list of all tensors, in the order of the arguments, to a list with the logits.

    ``aoti_load_package`` does the same, and imports the compiler first, which takes 2.4 seconds.
    """
    aoti: Any = torch._C._aoti
    return aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).boxed_run
