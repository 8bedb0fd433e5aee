"""peft's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

A tensor is called ``base_model.model.<layer, as transformers calls it>.lora_A.weight`` [rank, in], or ``lora_B`` [out, rank],
also where the layer is a ``Conv1D`` (``fan_in_fan_out``). What we write has a manifest with the hash of every tensor besides,
and ``onym_adapter.json``: the settings under our names, and which base it needs. Source: peft's LoraConfig, save_and_load.py
and tuners/lora/layer.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onym.adapters.lora import ARCHITECTURE, LoRAConfig
from onym.adapters.stored import layers_of, with_values
from onym.convert.mapping import Recipe, View
from onym.convert.sources import as_json
from onym.errors import CheckpointError, ConfigError
from onym.format.manifest import ADAPTER, parse_json
from onym.format.tensor_writing import Progress
from onym.format.tensors import TensorFile
from onym.format.writer import About, write_folder

CONFIG_FILE = "adapter_config.json"
OURS_FILE = "onym_adapter.json"
_PREFIX = "base_model.model."
# A pattern is a regular expression from a file that anybody may have made.
_REPEATS, _MOST_REPEATS, _NESTED = re.compile(r"[*+{]"), 2, re.compile(r"\)[*+?{]")
# Settings of peft's that change what an adapter computes, and are not read here: their value where they are not used.
_UNREAD: dict[str, tuple[str, Sequence[Any]]] = {
    "use_dora": ("it is DoRA, which also scales each row of the weights", (False, None)),
    "modules_to_save": ("it replaces whole modules as well (modules_to_save)", (None, [])),
    "bias": ("it trained biases too", ("none", None)),
    "lora_bias": ("its matrices have biases (lora_bias)", (False, None)),
    "layer_replication": ("it repeats layers (layer_replication)", (None, [])),
    "trainable_token_indices": ("it trained single tokens too (trainable_token_indices)", (None, [], {})),
    "target_parameters": ("it adapts parameters that are no layers (target_parameters)", (None, [])),
    "alora_invocation_tokens": ("it acts from certain tokens on (aLoRA)", (None, [])),
    "use_qalora": ("it is QALoRA, which pools its inputs", (False, None)),
    "use_bdlora": ("its matrices are block-diagonal (use_bdlora)", (None, False)),
    "kasa_config": ("it is KaSA, which has singular values too", (None,)),
    "arrow_config": ("it mixes several adapters (Arrow)", (None,)),
    "velora_config": ("it compresses activations (VeLoRA)", (None,)),
    "monteclora_config": ("it draws its values (MonteCLoRA)", (None,)),
}


def read_settings(text: str, path: Path, tensors: TensorFile) -> tuple[LoRAConfig, TensorFile, str]:
    """What peft wrote.

    Args:
        text: of ``adapter_config.json``.
        path: of the folder or file, for messages.
        tensors: under peft's names.

    Returns:
        The settings and the matrices by transformers' names of the layers, and the name of the base.

    Raises:
        CheckpointError: the adapter is not LoRA's, or of a variant that is not read here.
    """
    values = parse_json(text, f"'{path / CONFIG_FILE if path.is_dir() else path.parent / CONFIG_FILE}'")
    if not isinstance(values, dict) or "peft_type" not in values:
        raise CheckpointError(f"'{path}' is no adapter: its {CONFIG_FILE} has no peft_type.")
    if values["peft_type"] != "LORA":
        raise CheckpointError(f"'{path}' is an adapter of peft's kind {values['peft_type']!r}, and LORA alone is read here.")
    for key, (reason, usual) in _UNREAD.items():
        if (value := values.get(key)) not in usual:
            raise CheckpointError(f"'{path}' cannot be read here: {reason} ({key}={value!r}). Merge it with peft first.")
    names = {name: re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", name) for name in tensors.names}
    plain = View(tensors, {clean.removeprefix(_PREFIX): Recipe((name,)) for name, clean in names.items()})
    layers = layers_of(plain.names)
    try:
        rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
        ranks = {layer: _of(values.get("rank_pattern"), layer, rank) for layer in layers}
        alphas = {layer: _of(values.get("alpha_pattern"), layer, alpha) for layer in layers}
        if values.get("use_rslora"):  # scaled by alpha / sqrt(rank)
            alphas = {layer: each * math.sqrt(ranks[layer]) for layer, each in alphas.items()}
        dropout, targets = values.get("lora_dropout", 0.0), values.get("target_modules")
        config = LoRAConfig(rank, alpha, dropout, tuple([targets] if isinstance(targets, str) else targets or ()))
        config = LoRAConfig.from_dict(with_values(config, ranks, alphas).to_dict() if layers else config.to_dict())
    except (ConfigError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"The {CONFIG_FILE} of '{path}' is damaged: {error}") from error
    if values.get("fan_in_fan_out"):
        config = LoRAConfig.from_dict({**config.to_dict(), "transposed": layers})
    return config, plain, str(values.get("base_model_name_or_path") or "")


def settings(
    config: LoRAConfig,
    layers: Sequence[str],
    *,
    linear: Iterable[str] = (),
    transposed: bool = False,
    task: str | None = None,
    base_name: str = "",
) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        config: with patterns by transformers' names of the layers.
        layers: those that have adapters.
        linear: all linear layers of the model, where they are known: then a few words say which have adapters.
        transposed: whether the weights of the base are [in, out] there.
        task: ``CAUSAL_LM``, ``SEQ_CLS``; None for a model of no class of transformers.
        base_name: where the base is.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base_name or None,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _few(layers, list(linear)),
        "exclude_modules": None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {_only(layer): rank for layer, rank in config.rank_pattern.items()},
        "alpha_pattern": {_only(layer): alpha for layer, alpha in config.alpha_pattern.items()},
    }


def write(
    path: Path,
    matrices: Mapping[str, Any],
    values: Mapping[str, Any],
    ours: LoRAConfig,
    progress: Progress | None = None,
) -> None:
    """Write a folder of peft's, durably: it is there completely or not at all.

    Args:
        path: its place.
        matrices: tensors by transformers' names, as ``transformer.h.0.attn.c_attn.lora_A.weight``.
        values: of :func:`settings`.
        ours: the settings under our names of the layers, with the base.
        progress: called with the bytes written since the last call.
    """
    texts = {CONFIG_FILE: as_json(values), OURS_FILE: as_json(ours.to_dict())}
    state = {f"{_PREFIX}{name}": value for name, value in matrices.items()}
    write_folder(path, {ADAPTER: state}, texts, About(ARCHITECTURE), progress)


def _of(pattern: Any, layer: str, usual: Any) -> Any:
    """A layer's value: that of the first pattern which its name ends in, as peft matches it."""
    for key, value in (pattern or {}).items():
        if len(_REPEATS.findall(key)) > _MOST_REPEATS or _NESTED.search(key):
            raise ConfigError(f"the pattern {key!r} could take forever to match.")
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return usual


def _only(layer: str) -> str:
    """A layer's name as a pattern of peft's that no other layer matches."""
    return f"^{re.escape(layer)}"


def _few(layers: Sequence[str], linear: Sequence[str]) -> list[str]:
    """Ends of names that mean these layers and no others; their full names where there are none."""
    ends = sorted({re.sub(r"^.*\.\d+\.", "", layer) for layer in layers})
    meant = {layer for layer in linear if any(layer == end or layer.endswith(f".{end}") for end in ends)}
    return ends if meant == set(layers) else list(layers)


def is_adapter(names: Sequence[str]) -> bool:
    """Whether tensors have peft's names."""
    return bool(names) and all(name.startswith(_PREFIX) for name in names)
