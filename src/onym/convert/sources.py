"""What a file or folder holds, before anybody asks whose layout it is: named tensors, plain values, texts beside them.

Files are recognised by their first bytes and their content, never by their names; of a folder's files, an index or a
``.metadata`` records which belong together. Nothing is executed, and tensors are mapped, not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from onym.convert import dcp_folder
from onym.convert.mapping import Joined, Recipe, View
from onym.errors import CheckpointError, NoWeightsError, nearest
from onym.format.extra_state import with_extra_state
from onym.format.manifest import MOST_JSON_BYTES, is_file_name, parse_json
from onym.format.pth import PickledFile, kind_of, read_pickle
from onym.format.safetensors_file import open_safetensors
from onym.format.stand_ins import StandIn
from onym.format.tensors import TensorFile
from onym.state.model import tensor_identity

# What people call the model's part of a file, most telling first.
_MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module", "net", "network", "model_state", "weights", "params", "app")
_AVERAGES = ("ema", "shadow", "averaged", "swa")
_DEEPEST = 4
# The texts beside the weights that say what they are, or how text becomes tokens.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "model_config.yaml",
    "params.json",
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.\w+)")
_PART = re.compile(r"consolidated\.\d|(?<![a-z])rank_?\d")
_STEP = re.compile(r"(?P<stem>.*?)(?P<step>\d+)\.\w+")
# Folders in which trainers write the model's own files.
_INSIDE = ("model_and_optim", "model", "pytorch_model_fsdp_0", "weights", "checkpoint", "final")
_OPTIMIZER_ENTRIES = ("optimizer", "optim", "optimizers", "lr_scheduler", "scheduler", "dataloader", "train_state")


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


def open_contents(path: Path, part: str | None = None) -> Contents:
    """Open whatever is at a path.

    Args:
        path: a file or folder of this machine.
        part: which of several models in it.

    Raises:
        CheckpointError: nothing in it is a model's weights, or something is missing or damaged.
    """
    if path.is_dir():
        return _open_folder(path, part)
    start = _start(path)
    if start[8:9] == b"{":
        return Contents(path, "a .safetensors file", with_extra_state(open_safetensors(path)), texts=_texts(path.parent))
    if path.name.endswith(".index.json") and start[:1] in (b"{", b"["):
        return _open_index(path)
    if path.name == dcp_folder.METADATA:
        return _open_distributed(path.parent, part)
    return _open_pickle(path, part)


def _start(path: Path) -> bytes:
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
    if not isinstance(content, Mapping) or isinstance(content, StandIn):
        raise NoWeightsError(
            f"'{path}' holds a {kind_of(content)}, not a state dict of named tensors: where it was made, save "
            "model.state_dict()."
        )
    candidates = dict(_models_in(content))
    if part is not None:
        if part not in candidates:
            raise CheckpointError(f"'{path}' has no part {part!r}{nearest(part, candidates)}; it has {_listed(candidates)}.")
        chosen = part
    else:
        chosen = _chosen(path, content, candidates)
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
        texts=_texts(path.parent),
        foreign=pickled.foreign,
        summed=pickled.is_zip,
    )


def _models_in(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict in a file that looks like a model's state, by its place: mostly tensors, and under texts as names."""
    visited: set[int] = set()  # a dict may hold itself, many times

    def within(content: Mapping[Any, Any], at: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not content or id(content) in visited or not all(isinstance(key, str) for key in content):
            return
        visited.add(id(content))
        if {"state", "param_groups"} <= content.keys() or (isinstance(content, StandIn) and not content.is_dict):
            return
        tensors = sum(isinstance(value, Tensor) for value in content.values())
        inner: list[tuple[str, Mapping[str, Any]]] = []
        if depth < _DEEPEST:
            for key, value in content.items():
                if isinstance(value, Mapping) and not key.lower().startswith("optim") and not key.endswith("_extra_state"):
                    inner += within(value, f"{at}.{key}" if at else key, depth + 1)
        if tensors and tensors >= max((len(state) for _, state in inner), default=0) and 2 * tensors >= len(content):
            yield at, content
        else:
            yield from inner

    yield from within(content, "", 0)


def _chosen(path: Path, content: Mapping[Any, Any], candidates: Mapping[str, Mapping[str, Any]]) -> str:
    if not candidates:
        if {"state", "param_groups"} <= content.keys():
            raise NoWeightsError(f"'{path}' holds the state of an optimizer, not of a model: give the model's file.")
        said = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise NoWeightsError(f"'{path}' has no tensors that could be a model's; it has {said}.")
    if len(candidates) == 1:
        return next(iter(candidates))
    own = [name for name in candidates if not any(word in name.lower() for word in _AVERAGES)]
    if len(own) == 1:
        return own[0]
    for key in _MODEL_KEYS:
        if key in own and all(other.startswith(f"{key}.") or other in _MODEL_KEYS for other in own):
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


def _open_folder(path: Path, part: str | None) -> Contents:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") or entry.name == dcp_folder.METADATA)
    if any(entry.name == dcp_folder.METADATA for entry in entries):
        return _open_distributed(path, part)
    for entry in entries:
        if entry.name.endswith(".index.json") and entry.is_file():
            return _open_index(entry)
    files = [entry for entry in entries if entry.is_file() and _is_weights(entry)]
    shards: dict[str, list[Path]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.name):
            shards.setdefault(found["stem"] + found["end"], []).append(file)
    if len(shards) == 1:
        return _open_shards(path, next(iter(shards.values())))
    opened: dict[Path, Contents] = {}
    refused: list[str] = []
    for file in files:
        try:
            opened[file] = open_contents(file, part)
        except CheckpointError as error:
            refused.append(str(error))
    if not opened:
        for name in _INSIDE:
            if (path / name).is_dir():
                return _open_folder(path / name, part)
        sharded = [entry for entry in entries if entry.is_dir() and (entry / dcp_folder.METADATA).exists()]
        if len(sharded) == 1:
            return _open_folder(sharded[0], part)
        if refused:
            raise CheckpointError(refused[0])
        raise NoWeightsError(f"The folder '{path}' holds no weights, neither Onym's nor another program's: check the path.")
    chosen = _one_of(path, {file: contents.tensors for file, contents in opened.items()})
    inner = opened[chosen]
    beside = [file.name for file in opened if file != chosen]
    return replace(inner, path=path, kind=f"{inner.kind} in a folder", further=beside, texts=_texts(path))


def _one_of(path: Path, tensors: Mapping[Path, TensorFile]) -> Path:
    """Of several files with weights, the one that is meant."""
    files = list(tensors)
    if len(files) == 1:
        return files[0]
    if parts := [file.name for file in files if _PART.search(file.name)]:
        raise CheckpointError(
            f"The folder '{path}' holds what several processes had of one model ({', '.join(parts[:6])}), and nothing says how "
            "it goes together: write it as one with the program that made it."
        )
    for stem in ("model", "pytorch_model", "lit_model", "consolidated"):
        named = [file for file in files if file.name.partition(".")[0] == stem]
        if named:  # the same weights in two formats: the one that can be checked
            return min(named, key=lambda file: (file.suffix != ".safetensors", file.name))
    steps = [found for file in files if (found := _STEP.fullmatch(file.name))]
    alike = len({frozenset(each.names) for each in tensors.values()}) == 1  # otherwise they are parts, or other models
    if alike and len(steps) == len(files) and len({found["stem"] for found in steps}) == 1:
        return max(files, key=lambda file: int(_STEP.fullmatch(file.name)["step"]))  # type: ignore[index]
    raise CheckpointError(
        f"The folder '{path}' holds several files with weights ({', '.join(file.name for file in files[:6])}): name one."
    )


def _is_weights(path: Path) -> bool:
    """Whether the first bytes are those of a .safetensors file, a zip, or a pickle."""
    start = _start(path)
    return start[8:9] == b"{" or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def _open_index(index: Path) -> Contents:
    content = parse_json(_text(index), f"'{index}'")
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"'{index}' has no weight_map, so it does not say which file holds which tensor.")
    shards = sorted(set(placed.values()))
    if bad := [name for name in shards if not is_file_name(name)]:
        raise CheckpointError(f"'{index}' names a file outside its folder: {bad[0]!r}.")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"'{index}' names {len(shards)} files, and {len(absent)} of them are missing ({', '.join(absent[:3])}): fetch them "
            "into the same folder."
        )
    files = [open_contents(index.parent / name).tensors for name in shards]
    joined = Joined(index.parent, files)
    by_name = dict(zip(shards, files, strict=True))
    wrong = [name for name, shard in placed.items() if name not in by_name[shard].names]
    if wrong:
        raise CheckpointError(f"'{index}' is wrong: {placed[wrong[0]]} does not hold {wrong[0]}, which it is said to.")
    if more := [name for name in joined.names if name not in placed]:
        raise CheckpointError(f"'{index}' is wrong: it does not list {more[0]}, which is in one of its files.")
    return Contents(index.parent, f"{len(shards)} files with an index", joined, texts=_texts(index.parent))


def _open_shards(path: Path, files: list[Path]) -> Contents:
    found = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    count = int(max(match["count"] for match in found))
    if len(files) != count:
        absent = sorted(set(range(1, count + 1)) - {int(match["number"]) for match in found})
        raise CheckpointError(
            f"'{path}' holds {len(files)} of {count} files: number {', '.join(map(str, absent[:8])) or '?'} is missing. Fetch "
            "all of them into the same folder."
        )
    joined = Joined(path, [open_contents(file).tensors for file in files])
    return Contents(path, f"{count} files without an index", joined, texts=_texts(path))


def _open_distributed(path: Path, part: str | None) -> Contents:
    stored = dcp_folder.open_distributed(path)
    names = stored.names
    models = [name for name in names if not {"optimizer", "optim", "optimizers"} & set(name.split(".")[:2])]
    models = [name for name in models if name.split(".")[0] not in _OPTIMIZER_ENTRIES and not name.startswith("state.exp_avg")]
    firsts = {name.split(".")[0] for name in models}
    only = next(iter(firsts)) if len(firsts) == 1 else ""
    within = part if part is not None else only if only in (*_MODEL_KEYS, "state") else ""
    strip = f"{within}." if within else ""
    wanted = [name for name in models if part is None or name.startswith(strip)]
    if part is not None and not wanted:
        raise CheckpointError(f"'{path}' has no part {part!r}; it has {', '.join(sorted(firsts))}.")
    if not wanted:
        raise NoWeightsError(f"'{path}' holds no model's tensors; it has {', '.join(names[:6])}.")
    view = View(stored, {name.removeprefix(strip): Recipe((name,)) for name in wanted}, path)
    kind = "a folder of torch.distributed.checkpoint"
    texts = {**_texts(path.parent), **_texts(path)}
    return Contents(path, kind, view, within=within or None, texts=texts, summed=True)


def _texts(folder: Path) -> dict[str, str]:
    """The texts that describe the weights in a folder."""
    return {name: _text(folder / name) for name in _TEXTS if (folder / name).is_file()}


def _text(path: Path) -> str:
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
