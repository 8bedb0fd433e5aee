"""Onym: train a GPT at compiled speed; keep the model, not its wrappers.

The library, in one screen. Every function takes a model as it is, plain, compiled or wrapped; names in files are always the
model's own. The command line is ``onym --help``.
"""

from typing import TYPE_CHECKING, Any

from onym.api import load, load_model, open_checkpoint, save
from onym.checkpoint.checkpointer import Checkpointer, Restored
from onym.errors import OnymError
from onym.gpt.config import GPTConfig
from onym.gpt.gpt2 import GPT
from onym.gpt.registry import register_architecture
from onym.names.mismatch import MismatchError
from onym.names.wrappers import register_wrapper, unwrap
from onym.state.model import LoadReport, load_state_dict, state_dict
from onym.state.optimizer import OptimizerReport, load_optimizer_state, optimizer_state

if TYPE_CHECKING:
    from onym.checkpoint.dcp import DCPReader, DCPWriter

__all__ = [
    "Checkpointer",
    "DCPReader",
    "DCPWriter",
    "GPT",
    "GPTConfig",
    "LoadReport",
    "MismatchError",
    "OptimizerReport",
    "OnymError",
    "Restored",
    "load",
    "load_model",
    "load_optimizer_state",
    "load_state_dict",
    "open_checkpoint",
    "optimizer_state",
    "register_architecture",
    "register_wrapper",
    "save",
    "state_dict",
    "unwrap",
]


def __getattr__(name: str) -> Any:
    """These need torch.distributed.checkpoint, which takes a while to import, and is not needed by anything else."""
    if name in ("DCPReader", "DCPWriter"):
        from onym.checkpoint import dcp

        return getattr(dcp, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
