"""Onym: train a GPT at compiled speed; keep the model, not its wrappers.

The library, in one screen. Every function takes a model as it is, plain, compiled or wrapped; names in files are always the
model's own. The command line is ``onym --help``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onym.adapters.lora import LoRA as LoRA
    from onym.api import load as load
    from onym.api import load_model as load_model
    from onym.api import load_state as load_state
    from onym.api import open_checkpoint as open_checkpoint
    from onym.api import save as save
    from onym.api import save_state as save_state
    from onym.api import stored_optimizer_state as stored_optimizer_state
    from onym.checkpoint.checkpointer import Checkpointer as Checkpointer
    from onym.checkpoint.checkpointer import Restored as Restored
    from onym.checkpoint.dcp import DCPWriter as DCPWriter
    from onym.convert.dcp_reader import DCPReader as DCPReader
    from onym.convert.registry import register_format as register_format
    from onym.errors import OnymError as OnymError
    from onym.generation.scoring import Score as Score
    from onym.generation.scoring import score as score
    from onym.generation.write import generate as generate
    from onym.gpt.config import GPTConfig as GPTConfig
    from onym.gpt.decoder import Decoder as Decoder
    from onym.gpt.decoder_config import DecoderConfig as DecoderConfig
    from onym.gpt.gpt2 import GPT as GPT
    from onym.names.mismatch import MismatchError as MismatchError
    from onym.names.wrappers import register_wrapper as register_wrapper
    from onym.names.wrappers import unwrap as unwrap
    from onym.state.architectures import register_architecture as register_architecture
    from onym.state.model import LoadReport as LoadReport
    from onym.state.model import load_state_dict as load_state_dict
    from onym.state.model import state_dict as state_dict
    from onym.state.optimizer import OptimizerReport as OptimizerReport
    from onym.state.optimizer import load_optimizer_state as load_optimizer_state
    from onym.state.optimizer import optimizer_state as optimizer_state

_WHERE = {
    "adapters.lora": ("LoRA",),
    "api": ("load", "load_model", "load_state", "open_checkpoint", "save", "save_state", "stored_optimizer_state"),
    "checkpoint.checkpointer": ("Checkpointer", "Restored"),
    "checkpoint.dcp": ("DCPWriter",),
    "convert.dcp_reader": ("DCPReader",),
    "convert.registry": ("register_format",),
    "errors": ("OnymError",),
    "generation.scoring": ("Score", "score"),
    "generation.write": ("generate",),
    "gpt.config": ("GPTConfig",),
    "gpt.decoder": ("Decoder",),
    "gpt.decoder_config": ("DecoderConfig",),
    "gpt.gpt2": ("GPT",),
    "names.mismatch": ("MismatchError",),
    "names.wrappers": ("register_wrapper", "unwrap"),
    "state.architectures": ("register_architecture",),
    "state.model": ("LoadReport", "load_state_dict", "state_dict"),
    "state.optimizer": ("OptimizerReport", "load_optimizer_state", "optimizer_state"),
}
_MODULE_OF = {name: f"onym.{module}" for module, names in _WHERE.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: ``onym --help`` needs no torch, and the library needs no GPT."""
    if name == "__version__":
        from onym.version import own_version

        return own_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
