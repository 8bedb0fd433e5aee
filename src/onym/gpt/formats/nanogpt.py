"""nanoGPT's ``ckpt.pt``: model, optimizer, step and settings in one file.

The names are those of transformers' GPT-2, the matrices are ``nn.Linear``'s (``[out, in]``), the head is always the embedding,
GELU is the exact one, and ``bias=False`` takes the biases of the norms too. Source: nanoGPT's model.py and train.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from onym.convert.mapping import Recipe, same, weight_and_bias
from onym.convert.registry import Config, NamedShapes, Stated, Target, Writing
from onym.format.manifest import OPTIMIZER
from onym.format.reader import Checkpoint
from onym.gpt.config import GPTConfig
from onym.gpt.formats.classifiers import no_place_for_labels
from onym.gpt.formats.differences import biases, without
from onym.gpt.formats.understand import GPT2Format
from onym.gpt.gpt2 import GPT

_LAYER = {
    "ln_1": "norm1",
    "attn.c_attn": "att.qkv",
    "attn.c_proj": "att.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "ff.layers.0",
    "mlp.c_proj": "ff.layers.2",
}
ARGUMENTS = {
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "emb_dim": "n_embd",
    "context_length": "block_size",
    "vocab_size": "vocab_size",
    "drop_rate": "dropout",
    "bias": "bias",
}
"""Our field -> theirs in ``model_args``."""


def _recognise(found: NamedShapes) -> str | None:
    shape = found.shape("transformer.h.0.attn.c_attn.weight")
    if shape is not None and len(shape) == 2 and shape[0] == 3 * shape[1]:
        return "attn.c_attn is [3 x width, width], as nn.Linear stores it"
    return None


def _stated(found: NamedShapes) -> Stated:
    arguments = found.contents.values.get("model_args")
    config: dict[str, Any] = {"gelu": "erf"}
    if not isinstance(arguments, Mapping):
        return Stated(config)
    config |= {ours: arguments[theirs] for ours, theirs in ARGUMENTS.items() if theirs in arguments}
    return Stated(config, "model_args", ARGUMENTS)


def _lacks(config: Config) -> dict[str, str]:
    lacks = {}
    if config["gelu"] != "erf":
        lacks["gelu"] = "nanoGPT computes GELU exactly, and this model was trained with its tanh form"
    if not config["tie_embeddings"]:
        lacks["head"] = "nanoGPT's head is always its embedding, and this model has a head of its own"
    return lacks


def _added(values: Config, dtype: str) -> dict[str, Recipe]:
    """nanoGPT has all biases or none."""
    config = GPTConfig.from_dict(values)
    if config.bias == config.qkv_bias:
        return {}
    others = [*(name for name in _LAYER.values() if name != "att.qkv"), "final_norm"]
    return biases(config, NANOGPT.rules, ["att.qkv"] if config.bias else others, dtype)


def _checkpoint(writing: Writing, weights: OrderedDict[str, Tensor]) -> dict[str, Any]:
    """The content of a ``ckpt.pt`` that nanoGPT resumes from; with AdamW's moments, where the source has them."""
    config = GPTConfig.from_dict(writing.config)
    every = config.bias or config.qkv_bias
    model = GPT.without_values(GPTConfig.from_dict({**writing.config, "bias": every, "qkv_bias": every}))
    names = [name for name, _ in model.named_parameters()]
    saved = _saved_moments(writing.checkpoint, names)
    state: dict[int, dict[str, Tensor]] = {}
    if saved is not None:
        ordered = [name for group in parameter_order(names) for name in group]
        for number, name in enumerate(ordered):
            state[number] = {slot: saved[0][f"{slot}.{name}"] for slot in ("step", "exp_avg", "exp_avg_sq")}
            state[number]["step"] = state[number]["step"].to(torch.float32)
        writing.used.update((OPTIMIZER, "optimizer"))
        writing.notes.append("The optimizer's moments are in it.")
    else:
        writing.notes.append("Its optimizer starts afresh: the source has no moments of AdamW.")
    writing.used.update(("iter_num", "best_val_loss", "model_args"))
    origin, manifest = writing.checkpoint.origin, writing.checkpoint.manifest
    values = origin.contents.values if origin is not None else {}
    step = manifest.step if manifest is not None else values.get("iter_num")
    best = values.get("best_val_loss", 1e9)
    return {
        "model": weights,
        "optimizer": {"state": state, "param_groups": groups(names, saved[1] if saved else None)},
        "model_args": arguments(config),
        "iter_num": int(step or 0),
        "best_val_loss": best if isinstance(best, Tensor | float | int) else 1e9,
        "config": {},
    }


def _saved_moments(checkpoint: Checkpoint, names: list[str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """AdamW's moments of every parameter under our names, and its groups' settings; from nanoGPT's file or an Onym run's."""
    if checkpoint.origin is not None:
        if checkpoint.origin.format is not NANOGPT:
            return None
        found = moments(checkpoint.origin.contents.values, names)
    elif OPTIMIZER in checkpoint.holds:
        stored = checkpoint.tensors(OPTIMIZER)
        found = {name.removeprefix("state."): stored.tensor(name) for name in stored.names}, []
    else:
        return None
    if found is None:
        return None
    whole = all(f"{slot}.{name}" in found[0] for slot in ("step", "exp_avg", "exp_avg_sq") for name in names)
    fitting = whole and all(found[0][f"exp_avg.{name}"].shape == checkpoint.model.shapes.get(name) for name in names)
    return found if fitting else None


NANOGPT = GPT2Format(
    name="nanogpt",
    title="nanoGPT's GPT",
    recognise=_recognise,
    rules=(
        same("transformer.wte.weight", "tok_emb.weight"),
        same("transformer.wpe.weight", "pos_emb.weight"),
        *(
            rule
            for theirs, ours in _LAYER.items()
            for rule in weight_and_bias(f"transformer.h.{{n}}.{theirs}", f"trf_blocks.{{n}}.{ours}")
        ),
        *weight_and_bias("transformer.ln_f", "final_norm"),
        same("lm_head.weight", "out_head.weight"),
    ),
    stated=_stated,
    ignored=(r"transformer\.h\.\d+\.attn\.bias",),
    target=Target(
        refuses=no_place_for_labels("nanoGPT's model"), lacks=_lacks, without=without, added=_added, pickle=_checkpoint
    ),
)


def arguments(config: GPTConfig) -> dict[str, Any]:
    """The ``model_args`` of a configuration."""
    values = config.to_dict()
    return {theirs: values[ours] for ours, theirs in ARGUMENTS.items()} | {"bias": config.bias or config.qkv_bias}


def groups(names: list[str], settings: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The parameter groups of nanoGPT's AdamW; its own settings where none are given."""
    usual = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None}
    usual |= {"capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True}
    made, number = [], 0
    for index, members in enumerate(parameter_order(names)):
        own = settings[index] if settings and index < len(settings) else {}
        decay = {"weight_decay": 0.1 if index == 0 else 0.0}
        made.append({**usual, **decay, **own, "params": list(range(number, number + len(members)))})
        number += len(members)
    return made


def parameter_order(names: list[str]) -> list[list[str]]:
    """Our names in the order in which nanoGPT's optimizer numbers them: matrices (decayed) first, then the rest.

    Args:
        names: our names of all parameters, in the model's order, the tied head left out.
    """
    return [[name for name in names if not _is_vector(name)], [name for name in names if _is_vector(name)]]


def _is_vector(name: str) -> bool:
    return name.endswith(".bias") or ".norm" in name or name.startswith("final_norm")


def moments(values: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """The state of nanoGPT's AdamW under our names: ``{"exp_avg.<name>": tensor}`` and so on, and its groups' settings.

    None where the file has none, or another optimizer's.
    """
    optimizer = values.get("optimizer")
    if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= optimizer.keys() or not optimizer["state"]:
        return None
    groups = optimizer["param_groups"]
    ordered = [name for group in parameter_order(names) for name in group]
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(ordered):
        return None
    tensors: dict[str, Tensor] = {}
    for number, name in zip(numbers, ordered, strict=True):
        for slot, value in optimizer["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{slot}.{name}"] = value
    return tensors, [{key: value for key, value in group.items() if key != "params"} for group in groups]
