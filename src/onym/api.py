"""One call each: save a model, load weights into one, or build one from what was saved.

The three practices as functions: save the original module's state (``save``), make sure that the structure matches (``load``),
save the complete model where programs switch between compiled and not (``save`` + ``load_model``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onym.adapters.exporting import save_folder
from onym.adapters.lora import LoRA
from onym.adapters.merging import merged_checkpoint
from onym.adapters.opening import load_adapter, stored_adapter
from onym.checkpoint.restore import stored_extra_state, stored_optimizer
from onym.convert.clean_names import clean_names
from onym.convert.opening import open_any, warn_of
from onym.convert.registry import Format
from onym.convert.sources import as_json
from onym.convert.translation import format_of, translated
from onym.errors import CheckpointError, ConfigError
from onym.format.manifest import CONFIG, MODEL
from onym.format.nested import read_state, write_state
from onym.format.pth import PICKLES, write_pth
from onym.format.reader import Checkpoint, require_path
from onym.format.tensors import TensorFile
from onym.format.writer import About, write_folder, write_safetensors
from onym.names.adapters import adapter_names
from onym.names.diagnose import diagnose
from onym.names.match import recover_names, renamed_state
from onym.names.mismatch import Cause, MismatchError, compare
from onym.names.wrappers import AVERAGE_COUNTER, require_module, unwrap
from onym.state.architectures import build_model, describe_model
from onym.state.materialise import materialise_meta
from onym.state.model import (
    DtypePolicy,
    LoadReport,
    describe,
    full_state_dict,
    load_state_dict,
    named_state,
    state_dict,
)
from onym.storage.paths import NO_MODELS, as_path, ending


def save(model: nn.Module, path: str | Path, *, merged: bool = False) -> None:
    """Save a model under its own names, plain or wrapped, durably: the file exists completely or not at all.

    The path's ending decides what is written:

    - ``.safetensors``: one file that every safetensors reader opens. The model's configuration, where its class is known,
      and each tensor's hash are in its header, so ``load_model`` and the check on loading work on it.
    - ``.pth``, ``.pt``, ``.th``, ``.pth.tar``, ``.bin``: a plain state dict for ``torch.load(path, weights_only=True)`` and
      ``load_state_dict(strict=True)``.
    - no ending, or one of a folder: a self-describing folder with ``model.safetensors``, ``config.json`` and a manifest.

    Args:
        model: any module. A tied tensor is stored once, with its further names; tensors may be on any device. Where FSDP2 has
            sharded it every process has to call this, and the first one writes the whole model.
        path: where to; a file there is replaced. A folder of an :class:`onym.LoRA` is in peft's layout.
        merged: of an :class:`onym.LoRA`, the model with its adapters merged instead of the adapters alone; the live model stays
            as it is.

    Raises:
        CheckpointError: the model has something that the format cannot hold.
        ConfigError: ``model`` is no module, or its configuration cannot be stored as JSON.
        StorageError: the disk refused; what was there before is untouched.

    >>> compiled = torch.compile(nn.Linear(2, 1))
    >>> save(compiled, "model.safetensors")
    >>> save(compiled, "model.pth")
    >>> list(torch.load("model.pth", weights_only=True))
    ['weight', 'bias']
    """
    require_module(model)
    path = _path(path)
    if merged and not isinstance(model, LoRA):
        raise ConfigError("merged=True is for an onym.LoRA; of a model with adapters in it, that is onym.LoRA.of(model).")
    state, mine_to_write = full_state_dict(state_dict(model))
    if merged and isinstance(model, LoRA):
        state, model = model.merged_state(), model.model
    if not mine_to_write:
        return
    architecture, config = describe_model(unwrap(model))
    kind = ending(path)
    if kind == ".safetensors":
        write_safetensors(path, state, architecture, config)
    elif kind in PICKLES:
        write_pth(path, state)
    elif kind.endswith(NO_MODELS):
        raise ConfigError(f"A model cannot be saved as '{kind}': end the path in .safetensors, .pth, or / for a folder.")
    elif isinstance(model, LoRA):
        save_folder(model, path, state)
    else:
        texts = {CONFIG: as_json(config)} if config is not None else {}
        write_folder(path, {MODEL: state}, texts, About(architecture))


def load(
    path: str | Path,
    into: nn.Module,
    *,
    strict: bool = True,
    dtype: DtypePolicy = "exact",
    skip_mismatched: str | Iterable[str] = (),
    verify: bool = True,
    part: str | None = None,
) -> LoadReport:
    """Copy saved weights into a model, plain or wrapped.

    Args:
        path: what ``save`` wrote, a run or checkpoint of ``onym train``, or another program's (docs/formats.md): any
            .safetensors file or state dict, sharded or within something else. Names that wrappers polluted (``_orig_mod.…``,
            ``module.…``) are matched to the model's own and listed in the report's ``renamed``. A GPT-2 in one layout (the
            book's, nanoGPT's, transformers') loads into a model of any other.
        into: the model; its tensors keep their identity, so an optimizer over them stays valid. Those on the meta device are
            given memory on the CPU, so that a large model is never there twice; build its optimizer afterwards.
        strict: refuse names that are missing or unexpected.
        dtype: ``"exact"`` refuses tensors of another dtype, ``"cast"`` converts and reports them.
        skip_mismatched: names, modules or patterns (``["head.*"]``) of tensors that stay as they are where their shapes differ:
            a head for another number of classes. All others are loaded; these are the report's ``skipped``.
        verify: check each tensor against its stored hash (BLAKE3, about 4 GB a second and core) before it is used. Sizes and
            structure are checked in any case.
        part: of a file with several models (``"state_dict_ema"``), which.

    Raises:
        CheckpointError: the file is missing, damaged, or would run code.
        MismatchError: it does not fit the model; nothing has been changed.

    >>> torch.save(torch.compile(nn.Linear(2, 1)).state_dict(), "polluted.pth")
    >>> report = load("polluted.pth", into=nn.Linear(2, 1))
    >>> report.renamed
    {'_orig_mod.weight': 'weight', '_orig_mod.bias': 'bias'}
    """
    require_module(into)
    found = _found(path, verify=verify, part=part, complete=False)
    if not _adapters_of(into) and (adapter := stored_adapter(found)) is not None:
        lora = into if isinstance(into, LoRA) else LoRA.of(into)
        if lora is not None:
            return load_adapter(adapter, lora, strict=strict, dtype=dtype, verify=verify, skip_mismatched=skip_mismatched)
        found = merged_checkpoint(found)
    return _load_into(found, into, strict=strict, dtype=dtype, skip_mismatched=skip_mismatched, verify=verify)


def load_model(
    path: str | Path,
    *,
    step: int | str = "latest",
    device: str | torch.device = "cpu",
    compile: bool = False,
    part: str | None = None,
    n_heads: int | None = None,
    rope_base: float | None = None,
    context_length: int | None = None,
    labels: Sequence[str] | None = None,
) -> nn.Module:
    """Build a model from what was saved, structure and weights, in evaluation mode.

    Args:
        path: a run, a checkpoint, a model folder or a .safetensors file that ``save`` wrote; or another program's GPT-2, Llama
            or Qwen, as the book's ``model.pth``, nanoGPT's ``ckpt.pt`` or a folder of transformers (docs/formats.md).
        step: of a run, ``"latest"`` (the newest good one) or a number.
        device: where to put it.
        compile: compile it in place (``model.compile()``), which changes no name.
        part: of a file with several models (``"state_dict_ema"``), which.
        n_heads: attention heads, for a file of another program's that does not say; otherwise heads of size 64 (of a wide
            Llama, 128) are assumed, with a warning.
        rope_base, context_length: of a Llama or Qwen, likewise; otherwise those of Llama 3.2 or Qwen3.
        labels: the names of a classifier's labels, in the order of its head's rows, for a file that does not hold them.

    Raises:
        CheckpointError: it is missing or damaged, or holds weights without a configuration.

    >>> import onym
    >>> save(onym.GPT(onym.GPTConfig.preset("nano", vocab_size=100)), "model.safetensors")
    >>> load_model("model.safetensors").config.vocab_size
    100
    """
    settings: dict[str, Any] = {"n_heads": n_heads, "rope_base": rope_base, "context_length": context_length}
    settings["labels"] = None if labels is None else [*labels]
    checkpoint = _found(path, step, part=part, settings=settings)
    warn_of(checkpoint)
    return load_checkpoint(checkpoint, device=device, compile=compile)


def save_state(state: Any, path: str | os.PathLike[str]) -> None:
    """Save nested dicts, lists and tuples in one file, durably: what a trainer keeps beside or instead of a model.

    Args:
        state: tensors, numpy arrays, numbers, text, bytes, booleans and None, in dicts, lists and tuples. Of several processes
            one calls this; sharded tensors go to :class:`onym.Checkpointer` or :class:`onym.DCPWriter`.
        path: where to, of any name; a file there is replaced. It is a .safetensors file, with hashes.

    Raises:
        CheckpointError: something else is in the state; says where and what.
        StorageError: the disk refused; what was there before is untouched.

    >>> save_state({"epoch": 3, "net": {"w": torch.ones(2)}, "best": (0.5, None)}, "last.ckpt")
    >>> load_state("last.ckpt")
    {'epoch': 3, 'net': {'w': tensor([1., 1.])}, 'best': (0.5, None)}
    """
    path = _path(path)
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder, and a state is one file: give a name in it, as '{path / 'state.ckpt'}'.")
    write_state(path, state)


def load_state(path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Load what :func:`save_state` saved; nothing is executed.

    Args:
        path: the file.
        verify: check each tensor against its hash.

    Returns:
        The same structure, with tensors on the CPU. A model in it loads with :func:`load` too, by the same path.

    Raises:
        CheckpointError: it is missing, damaged, or another file.
    """
    return read_state(_path(path), verify=verify)


def open_checkpoint(path: str | Path, *, step: int | str = "latest", part: str | None = None) -> Checkpoint:
    """Open anything that :func:`load` takes, without reading its tensors.

    Names are clean: without what wrappers put into them, and of a GPT-2 of another program's, those of ``onym.GPT``.

    The result has ``.names``, ``.config``, ``.tensor(name)`` (one tensor, read and checked now) and ``.verify()`` (every byte).

    Raises:
        CheckpointError: it is missing, or its structure is damaged.

    >>> save(nn.Linear(2, 1), "model.safetensors")
    >>> checkpoint = open_checkpoint("model.safetensors")
    >>> checkpoint.names, checkpoint.tensor("weight").shape
    (['weight', 'bias'], torch.Size([1, 2]))
    >>> checkpoint.verify()
    """
    return _found(path, step, part=part)


def stored_optimizer_state(
    path: str | Path, *, step: int | str = "latest", name: str = "optimizer"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state in a checkpoint, by parameter name, without a model or an optimizer: to look at, or to change.

    It goes into any optimizer over a model with these names by :func:`onym.load_optimizer_state`, which says what else may
    differ: parameters that were frozen when it was saved, groups that were split.

    Args:
        path: a checkpoint that :class:`onym.Checkpointer` wrote, the folder of its steps, or a run of ``onym train``.
        step: of several, ``"latest"`` (the newest good one) or a number.
        name: what it was saved under.

    Returns:
        As :func:`onym.optimizer_state`: ``{"state.<slot>.<parameter name>": tensor}``, checked, on the CPU, and a JSON object
        with the groups' hyperparameters and the values that are no tensors.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged, or holds no optimizer of this name.

    >>> import onym
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    >>> model(torch.ones(1, 2)).backward(); optimizer.step()
    >>> with onym.Checkpointer("run") as checkpointer:
    ...     _ = checkpointer.save(1, {"model": model, "optimizer": optimizer})
    >>> tensors, description = stored_optimizer_state("run")
    >>> list(tensors), description["groups"][0]["hyperparameters"]["lr"]
    (['state.momentum_buffer.weight'], 0.1)
    >>> unfrozen = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> onym.load_optimizer_state(model, unfrozen, tensors, description, accept=["added"]).fresh
    ['bias']
    """
    return stored_optimizer(_found(path, step, complete=False), name)


def load_checkpoint(checkpoint: Checkpoint, *, device: str | torch.device = "cpu", compile: bool = False) -> nn.Module:
    """:func:`load_model` of a checkpoint that is open already."""
    if checkpoint.config is None or checkpoint.architecture is None:
        origin = checkpoint.origin
        if origin is not None and origin.problem is not None:
            raise CheckpointError(origin.problem)
        if origin is not None and origin.not_ours is not None:
            raise CheckpointError(
                f"'{checkpoint.path}' is {origin.kind}, of which no model can be built here: {origin.not_ours}. Build "
                "its own model and use onym.load(path, into=model), or write it as plain safetensors (onym convert)."
            )
        raise CheckpointError(
            f"'{checkpoint.path}' holds weights without the structure they belong to: build the model and use "
            "onym.load(path, into=model), or register its class (onym.register_architecture) before saving it."
        )
    for name, value in checkpoint.config.items():  # or a hostile one would be built for hours
        if "layer" in name and isinstance(value, int) and value > len(checkpoint.model.shapes):
            raise CheckpointError(f"'{checkpoint.path}' is damaged: its configuration has {value:,} layers, its file has not.")
    try:
        model = build_model(checkpoint.architecture, checkpoint.config)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"No model can be built from the configuration in '{checkpoint.path}': {error}") from error
    try:
        _load_into(checkpoint, model, strict=True, dtype="cast", verify=True, device=device)
    except MismatchError as error:
        raise MismatchError(error.differences, [*error.causes, _OTHER_CALL]) from None
    model.to(device).eval()
    if compile:
        model.compile()
    return model


_OTHER_CALL = Cause(
    "This model was built from the configuration that is stored beside the tensors: to load into another one, or a part alone, "
    "use onym.load(path, into=model), which has strict=False and skip_mismatched=[…].",
    0,
)


def _load_into(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    strict: bool,
    dtype: DtypePolicy,
    verify: bool,
    skip_mismatched: str | Iterable[str] = (),
    device: str | torch.device = "cpu",
) -> LoadReport:
    known = named_state(model)
    state: dict[str, Any] = _stored(checkpoint, model, known).state(verify=verify)
    if not known.keys() <= state.keys():
        state |= stored_extra_state(checkpoint)
    spare = [name for name in (AVERAGE_COUNTER,) if name in state and name not in known]  # the model itself is all there
    for name in spare:
        del state[name]
    renamed = _adapter_in(state, known, model) or recover_names(state, known)
    state = renamed_state(state, renamed)
    base = known.keys() - state.keys() if renamed and _adapters_of(model) else set()
    strict = strict and not base
    try:
        # Mismatches are reported before memory is allocated.
        if not skip_mismatched and any(tensor.is_meta for tensor in model.parameters()):
            stored, wanted = describe(state), describe(known, state)
            if (differences := compare(stored, wanted)).shapes:
                raise MismatchError(differences, diagnose(differences, stored, wanted))
        with materialise_meta(model, device) as empty:
            report = load_state_dict(model, state, strict=strict, dtype=dtype, skip_mismatched=skip_mismatched)
            if empty and (without := [*report.missing, *report.skipped]):
                live = state_dict(model)
                if left := [name for name in without if live[name].data_ptr() in empty]:
                    raise ConfigError(
                        f"{left[0]} is on the meta device and '{checkpoint.path}' does not have it in this shape, so it would "
                        "have no values: build the model on a real device."
                    )
    except MismatchError as error:
        if (sentence := _other_configuration(checkpoint, model)) is not None:
            raise error.with_configuration(sentence) from None
        raise
    missing = [name for name in report.missing if name not in base]
    return replace(report, renamed=renamed, missing=missing, unexpected=[*report.unexpected, *spare])


def _adapters_of(model: nn.Module) -> list[str]:
    """The names of peft's adapters in a model."""
    return list(getattr(unwrap(model), "peft_config", None) or ())


def _adapter_in(state: Mapping[str, Any], known: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    """Where a file holds one of a model's adapters alone, as peft writes it: its names -> the model's."""
    adapters = _adapters_of(model)
    for adapter in [getattr(unwrap(model), "active_adapter", None), *adapters] if adapters else ():
        names = adapter_names(known, [adapter]) if isinstance(adapter, str) else {}
        clean = {clean_name: name for name, clean_name in clean_names(state, roots=())[0].items()}
        if names and clean.keys() == names.keys():
            return {clean[name]: names[name] for name in names}
    return {}


def _stored(checkpoint: Checkpoint, model: nn.Module, known: Mapping[str, Any]) -> TensorFile:
    """The tensors to load: as they are stored where they fit, else in the model's layout, where both formats are registered."""
    origin = checkpoint.origin
    if origin is None or origin.completed:
        return _in_the_models_layout(checkpoint, model, known)
    raw: TensorFile = origin.contents.tensors
    renamed = recover_names(raw.names, known)
    fits = {renamed.get(name, name) for name in raw.names} - {AVERAGE_COUNTER} == known.keys() - {AVERAGE_COUNTER}
    if origin.config is None:
        return raw
    if fits:
        if origin.format.live(unwrap(model)) is not None:
            _require_same_computation(checkpoint, model, origin.format)
        return raw
    if set(checkpoint.model.names) == known.keys():
        _require_same_computation(checkpoint, model)
        return checkpoint.model
    shapes = {name: shape for name, (shape, kind) in describe(known).items() if kind != "value"}
    format = format_of(shapes)
    if format is None or format.architecture != origin.format.architecture:
        return raw
    _require_same_computation(checkpoint, model, format)
    if format is origin.format and not origin.dropped and len(raw.names) >= len(known):
        return raw
    return translated(checkpoint.model, format, shapes)


def _in_the_models_layout(checkpoint: Checkpoint, model: nn.Module, known: Mapping[str, Any]) -> TensorFile:
    """Our own tensors, for a class of another program that has another layout of the same architecture."""
    if checkpoint.architecture is None or describe_model(unwrap(model))[0] is not None:
        return checkpoint.model
    shapes = {name: shape for name, (shape, kind) in describe(known).items() if kind != "value"}
    format = format_of(shapes)
    if format is None or format.architecture != checkpoint.architecture or set(checkpoint.model.names) == known.keys():
        return checkpoint.model
    _require_same_computation(checkpoint, model, format)
    return translated(checkpoint.model, format, shapes)


def _require_same_computation(checkpoint: Checkpoint, model: nn.Module, format: Format | None = None) -> None:
    """Refuse settings that no tensor's shape shows, where both sides state them.

    Args:
        format: the layout of a model whose class is not registered.
    """
    origin, config = checkpoint.origin, checkpoint.config
    hidden = (format or origin.format).hidden
    live: Mapping[str, Any] | None
    architecture, live = describe_model(unwrap(model))
    if live is None and format is not None:
        architecture, live = format.architecture, format.live(unwrap(model))
    if live is None or config is None or architecture != checkpoint.architecture:
        return
    assumed = origin.assumed if origin is not None else set()
    for name in hidden:
        if name in live and name not in assumed and (was := config.get(name)) != (now := live[name]):
            raise ConfigError(
                f"'{checkpoint.path}' was trained with {name}={was}, and this model computes with {name}={now}: its values "
                "would load, and mean something else. Build the model with that, or use onym.load_model(path)."
            )


def _other_configuration(checkpoint: Checkpoint, model: nn.Module) -> str | None:
    """How the model that was saved was built otherwise than this one, where both say how."""
    architecture, config = describe_model(unwrap(model))
    if checkpoint.config is None or config is None:
        return None
    if checkpoint.architecture != architecture:
        return f"Saved from a {checkpoint.architecture!r}, this model is a {architecture!r}: use onym.load_model(path)."
    stored = checkpoint.config
    differing = [key for key in config if key in stored and stored[key] != config[key]]
    if not differing:
        return None
    was, now = (", ".join(f"{key}={values[key]}" for key in differing) for values in (stored, config))
    return f"Saved with {was}; this model has {now}: build it with the stored values, or use onym.load_model(path)."


def _found(
    path: str | os.PathLike[str],
    step: int | str = "latest",
    *,
    verify: bool = True,
    part: str | None = None,
    settings: Mapping[str, Any] | None = None,
    complete: bool = True,
) -> Checkpoint:
    """The checkpoint that a path means; warns of damaged ones that were skipped."""
    found = open_any(_path(path), step, verify=verify, part=part, settings=settings, complete=complete)
    for skipped, reason in found.skipped:
        warnings.warn(f"Passed over '{skipped}': {reason}", stacklevel=3)
    return found.checkpoint


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) and not hasattr(path, "joinpath"):
        raise ConfigError(f"This is a {type(path).__name__}, not a path: the model comes first in save, the path in load.")
    found = as_path(path)
    require_path(found)
    return found
