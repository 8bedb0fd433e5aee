"""One decoding step as one compiled function: from a token of each slot to its logits.

It is compiled ahead of time (AOTInductor) for a shape of model, a dtype of weights and a number of slots, and kept in the cache
of compiled code (:mod:`onym.compile.cache`). The weights are arguments of it, so it fits any weights of the shape; positions
are a tensor, and how many of them are attended to may differ from step to step, so nothing is ever compiled again. The next
process loads it in hundredths of a second, where ``torch.compile`` would trace for 4 to 6 (docs/performance.md).

Beside it lies what it took and gave::

    <cache>/compiled/<key>/decode/<hash>.pt2     the function
    <cache>/compiled/<key>/decode/<hash>.json    {"seconds": 40.6, "eager": 0.024, "compiled": 0.0127}
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from onym.compile.cache import open_folder, warm_start
from onym.errors import StorageError
from onym.generation.cache import ROUND, OneStep, Slots
from onym.gpt.causal_lm import CausalLM
from onym.storage.paths import replace_file


class _Step(nn.Module):
    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        hidden = self.model.hidden_states(tokens[:, None], OneStep(keys, values, positions))
        return self.model.out_head(hidden)[:, 0]  # type: ignore[no-any-return]  # [slots, vocab]


class _Pure(nn.Module):
    """The same with the weights as an argument. It holds the module out of sight, so that they are no constants of it."""

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step = (step,)

    def forward(
        self, weights: dict[str, Tensor], tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        return functional_call(self.step[0], weights, (tokens, positions, keys, values))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Measured:
    """What compiling a step took, and what a step takes, in seconds."""

    seconds: float
    eager: float
    compiled: float


class CompiledStep:
    """A step that is compiled, or will be.

    Args:
        model: of :func:`onym.generation.weights.for_decoding`, not packed.
        slots: its buffers.
    """

    made = 0
    """How many this process has compiled."""

    def __init__(self, model: CausalLM, slots: Slots) -> None:
        step = _Step(model)
        self._step, self._slots = step, slots
        self._weights = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers())}
        self._function: Any = None

    def __call__(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Logits [slots, vocab] of tokens [slots] at positions [slots], the highest below ``length``."""
        keys, values = self._slots.held(max(length, 2 * ROUND))
        logits: Tensor = self._function([*self._weights.values(), tokens, positions, *keys, *values])[0]
        return logits

    @functools.cached_property
    def _path(self) -> Path:
        """Named by everything that the function depends on; what depends on the machine is in the folder's name."""
        shapes = {name: [list(weight.shape), str(weight.dtype)] for name, weight in self._weights.items()}
        buffers = [list(self._slots.keys.shape[2:]), str(self._slots.keys.dtype), str(self._slots.keys.device)]
        key = json.dumps([self._step.model.config.to_dict(), shapes, buffers, _source()], sort_keys=True, default=str)
        folder = open_folder() / "decode"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt2"

    def recall(self) -> Measured | None:
        """What is known of it here; None where it was never compiled."""
        with suppress(OSError, ValueError, TypeError, StorageError):
            return Measured(**json.loads(self._path.with_suffix(".json").read_text(encoding="utf-8")))
        return None

    def remember(self, measured: Measured) -> None:
        """For the next process."""
        with suppress(OSError, StorageError):
            replace_file(self._path.with_suffix(".json"), json.dumps(asdict(measured)))

    def load(self) -> bool:
        """Take the function from the cache; whether it is there."""
        with suppress(Exception):  # whatever is wrong with it: it is made anew
            if self._path.exists():
                self._function = _loaded(self._path)
                os.utime(self._path)
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
            replace_file(self._path, Path(made).read_bytes())
        self._function = _loaded(self._path)


def _loaded(path: Path) -> Any:
    """A function of a list of all tensors, in the order of the arguments, to a list with the logits.

    ``aoti_load_package`` does the same, and imports the compiler first, which takes 2.4 seconds.
    """
    aoti: Any = torch._C._aoti
    return aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).boxed_run


@functools.cache
def _source() -> str:
    """A hash of the code that the function is made of."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*here.glob("*.py"), *(here.parent / "gpt").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
