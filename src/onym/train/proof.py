"""Prove a checkpoint: a fresh process opens it, without torch.compile, and evaluates it as the trained model was.

The process that trained cannot prove what it saved: its memory holds the weights whether or not the files do.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onym.errors import CheckpointError, is_out_of_memory
from onym.train.fresh_process import FreshProcess, ProcessFailed, answering, command_of

if TYPE_CHECKING:
    from onym.data.examples import Examples
    from onym.data.sources import Sources

_NO_MEMORY = 3  # exit code
_TOLERANCE = 1e-4  # nats; the same machine gives the same bits, another thread count rounds otherwise


@dataclass(frozen=True)
class Proof:
    """What the fresh process found."""

    held_out: float
    """Held-out loss of the model that it loaded, in nats a token."""
    expected: float
    """That of the trained model, measured in the process that trained it."""
    sample: str

    @property
    def holds(self) -> bool:
        """Whether the losses agree."""
        return abs(self.held_out - self.expected) <= _TOLERANCE


def prove(
    checkpoint: Path,
    expected: float,
    sources: Sources | Examples,
    *,
    batch_size: int,
    eval_batches: int,
    device: str,
    precision: str,
    rounded: bool = False,
    document_mask: bool = False,
    deterministic: bool = False,
) -> Proof:
    """Run the proof in a fresh process.

    Args:
        checkpoint: of the run.
        expected: what the trained model's held-out loss is.
        sources: the run's tokens.
        batch_size, eval_batches, device, precision: as the training process measures.
        rounded: whether it computed with block weights rounded to bf16, unlike those in the checkpoint.
        document_mask: whether it kept documents apart.
        deterministic: whether it computed with algorithms that give the same bits each time; a GPU may choose others else.

    Raises:
        CheckpointError: the process failed; its last line gives the reason.
        MemoryError: it has no memory for all of the model.
    """
    request = {
        "checkpoint": str(checkpoint),
        "sources": sources.to_list(),
        "batch_size": batch_size,
        "eval_batches": eval_batches,
        "device": device,
        "precision": precision,
        "rounded": rounded,
        "document_mask": document_mask,
        "deterministic": deterministic,
    }
    with FreshProcess(command_of("onym.train.proof", request)) as process:
        try:
            answer = process.receive()
        except ProcessFailed as failed:
            # SIGKILL is what a system sends that has no more memory.
            if failed.code in (_NO_MEMORY, -getattr(signal, "SIGKILL", 9)):
                raise MemoryError from failed
            reason = failed.last_line or "it gave no reason"
            raise CheckpointError(f"The checkpoint '{checkpoint}' did not open in a fresh process: {reason}") from failed
    assert answer is not None
    return Proof(answer["held_out"], expected, answer["sample"])


def _open_and_measure(request: dict[str, Any]) -> tuple[float, str]:
    """What the fresh process does: the held-out loss and a sample of the model in the checkpoint."""
    import torch

    from onym.adapters.lora import ARCHITECTURE, LoRA
    from onym.api import load_checkpoint
    from onym.data.tokenizer import Tokenizer
    from onym.format.manifest import TOKENIZER
    from onym.format.reader import read_checkpoint
    from onym.gpt.causal_lm import CausalLM
    from onym.train.evaluate import MAIN, held_out_losses, open_sources, sample_of, separator_of
    from onym.train.init_from import base_under
    from onym.train.precision import choose_compute
    from onym.train.trained import round_linears

    compute = choose_compute(str(request["device"]), str(request["precision"]))
    compute.set_deterministic(bool(request["deterministic"]))
    checkpoint = read_checkpoint(str(request["checkpoint"]))
    is_adapter = checkpoint.architecture == ARCHITECTURE
    opened = base_under(checkpoint).checkpoint if is_adapter else checkpoint
    model = load_checkpoint(opened, device=compute.device)
    assert isinstance(model, CausalLM)
    if is_adapter:  # not merged, so that it computes as it was trained, to the bit
        if request["rounded"]:
            round_linears(model)
        LoRA.open(checkpoint.path, model)
        model.eval()
    elif request["rounded"]:
        with torch.no_grad():
            for parameter in model.trf_blocks.parameters():
                parameter.copy_(parameter.bfloat16())
    sources = open_sources(request["sources"])
    batch_size, limit = int(str(request["batch_size"])), int(str(request["eval_batches"]))
    text = checkpoint.text(TOKENIZER)
    assert text is not None
    tokenizer = Tokenizer.from_json(text)
    separator = separator_of(sources, tokenizer, document_mask=bool(request["document_mask"]))
    loss = held_out_losses(model, sources, batch_size, limit, compute, separator=separator)[MAIN]
    if model.config.labels:
        return loss, ""
    with compute.autocast() if is_adapter and request["rounded"] else nullcontext():
        return loss, sample_of(model, tokenizer, sources, separator)


def main(request: str) -> int:
    """What the fresh process is started as."""
    answer = answering()
    try:
        held_out, sample = _open_and_measure(json.loads(request))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _NO_MEMORY
    answer(held_out=held_out, sample=sample)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
