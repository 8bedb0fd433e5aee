"""Origo: train a GPT at compiled speed; keep the model, not its wrappers.

The library, in one screen. Every function takes a model as it is, plain, compiled or wrapped; names in files are always the
model's own. The command line is ``origo --help``.
"""

from typing import TYPE_CHECKING, Any

from origo.checkpointer import Checkpointer, Restored
from origo.errors import OrigoError
from origo.models.config import GPTConfig
from origo.models.gpt import GPT
from origo.models.registry import register_architecture
from origo.naming.mismatch import MismatchError
from origo.naming.wrappers import register_wrapper, unwrap
from origo.persist import load, load_model, open_checkpoint, save
from origo.state.model import LoadReport, load_state_dict, state_dict
from origo.state.optimizer import OptimizerReport, load_optimizer_state, optimizer_state

if TYPE_CHECKING:
    from origo.store.distributed import DCPReader, DCPWriter

__all__ = [
    "Checkpointer",
    "DCPReader",
    "DCPWriter",
    "GPT",
    "GPTConfig",
    "LoadReport",
    "MismatchError",
    "OptimizerReport",
    "OrigoError",
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
        from origo.store import distributed

        return getattr(distributed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
