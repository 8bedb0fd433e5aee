"""Accelerate's ``save_state`` and ``load_state``, durable and under the models' own names.

``save_state(accelerator, "run/step-100")`` in place of ``accelerator.save_state("run/step-100")``, and so for loading.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from onym.api import load
from onym.checkpoint.background import BackgroundTask
from onym.convert.clean_names import clean_names
from onym.errors import CheckpointError, ConfigError, StorageError, storage_error
from onym.integrations.sealed import newest_sealed, require_sealed, seal
from onym.state.collectives import run_on_all_ranks
from onym.storage.disk import disk
from onym.storage.local import make_folder, put_in_place

_sealing = BackgroundTask("the last checkpoint of Accelerate")


def save_state(accelerator: Accelerator, path: str | os.PathLike[str], *, background: bool = True, **options: Any) -> None:
    """Save models, optimizers, schedulers, samplers and random number generators; every process calls this.

    Args:
        accelerator: with everything prepared.
        path: a folder; one that is there is replaced when the new one is complete and durable.
        background: a new folder is sealed in a thread, and :func:`last_checkpoint` passes it over until then. Otherwise, where
            a folder is replaced, and in several processes, it is durable when this returns.
        options: those of ``accelerator.save_state``.

    Raises:
        StorageError: the disk refused, in this save or in the background after the one before; what was there is untouched.
    """
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ConfigError(
            "automatic_checkpoint_naming lets Accelerate name and delete the folders: set it to False in ProjectConfiguration, "
            "and give each save_state a path, as 'run/step-100'."
        )
    place = Path(path).absolute()
    unfinished = place.with_name(f".{place.name}.unfinished")
    everywhere = accelerator.project_configuration.save_on_each_node
    writes = accelerator.is_local_main_process if everywhere else accelerator.is_main_process

    def prepare() -> None:
        _sealing.wait()
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
            make_folder(place.parent)

    def finish() -> None:
        if writes and background and accelerator.num_processes == 1 and not place.exists():
            disk.rename(unfinished, place)
            _sealing.start(lambda: _seal(place))
        elif writes:
            seal(unfinished)
            put_in_place(unfinished, place)

    hook = accelerator.register_save_state_pre_hook(lambda models, weights, _: _clean(models, weights, options))
    try:
        for work in (prepare, lambda: accelerator.save_state(str(unfinished), **options), finish):
            run_on_all_ranks(work, error=StorageError)
    except OSError as error:
        raise storage_error("write a checkpoint", place, error) from error
    finally:
        hook.remove()
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)  # the old one, or what failed


def load_state(accelerator: Accelerator, path: str | os.PathLike[str], **options: Any) -> None:
    """Load what :func:`save_state` saved, after every byte was checked; every process calls this.

    Args:
        accelerator: with the same models and optimizers prepared, compiled or not.
        path: the folder.
        options: those of ``accelerator.load_state``.

    Raises:
        CheckpointError: it is missing, unfinished or damaged; nothing was changed.
        MismatchError: a model is another one; says how.
    """
    place = Path(path).absolute()

    def check() -> None:
        _sealing.wait()
        if accelerator.is_local_main_process:
            require_sealed(place)

    run_on_all_ranks(check)
    hook = accelerator.register_load_state_pre_hook(lambda models, _: _load(models, place, options.get("strict", True)))
    try:
        accelerator.load_state(str(place), **options)
    finally:
        hook.remove()


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest folder in ``folder`` whose name ends in a number (``step-100``) and that is as it was saved; None without one.

    Newer ones that are damaged are warned of.
    """
    _sealing.wait()
    found = newest_sealed(Path(folder), r"[^.].*?(\d+)")
    return None if found is None else str(found)


def _seal(place: Path) -> None:
    try:
        seal(place)
    except StorageError:
        if place.exists():  # else it was deleted meanwhile
            raise


def _clean(models: list[nn.Module], weights: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Called by Accelerate before it writes."""
    for number, (model, state) in enumerate(zip(models, weights, strict=False)):
        is_parallel = isinstance(getattr(model, "_orig_mod", model), DataParallel | DistributedDataParallel)
        names, _ = clean_names(state, roots=("module",) if is_parallel else ())
        weights[number] = {names[name]: value for name, value in state.items()}
        if options.get("safe_serialization", True):  # such a file has each tensor once, and Accelerate would refuse tied ones
            first = {(value.data_ptr(), value.shape, value.stride()): name for name, value in reversed(weights[number].items())}
            once = set(first.values())
            weights[number] = {name: value for name, value in weights[number].items() if name in once or not value.numel()}


def _load(models: list[nn.Module], folder: Path, strict: bool) -> None:
    """Called by Accelerate before it loads; what is taken from the list, it does not load. FSDP's are not in it."""
    for number, model in enumerate(models):
        suffix = f"_{number}" if number else ""
        names = (f"model{suffix}.safetensors", f"pytorch_model{suffix}.bin")
        file = next((folder / name for name in names if (folder / name).exists()), None)
        if file is None:
            raise CheckpointError(
                f"'{folder}' has {number} models, and {len(models)} are prepared: prepare those that were saved."
            )
        load(file, into=model, strict=strict)
    models.clear()
