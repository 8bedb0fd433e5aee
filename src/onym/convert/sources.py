"""What a file or folder holds, before anybody asks whose layout it is: named tensors, plain values, texts beside them.

Files are recognised by their first bytes and their content, never by their names; of a folder's files, an index or a
``.metadata`` records which belong together. Nothing is executed, and tensors are mapped, not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from onym.convert.mapping import Recipe, View
from onym.errors import CheckpointError, NoWeightsError, nearest
from onym.format.extra_state import with_extra_state
from onym.format.manifest import MOST_JSON_BYTES, parse_json
from onym.format.pth import PickledFile, read_pickle
from onym.format.reader import Checkpoint
from onym.format.safetensors import begins_file
from onym.format.safetensors_file import open_safetensors
from onym.format.stand_ins import StandIn, key_said, kind_of, with_states
from onym.format.tensors import TensorFile
from onym.names.model_keys import MODEL_KEYS
from onym.state.model import tensor_identity

_AVERAGES = ("ema", "shadow", "averaged", "swa")
_DEEPEST = 4
# The texts beside the weights that say what they are, or how text becomes tokens.
_TEXTS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model_config.yaml",
    "params.json",
)
TEMPLATE_TEXTS = ("tokenizer_config.json", "chat_template.jinja")
"""Of these, the ones that say how a conversation becomes a text; Onym's own checkpoints may have them too."""
# Entries that hold no model: an optimizer's state, random number generators, what a loop counts.
NO_MODEL = re.compile(
    r"(?i:optim.*|(\w+_)?rng(_\w+)?|random.*|(lr_)?sched.*|train(er|ing)?_state|data_?loader.*|(grad_)?scaler|metrics?|callbacks|loops|.*_extra_state)"
)


@dataclass(frozen=True)
class Contents:
    """A file or folder, opened."""

    path: Path
    kind: str
    """How the bytes are stored, in words."""
    tensors: TensorFile
    """Under the names that they are stored under."""
    within: str | None = None
    """The entry of the file that they are in, as ``model`` or ``state.model``."""
    further: list[str] = field(default_factory=list)
    """What else is there that could be loaded, by ``part``."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What else is in a pickled file: step numbers, settings, an optimizer's state …"""
    texts: Mapping[str, str] = field(default_factory=dict)
    """The text files beside the weights, by name."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Objects in a pickled file that were not read, by their places: the names of their classes."""
    summed: bool = False
    """Whether checksums are stored with the bytes, as in a zip."""

    def json(self, file: str) -> dict[str, Any] | None:
        """A text beside the weights as a JSON object; None where there is none."""
        if file not in self.texts:
            return None
        value = parse_json(self.texts[file], f"'{self.path / file}'")
        return value if isinstance(value, dict) else None


def open_file(path: Path, part: str | None = None) -> Contents:
    """Open a .safetensors file or one of ``torch.save``; see :func:`onym.convert.folders.open_contents`."""
    if begins_file(start_of(path), path.stat().st_size):
        return Contents(path, "a .safetensors file", with_extra_state(open_safetensors(path)), texts=texts_of(path.parent))
    return _open_pickle(path, part)


def start_of(path: Path) -> bytes:
    """The first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is nothing at '{path}': check the path.") from error
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error


def _open_pickle(path: Path, part: str | None) -> Contents:
    pickled = read_pickle(path)
    content = pickled.content
    inside = None  # of what a list or an object has
    if isinstance(content, list | tuple):
        inside = {str(number): each for number, each in enumerate(content)}
    elif isinstance(content, StandIn):
        inside = content.state
    if isinstance(inside, dict) and next(models_in(inside := with_states(inside)), None):
        content = inside
    if not isinstance(content, Mapping) or isinstance(content, StandIn):
        raise NoWeightsError(
            f"'{path}' holds a {kind_of(content)}, not a state dict of named tensors: where it was made, save "
            "model.state_dict()."
        )
    candidates = dict(models_in(content))
    chosen = chosen_of(path, content, candidates, part)
    state = candidates[chosen]
    values = {key: value for key, value in content.items() if isinstance(key, str) and key != chosen} if chosen else {}
    kind = "a Lightning checkpoint" if "pytorch-lightning_version" in values else "a file of torch.save"
    kind += f", the model under {chosen!r}" if chosen else ""
    foreign = pickled.foreign.get(chosen)
    kind += f", from a whole module {foreign}" if foreign else ""
    return Contents(
        path,
        kind,
        _tied(PickledFile(path, state, pickled.is_zip)),
        within=chosen or None,
        further=[name for name in candidates if name != chosen],
        values=values,
        texts=texts_of(path.parent),
        foreign=pickled.foreign,
        summed=pickled.is_zip,
    )


def models_in(content: Mapping[Any, Any], tensor: type = Tensor) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict in a file that looks like a model's state, by its place: mostly tensors, and under texts as names.

    Args:
        content: what a file holds.
        tensor: the class of what stands for a tensor in it.
    """
    visited: set[int] = set()  # a dict may hold itself, many times

    def within(content: Mapping[Any, Any], at: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not content or id(content) in visited:
            return
        visited.add(id(content))
        is_named = all(isinstance(key, str) for key in content)
        if {"state", "param_groups"} <= content.keys() or (isinstance(content, StandIn) and not content.is_dict):
            return
        tensors = sum(isinstance(value, tensor) for value in content.values())
        inner: list[tuple[str, Mapping[str, Any]]] = []
        if depth < _DEEPEST:
            for key, value in content.items():
                if isinstance(value, Mapping) and isinstance(key, str) and not NO_MODEL.fullmatch(key):
                    inner += within(value, f"{at}.{key}" if at else key, depth + 1)
        if (
            is_named
            and tensors
            and tensors >= max((len(state) for _, state in inner), default=0)
            and 2 * tensors >= len(content)
        ):
            yield at, content
        else:
            yield from inner

    yield from within(content, "", 0)


def chosen_of(path: Path, content: Mapping[Any, Any], candidates: Mapping[str, Mapping[str, Any]], part: str | None) -> str:
    """Of several models in a content the one that is meant, by its place; the one that was asked for as a ``part``.

    Raises:
        NoWeightsError: there is none, or nothing says which.
        CheckpointError: there is no such part.
    """
    if part is not None and part not in candidates:
        raise CheckpointError(f"'{path}' has no part {part!r}{nearest(part, candidates)}; it has {_listed(candidates)}.")
    if part is not None:
        return part
    if not candidates:
        if {"state", "param_groups"} <= content.keys():
            raise NoWeightsError(f"'{path}' holds the state of an optimizer, not of a model: give the model's file.")
        said = ", ".join(map(key_said, list(content)[:6])) or "nothing"
        raise NoWeightsError(f"'{path}' has no tensors that could be a model's; it has {said}.")
    if len(candidates) == 1:
        return next(iter(candidates))
    own = [name for name in candidates if not any(word in name.lower() for word in _AVERAGES)]
    if len(own) == 1:
        return own[0]
    keys = (*MODEL_KEYS, "app")
    for key in keys:
        if key in own and all(other.startswith(f"{key}.") or other in keys for other in own):
            return key
    raise NoWeightsError(f"'{path}' holds {len(candidates)} models, {_listed(candidates)}: say which with --part (part=).")


def _listed(candidates: Mapping[str, Any]) -> str:
    more = f" and {len(candidates) - 6} more" if len(candidates) > 6 else ""
    return (", ".join(repr(name) for name in list(candidates)[:6]) or "none") + more


def _tied(file: TensorFile) -> TensorFile:
    """With tensors that are the same memory as one tensor of several names, as other files say it."""
    first: dict[Any, str] = {}
    recipes = {}
    for name in file.names:
        value = file._read(name) if file.dtypes[name] != "value" else None
        same = tensor_identity(value) if isinstance(value, Tensor) and not value.is_meta else None
        recipes[name] = Recipe((first.setdefault(same, name) if same else name,))
    if all(recipe.sources == (name,) for name, recipe in recipes.items()):
        return file
    view = View(file, recipes)
    view.versions = file.versions
    return view


def texts_of(folder: Path) -> dict[str, str]:
    """The texts that describe the weights in a folder."""
    return {name: text_of(folder / name) for name in _TEXTS if (folder / name).is_file()}


def template_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """Of an opened checkpoint, those of :data:`TEMPLATE_TEXTS` that it has."""
    return {name: text for name in TEMPLATE_TEXTS if (text := checkpoint.text(name)) is not None}


def text_of(path: Path) -> str:
    """The content of a text file."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise CheckpointError(f"'{path}' has {path.stat().st_size:,} bytes; up to {MOST_JSON_BYTES:,} are read.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"'{path}' is damaged: it is no UTF-8.") from error


def as_json(values: Mapping[str, Any]) -> str:
    """The text of a configuration file."""
    return json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
