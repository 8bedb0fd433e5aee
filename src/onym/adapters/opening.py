"""What adapters a checkpoint holds, in any layout; and into a live model with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from onym.adapters import book, peft_files
from onym.adapters.lora import ARCHITECTURE, LoRA, LoRAConfig
from onym.adapters.stored import StoredAdapter, fitted, layers_of, require_whole
from onym.convert.opening import open_any
from onym.errors import CheckpointError, ConfigError
from onym.format.manifest import parse_json
from onym.format.reader import Checkpoint
from onym.names.wrappers import unwrap
from onym.state.architectures import describe_model
from onym.state.model import DtypePolicy, LoadReport, describe, load_state_dict, named_state


def stored_adapter(checkpoint: Checkpoint, alpha: float | None = None) -> StoredAdapter | None:
    """The adapters in a checkpoint; None of one that holds none, or that holds them beside a whole model of its own.

    Args:
        checkpoint: as :func:`onym.convert.opening.open_any` opens it with ``complete=False``.
        alpha: what the book's class multiplies the product by, which its file does not say.

    Raises:
        CheckpointError: they are incomplete, or of a kind that is not read here.
    """
    if checkpoint.architecture == ARCHITECTURE:
        adapter = _ours(checkpoint)
    elif checkpoint.origin is not None and checkpoint.origin.format is None:
        contents = checkpoint.origin.contents
        if (text := contents.texts.get(peft_files.CONFIG_FILE)) is not None and peft_files.is_adapter(contents.tensors.names):
            config, tensors, base = peft_files.read_settings(text, contents.path, contents.tensors)
            adapter = StoredAdapter(contents.path, "peft's", tensors, config, checkpoint, base)
        elif book.is_adapted(contents.tensors.names):
            return book.read(checkpoint, alpha)
        else:
            return None
    else:
        return None
    if alpha is not None:
        raise ConfigError(f"'{checkpoint.path}' states its alpha itself: leave {alpha:g} out.")
    require_whole(adapter.path, adapter.tensors, adapter.config)
    return adapter


def _ours(checkpoint: Checkpoint) -> StoredAdapter:
    """Ours: a checkpoint, a file, or a folder in peft's layout."""
    text = checkpoint.text(peft_files.CONFIG_FILE)
    if text is not None:
        config, tensors, base = peft_files.read_settings(text, checkpoint.path, checkpoint.model)
        ours = checkpoint.text(peft_files.OURS_FILE)
        if ours is not None:
            config = replace(config, base=_config(parse_json(ours, f"'{checkpoint.path}'"), checkpoint.path).base)
        return StoredAdapter(checkpoint.path, "peft's, written by Onym", tensors, config, checkpoint, base)
    if checkpoint.config is None:
        raise CheckpointError(f"'{checkpoint.path}' holds adapters without their settings: it cannot be used.")
    return StoredAdapter(checkpoint.path, "Onym's", checkpoint.model, _config(checkpoint.config, checkpoint.path), checkpoint)


def _config(values: Any, path: Path) -> LoRAConfig:
    try:
        return LoRAConfig.from_dict(values)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The settings of the adapters in '{path}' are damaged: {error}") from error


def apply_stored(path: str | Path, model: nn.Module) -> LoRA:
    """See :meth:`onym.LoRA.open`."""
    adapter = stored_adapter(open_any(path, complete=False).checkpoint)
    if adapter is None:
        raise CheckpointError(f"'{path}' holds no adapters: give what onym.save(lora, …), peft or onym train wrote.")
    found = fitted_to(model, adapter)
    lora = LoRA.apply_to(model, found.layers, found.config)
    load_state_dict(lora, found.tensors.state(), dtype="cast")
    return lora


def load_adapter(
    adapter: StoredAdapter,
    lora: LoRA,
    *,
    strict: bool = True,
    dtype: DtypePolicy = "exact",
    verify: bool = True,
    skip_mismatched: Any = (),
) -> LoadReport:
    """Load stored adapters into those of a model.

    Raises:
        MismatchError: they are of other layers, or of another rank.
        CheckpointError: they are scaled otherwise, or belong to another base.
    """
    found = fitted_to(lora.model, adapter)
    recorded, live = found.config.base or {}, lora.config.base or {}
    if recorded.get("identity") and live.get("identity") and recorded["identity"] != live["identity"]:
        raise CheckpointError(
            f"'{adapter.path}' belongs to the model '{recorded.get('path')}', and these adapters to '{live.get('path')}': load "
            "them into the model that they were trained on."
        )
    live_layers = layers_of(named_state(lora))
    for layer in found.layers:
        was, now = found.config.scaling_of(layer), lora.config.scaling_of(layer)
        if abs(was - now) > 1e-6 * was and layer in live_layers:
            raise CheckpointError(
                f"'{adapter.path}' was trained with {found.config.said_of(layer)} ({layer}), and these adapters have "
                f"{lora.config.said_of(layer)}: onym.LoRA.open(path, model) takes all from the file."
            )
    state = found.tensors.state(verify=verify)
    return load_state_dict(lora, state, strict=strict, dtype=dtype, skip_mismatched=skip_mismatched)


def fitted_to(model: nn.Module, adapter: StoredAdapter) -> StoredAdapter:
    """The adapter under the names of a live model's layers."""
    shapes: Mapping[str, Any] = {name: shape for name, (shape, _) in describe(named_state(model)).items()}
    real = unwrap(model)
    turned = LoRA.conv1d_layers(model)
    found = fitted(
        replace(adapter, config=replace(adapter.config, transposed=turned)),
        shapes,
        f"this {type(real).__name__}",
        describe_model(real)[0],
    )
    return replace(found, config=replace(found.config, transposed=turned))
