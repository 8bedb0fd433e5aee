"""Lightning's Trainer with Onym's files: ``Trainer(plugins=[keep], callbacks=[keep])``, where ``keep = OnymCheckpointIO()``.

As a plugin it writes and reads the checkpoints of ``ModelCheckpoint``; the names in them have no ``_orig_mod.``. As a callback
it also restores the random number generators, and gives a module whatever names it has now: a run that began compiled may go
on without. ``Fabric(plugins=[keep])`` takes the plugin alone. Lightning is imported here; ``pytorch_lightning``, where the
program has imported that one.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from onym.api import load_state, save_state
from onym.convert.clean_names import clean_names
from onym.errors import CheckpointError
from onym.format.safetensors import begins_file
from onym.state.collectives import all_gather_object, get_rank
from onym.state.rng import load_rng_state, rng_state
from onym.storage.paths import as_path, is_local

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
    from pytorch_lightning import Callback, LightningModule, Trainer

_STATE, _NAMES, _RNG, _VERSIONS = "state_dict", "onym_names", "onym_rng", "onym_versions"
_SETTINGS = ("hyper_parameters", "datamodule_hyper_parameters")
_KEYS = (str, int, float, bool, type(None))
_TYPES = ("hparams_type", "datamodule_hparams_type")


class OnymCheckpointIO(TorchCheckpointIO, Callback):
    """A checkpoint is one durable, verified file, which ``onym.load(path, into=module)`` opens too.

    Checkpoints that Lightning wrote itself are read as before, so that a run can change over. Settings
    (``save_hyperparameters``) of other classes than plain ones are kept as their text, with a warning.
    """

    def __init__(self) -> None:
        self._rng: list[Any] | None = None
        self._hook: Any = None
        self._warned = False

    # --- the plugin

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: something in it is no plain state; says where and what.
            StorageError: the disk refused; an earlier file of this name is untouched.
        """
        if storage_options is not None:
            raise TypeError("OnymCheckpointIO takes no storage_options: give save_checkpoint the path alone.")
        place = as_path(path)
        if is_local(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in checkpoint.items() if key not in _TYPES}
        if "optimizer_states" in content and _RNG not in content and not self._warned:
            self._warned = True
            warnings.warn(
                "The random number generators are not in the checkpoint, and a resumed run will differ: give the Trainer this "
                "plugin as a callback too: keep = OnymCheckpointIO(); Trainer(plugins=[keep], callbacks=[keep]).",
                stacklevel=2,
            )
        renamed: dict[str, dict[str, str]] = {}
        content = _clean(content, "", renamed)
        if renamed:
            content[_NAMES] = renamed
        for key in _SETTINGS:
            if key in content:
                content[key] = _plain(content[key], key)
        if versions := getattr(checkpoint.get(_STATE), "_metadata", None):  # of the layouts of modules, which they ask for
            content[_VERSIONS] = {name: dict(version) for name, version in versions.items()}
        save_state(content, place)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, Onym's or Lightning's own. Tensors of Onym's are on the CPU."""
        place = as_path(path)
        if is_local(place) and not place.exists():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        if is_local(place) and not _is_onyms(place):
            options = {} if map_location is None else {"map_location": map_location}
            found: dict[str, Any] = super().load_checkpoint(str(path), weights_only=weights_only, **options)
            return found
        content: Any = load_state(place)
        if not isinstance(content, dict):
            raise CheckpointError(f"'{path}' holds a {type(content).__name__}, not a checkpoint of Lightning's.")
        renamed, versions = content.pop(_NAMES, {}), content.pop(_VERSIONS, {})
        content = _rename(content, "", renamed) if renamed else content
        if versions:
            content[_STATE] = OrderedDict(content[_STATE])
            content[_STATE]._metadata = OrderedDict(versions)
        return dict(content)

    # --- the callback

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module load names that it had with other wrappers."""
        writer = trainer.strategy.checkpoint_io
        if not isinstance(getattr(writer, "checkpoint_io", writer), OnymCheckpointIO):  # AsyncCheckpointIO has one inside
            warnings.warn(
                "Lightning writes the checkpoints itself, neither durably nor with clean names: give the Trainer this callback "
                "as a plugin too: keep = OnymCheckpointIO(); Trainer(plugins=[keep], callbacks=[keep]).",
                stacklevel=2,
            )
        self.teardown(trainer)  # of a run that failed
        self._rng = None
        self._hook = pl_module.register_load_state_dict_pre_hook(_to_its_names)  # type: ignore[no-untyped-call]

    def teardown(self, trainer: Trainer | None = None, pl_module: LightningModule | None = None, stage: str = "") -> None:
        """Take the hook away again."""
        if self._hook is not None and trainer is not None:
            self._hook.remove()
            self._hook = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random number generators of each rank."""
        tensors, values = rng_state()
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}  # torch does not unpickle tensors of uint32
        checkpoint[_RNG] = [
            ({name: torch.from_numpy(array) for name, array in each.items()}, values)
            for each, values in all_gather_object((arrays, values), trainer.world_size > 1)
        ]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the random number generators."""
        self._rng = checkpoint.get(_RNG)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random number generators, after what Lightning draws before it trains.

        It has made the iterator of the epoch by then, which draws the order of the batches: one is made anew. A loader with a
        state of its own, which has it already, is left.
        """
        if self._rng is None or get_rank() >= len(self._rng):
            return
        load_rng_state(*self._rng[get_rank()])
        self._rng = None
        fetcher, loaders = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        if fetcher is not None and loaders is not None and not any(hasattr(each, "state_dict") for each in loaders.flattened):
            iter(fetcher)


def _is_onyms(path: Path) -> bool:
    with path.open("rb") as file:
        return begins_file(file.read(9), path.stat().st_size)


def _clean(value: Any, place: str, renamed: dict[str, dict[str, str]]) -> Any:
    """A state without wrappers in its names; notes in ``renamed`` the names that were others, by the place of their dict."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return value
    try:
        names, _ = clean_names(value, roots=())
    except CheckpointError:  # two would be one: it is a model and a wrapped one
        names = {name: name for name in value}
    if others := {clean: name for name, clean in names.items() if name != clean}:
        renamed[place] = others
    return {names[name]: _clean(each, f"{place}/{names[name]}", renamed) for name, each in value.items()}


def _rename(value: Any, place: str, renamed: Mapping[str, Mapping[str, str]]) -> Any:
    """The other way round."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return value
    names = renamed.get(place, {})
    return {names.get(key, key): _rename(each, f"{place}/{key}", renamed) for key, each in value.items()}


def _to_its_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename a state, in place, to what the module calls its parameters now; with a prefix, it is in an averaged model."""
    own = {prefix + name for name in module.state_dict(keep_vars=True)}
    stored = [name for name in state if name.startswith(prefix)]
    if own.issuperset(stored):
        return
    by_clean = {clean: name for name, clean in clean_names(own, roots=())[0].items()}
    for name, clean in clean_names(stored, roots=())[0].items():
        if name not in own and clean in by_clean:
            state[by_clean[clean]] = state.pop(name)


def _plain(value: Any, place: str) -> Any:
    """Settings as plain values."""
    if isinstance(value, Mapping):
        return {key if type(key) in _KEYS else str(key): _plain(each, f"{place}.{key}") for key, each in value.items()}
    if isinstance(value, Namespace):
        return _plain(vars(value), place)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic) and value.dtype.kind in "biufSU":
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_plain(each, f"{place}.{number}") for number, each in enumerate(value))
    if (
        value is None
        or type(value) in (bool, int, float, str, bytes)
        or isinstance(value, torch.Tensor | torch.dtype | torch.device | np.ndarray)
    ):
        return value
    if type(value).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(value)
    warnings.warn(f"{place} is a {type(value).__name__}, and is kept as its text.", stacklevel=2)
    return str(value)
