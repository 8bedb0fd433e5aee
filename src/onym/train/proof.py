"""Prove a checkpoint: a fresh process opens it, without torch.compile, and does with it what the trained model did.

The process that trained is the worst witness for what it kept: its memory holds the weights whether or not the files do.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from onym.errors import CheckpointError, is_out_of_memory

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
    token_cache: Path,
    *,
    batch_size: int,
    eval_batches: int,
    device: str,
    precision: str,
    rounded: bool = False,
) -> Proof:
    """Run the proof in a fresh process.

    Args:
        checkpoint: of the run.
        expected: what the trained model's held-out loss is.
        token_cache: the folder with the run's tokens.
        batch_size, eval_batches, device, precision: as the training process measures.
        rounded: whether it computed with the blocks' weights in bf16, and not with those that it keeps.

    Raises:
        CheckpointError: the process failed; its last line says why.
        MemoryError: it has not the memory for all of the model.
    """
    request = {
        "checkpoint": str(checkpoint),
        "token_cache": str(token_cache),
        "batch_size": batch_size,
        "eval_batches": eval_batches,
        "device": device,
        "precision": precision,
        "rounded": rounded,
    }
    command = [sys.executable, "-P", "-m", "onym.train.proof", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode in (_NO_MEMORY, -getattr(signal, "SIGKILL", 9)):  # the second is what a system does that has no more
        raise MemoryError
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise CheckpointError(f"The checkpoint '{checkpoint}' did not open in a fresh process: {last}")
    held_out, sample = json.loads(done.stdout.splitlines()[-1])
    return Proof(held_out, expected, sample)


def _open_and_measure(request: dict[str, object]) -> tuple[float, str]:
    """What the fresh process does: the held-out loss and a sample of the model in the checkpoint."""
    import torch

    from onym.api import load_checkpoint
    from onym.data.tokenizer import Tokenizer
    from onym.data.tokens import open_tokens
    from onym.format.manifest import TOKENIZER
    from onym.format.reader import read_checkpoint
    from onym.gpt.gpt2 import GPT
    from onym.train.evaluate import held_out_loss
    from onym.train.precision import choose_compute
    from onym.train.sample import write_sample

    compute = choose_compute(str(request["device"]), str(request["precision"]))
    checkpoint = read_checkpoint(str(request["checkpoint"]))
    model = load_checkpoint(checkpoint, device=compute.device)
    assert isinstance(model, GPT)
    if request["rounded"]:
        with torch.no_grad():
            for parameter in model.trf_blocks.parameters():
                parameter.copy_(parameter.bfloat16())
    tokens = open_tokens(Path(str(request["token_cache"])))
    assert tokens is not None, "the token cache is gone"
    batch_size, limit = int(str(request["batch_size"])), int(str(request["eval_batches"]))
    loss = held_out_loss(model, tokens.held_out, batch_size, limit, compute)
    text = checkpoint.text(TOKENIZER)
    assert text is not None
    tokenizer = Tokenizer.from_json(text)
    return loss, write_sample(model, tokenizer, tokens.held_out)


def main(request: str) -> int:
    """What the fresh process is started as; what it found is printed as JSON."""
    try:
        print(json.dumps(_open_and_measure(json.loads(request))))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _NO_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
