"""One decoding step as a function of tensors alone, to be compiled or captured, and what was measured of it on this machine.

What it took and gave is a file, beside the function where that is one::

    <cache>/compiled/<key>/decode/<hash>.json    {"seconds": 40.6, "eager": 0.024, "compiled": 0.0127}
"""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from onym.compile.cache import open_folder
from onym.errors import StorageError
from onym.generation.cache import OneStep, Slots
from onym.gpt.causal_lm import CausalLM
from onym.storage.paths import replace_file


class Step(nn.Module):
    """From a token of each slot [slots] at its position [slots] to the logits [slots, vocab]; keys and values are written to.

    Args:
        model: of :func:`onym.generation.weights.for_decoding`, not packed.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        hidden = self.model.hidden_states(tokens[:, None], OneStep(keys, values, positions))
        return self.model.out_head(hidden)[:, 0]  # type: ignore[no-any-return]  # [slots, vocab]


def weights_of(step: Step) -> dict[str, Tensor]:
    """All tensors that it reads besides its arguments, by name."""
    return {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers())}


@dataclass(frozen=True)
class Measured:
    """What compiling a step took, and what a step takes without and with that, in seconds."""

    seconds: float
    eager: float
    compiled: float


class Known:
    """What is known of a step, from one process to the next.

    Args:
        step: it.
        slots: the buffers that it writes to.
        kind: what else it depends on.
    """

    def __init__(self, step: Step, slots: Slots, kind: str = "") -> None:
        self._step, self._slots, self._kind = step, slots, kind

    @functools.cached_property
    def function(self) -> Path:
        """Where it is, compiled, by a name of all that it depends on; what depends on the machine is in the folder's name."""
        shapes = {name: [list(weight.shape), str(weight.dtype)] for name, weight in weights_of(self._step).items()}
        buffers = [list(self._slots.keys.shape[2:]), str(self._slots.keys.dtype), str(self._slots.keys.device)]
        key = json.dumps(
            [self._step.model.config.to_dict(), shapes, buffers, self._kind, _source()], sort_keys=True, default=str
        )
        folder = open_folder() / "decode"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt2"

    def recall(self) -> Measured | None:
        """What was measured here; None where it was never compiled."""
        with suppress(OSError, ValueError, TypeError, StorageError):
            return Measured(**json.loads(self.function.with_suffix(".json").read_text(encoding="utf-8")))
        return None

    def remember(self, measured: Measured) -> None:
        """For the next process."""
        with suppress(OSError, StorageError):
            replace_file(self.function.with_suffix(".json"), json.dumps(asdict(measured)))


@functools.cache
def _source() -> str:
    """A hash of the code that the function is made of."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*here.glob("*.py"), *(here.parent / "gpt").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
