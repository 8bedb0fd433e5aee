"""What a folder holds: which of its files belong together, or where in it the model is.

An index, a ``.metadata`` or the header of a shard records which tensors belong together; ``latest`` and numbers in names say
which step is the newest. Nothing is executed, and tensors are mapped, not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onym.convert import dcp_folder
from onym.convert.mapping import Joined, Recipe, View
from onym.convert.sources import (
    NO_MODEL,
    Contents,
    chosen_of,
    models_in,
    open_file,
    start_of,
    text_of,
    texts_of,
)
from onym.errors import CheckpointError, NoWeightsError, nearest
from onym.format.extra_state import WithValues
from onym.format.layout import MOST_COMPARED, Layout, Shard, rank_folder
from onym.format.manifest import MANIFEST, MODEL, are_counts, is_file_name, malformed_is_damaged, parse_json
from onym.format.nested import structure_of
from onym.format.reader import Checkpoint
from onym.format.safetensors import begins_file
from onym.format.safetensors_file import open_safetensors
from onym.format.tensors import Damage, TensorFile
from onym.names.model_keys import MODEL_KEYS
from onym.state.chunks import Chunk, Shape

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.\w+)")
_RANK_SHARD = re.compile(r"shard-(?P<rank>\d{5})-model-\d{5}-of-\d{5}\.safetensors")
_PART = re.compile(r"consolidated\.\d|(?<![a-z])rank_?\d")
_ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_STEP = re.compile(r"(?P<stem>.*?)(?P<step>\d+)\.\w+")
_STEP_FOLDER = re.compile(r"(?:checkpoint|step|iter|epoch)[-_]?(?P<step>\d+)")
# Folders in which trainers write the model's own files, and files that name the newest one.
_INSIDE = ("model_and_optim", "model", "pytorch_model_fsdp_0", "weights", "checkpoint", "final")
_NEWEST = ("latest", "last_checkpoint")
_DEEPEST = 8


def open_contents(path: Path, part: str | None = None) -> Contents:
    """Open whatever is at a path.

    Args:
        path: a file or folder of this machine.
        part: which of several models in it.

    Raises:
        NoWeightsError: nothing in it is a model's weights.
        CheckpointError: something is missing or damaged.
    """
    if path.is_dir():
        return _open_folder(path, part, 0)
    start = start_of(path)
    if path.name.endswith(".index.json") and start[:1] in (b"{", b"["):
        return _open_index(path)
    if path.name == dcp_folder.METADATA:
        return _open_distributed(path.parent, part)
    return open_file(path, part)


def _open_folder(path: Path, part: str | None, depth: int) -> Contents:
    try:
        entries = sorted(each for each in path.iterdir() if not each.name.startswith(".") or each.name == dcp_folder.METADATA)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    if any(entry.name == dcp_folder.METADATA for entry in entries):
        return _open_distributed(path, part)
    for entry in entries:
        if entry.name.endswith(".index.json") and entry.is_file():
            return _open_index(entry)
    files = [entry for entry in entries if entry.is_file() and _is_weights(entry)]
    if ranks := [file for file in files if _RANK_SHARD.fullmatch(file.name)]:
        return _open_rank_shards(path, ranks)
    if any(_ZERO_3.fullmatch(file.name) for file in files):
        raise CheckpointError(
            f"'{path}' is a ZeRO-3 checkpoint of DeepSpeed, in which each process has a part of each parameter: run "
            "zero_to_fp32.py, which DeepSpeed writes beside it (python zero_to_fp32.py . model), and open what that writes."
        )
    shards: dict[str, list[Path]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.name):
            shards.setdefault(found["stem"] + found["end"], []).append(file)
    if len(shards) == 1:
        return _open_shards(path, next(iter(shards.values())))
    opened: dict[Path, Contents] = {}
    refused: list[CheckpointError] = []
    for file in files:
        try:
            opened[file] = open_contents(file, part)
        except CheckpointError as error:
            refused.append(error)
    if not opened:
        inner_path = _inside(path, entries) if depth < _DEEPEST else None
        if inner_path is not None:
            return _open_folder(inner_path, part, depth + 1) if inner_path.is_dir() else open_contents(inner_path, part)
        if refused:
            raise refused[0]
        if (path / rank_folder(0) / MANIFEST).exists():
            raise NoWeightsError(
                f"'{path}' holds what each rank saved for itself (use_collectives=False): dcp.load with onym.DCPReader loads "
                "it, on as many ranks."
            )
        raise NoWeightsError(f"The folder '{path}' holds no weights, neither Onym's nor another program's: check the path.")
    chosen = _one_of(path, {file: contents.tensors for file, contents in opened.items()})
    inner = opened[chosen]
    beside = [file.name for file in opened if file != chosen]
    return replace(inner, path=path, kind=f"{inner.kind} in a folder", further=beside, texts=texts_of(path))


def _inside(path: Path, entries: Sequence[Path]) -> Path | None:
    """Where in a folder without weights the model is: what a file there names, a known folder, or the newest step."""
    for name in _NEWEST:
        if (path / name).is_file():
            said = text_of(path / name).strip()
            if is_file_name(said) and (path / said).exists():
                return path / said
    for name in _INSIDE:
        if (path / name).is_dir():
            return path / name
    revision = path / "refs" / "main"  # the cache of huggingface_hub
    if (path / "snapshots").is_dir() and revision.is_file():
        snapshot = text_of(revision).strip()
        return path / "snapshots" / snapshot if is_file_name(snapshot) and (path / "snapshots" / snapshot).is_dir() else None
    folders = [entry for entry in entries if entry.is_dir()]
    numbered = [(int(found["step"]), entry) for entry in folders if (found := _STEP_FOLDER.fullmatch(entry.name))]
    if numbered:
        return max(numbered)[1]
    sharded = [entry for entry in folders if (entry / dcp_folder.METADATA).exists()]
    return sharded[0] if len(sharded) == 1 else None


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
    start = start_of(path)
    return begins_file(start, path.stat().st_size) or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def _open_index(index: Path) -> Contents:
    content = parse_json(text_of(index), f"'{index}'")
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
    files = [open_file(index.parent / name).tensors for name in shards]
    joined = Joined(index.parent, files)
    by_name = dict(zip(shards, files, strict=True))
    wrong = [name for name, shard in placed.items() if name not in by_name[shard].names]
    if wrong:
        raise CheckpointError(f"'{index}' is wrong: {placed[wrong[0]]} does not hold {wrong[0]}, which it is said to.")
    if more := [name for name in joined.names if name not in placed]:
        raise CheckpointError(f"'{index}' is wrong: it does not list {more[0]}, which is in one of its files.")
    return Contents(index.parent, f"{len(shards)} files with an index", joined, texts=texts_of(index.parent))


def _open_shards(path: Path, files: list[Path]) -> Contents:
    found = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    count = int(max(match["count"] for match in found))
    if len(files) != count:
        absent = sorted(set(range(1, count + 1)) - {int(match["number"]) for match in found})
        raise CheckpointError(
            f"'{path}' holds {len(files)} of {count} files: number {', '.join(map(str, absent[:8])) or '?'} is missing. Fetch "
            "all of them into the same folder."
        )
    joined = Joined(path, [open_file(file).tensors for file in files])
    return Contents(path, f"{count} files without an index", joined, texts=texts_of(path))


class _RankShards(TensorFile):
    """Files of PyTorch's HuggingFaceStorageWriter: each rank's chunks, and in each header where they begin."""

    def __init__(self, path: Path, files: Mapping[str, list[tuple[TensorFile, Chunk]]]) -> None:
        self._chunks = files
        shapes: dict[str, Shape] = {}
        budget = [MOST_COMPARED]
        for name, chunks in files.items():
            shapes[name] = tuple(map(max, zip(*(chunk.ends for _, chunk in chunks), strict=False)))
            problem = Layout.of([Shard(0, chunk) for _, chunk in chunks]).problem(shapes[name], budget)
            if problem is None and len({file.dtypes[name] for file, _ in chunks}) > 1:
                problem = "has chunks of several dtypes"
            if problem:
                raise CheckpointError(f"{name} in '{path}' {problem}: fetch all files of it again.")
        super().__init__(path, shapes, {name: chunks[0][0].dtypes[name] for name, chunks in files.items()}, {}, {})

    def _read(self, name: str) -> Tensor:
        chunks = self._chunks[name]
        first: Tensor = chunks[0][0].tensor(name, verify=False)
        full = torch.empty(self.shapes[name], dtype=first.dtype)
        for file, chunk in chunks:
            full[chunk.slices] = file.tensor(name, verify=False)
        return full

    def _check(self, names: list[str], *, reused: bool = True) -> Iterator[Damage]:
        return iter(())


def _open_rank_shards(path: Path, files: list[Path]) -> Contents:
    ranks = {int(found["rank"]) for file in files if (found := _RANK_SHARD.fullmatch(file.name))}
    if absent := sorted(set(range(1, max(ranks) + 1)) - ranks):
        raise CheckpointError(f"'{path}' lacks what rank {absent[0]} wrote (shard-{absent[0]:05d}-…): fetch all files of it.")
    chunks: dict[str, list[tuple[TensorFile, Chunk]]] = {}
    for file in files:
        opened = open_safetensors(file)
        info = parse_json(opened.metadata.get("DCP_SHARDING_INFO", "{}"), f"'{file}'")
        for name, shape in opened.shapes.items():
            entry = info.get(name) if isinstance(info, dict) else None
            offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
            if not isinstance(offsets, list) or len(offsets) != len(shape) or not are_counts(offsets):
                raise CheckpointError(f"'{file}' does not say where its chunk of {name} begins.")
            chunk = Chunk(tuple(offsets), shape)
            held = chunks.setdefault(name, [])
            if chunk not in [each for _, each in held]:  # replicated ones are in several files
                held.append((opened, chunk))
    return Contents(path, f"{len(files)} files of several ranks", _RankShards(path, chunks), texts=texts_of(path))


def _open_distributed(path: Path, part: str | None) -> Contents:
    stored = dcp_folder.open_distributed(path)
    texts = {**texts_of(path.parent), **texts_of(path)}
    found = _model_in(path, _nested(stored), stored, part)
    return replace(found, kind="a folder of torch.distributed.checkpoint", texts=texts, summed=True)


def open_part(path: Path, checkpoint: Checkpoint, part: str) -> Contents:
    """One of several models that ``DCPWriter`` saved, by the keys that lead to it."""
    assert checkpoint.chunk_index is not None
    for file in checkpoint.chunk_index.tensors.keys() - {MODEL}:
        stored, before = checkpoint.tensors(file), f"{part}."
        if names := [name for name in stored.names if name.startswith(before)]:
            view = View(stored, {name.removeprefix(before): Recipe((name,)) for name in names}, path)
            return Contents(path, "a folder of onym.DCPWriter", view, within=part)
    keys = checkpoint.chunk_index.keys
    raise CheckpointError(f"'{path}' has no part {part!r}{nearest(part, keys)} with tensors; it has {', '.join(keys)}.")


def open_state(path: Path, checkpoint: Checkpoint, part: str | None) -> Contents:
    """The model in a file of ``onym.save_state``."""
    assert isinstance(checkpoint.model, WithValues)
    with malformed_is_damaged(f"The state in '{path}'"):
        found = _model_in(path, _named(structure_of(checkpoint)) or {}, checkpoint.model.file, part)
    return replace(found, kind=f"a file of onym.save_state, the model under {found.within!r}" if found.within else found.kind)


def _model_in(path: Path, content: Mapping[Any, Any], stored: TensorFile, part: str | None) -> Contents:
    """The model among nested dicts with the names of tensors in their places."""
    candidates = dict(models_in(content, _Name))
    if not candidates and part is None:
        raise NoWeightsError(f"'{path}' holds no model's tensors; it has {', '.join(stored.names[:6]) or 'none'}.")
    chosen = chosen_of(path, {}, candidates, part)
    names = {key: name for key, name in candidates[chosen].items() if isinstance(name, _Name)}
    view = View(stored, {key: Recipe((str(name),)) for key, name in names.items()}, path)
    further = [name for name in candidates if name != chosen]
    return Contents(path, "a file of onym.save_state", view, within=chosen or None, further=further)


class _Name(str):
    """The full name of a tensor, in its place."""


def _nested(stored: dcp_folder.Distributed) -> dict[Any, Any]:
    """The tensors' names in the dicts in which they were saved, as far as the folder records them."""
    content: dict[Any, Any] = {}
    for name in stored.names:
        keys = (stored.paths or {}).get(name)
        if not isinstance(keys, list | tuple) or not keys or not all(type(key) in (str, int) for key in keys):
            keys = _guessed(name)
        place: Any = content
        for key in keys[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or keys[-1] in place:
            raise CheckpointError(f"'{stored.path}' is damaged: {name} is where another tensor is.")
        place[keys[-1]] = _Name(name)
    return content


def _named(structure: Any, depth: int = 0) -> Any:
    """A structure of :mod:`onym.state.tree` as dicts with the names of tensors; what is in lists is left out."""
    if not isinstance(structure, dict) or depth > _DEEPEST:
        return None
    tag = next(iter(structure)) if len(structure) == 1 else ""
    if tag == "$tensor":
        return _Name(structure[tag])
    if tag in ("$dict", "$ordered"):
        return {key: _named(each, depth + 1) for key, each in structure[tag] if isinstance(key, str)}
    return {key: _named(each, depth + 1) for key, each in structure.items()}


def _guessed(name: str) -> tuple[str, ...]:
    """Where a folder records no keys, which older versions of PyTorch did not."""
    first, _, rest = name.partition(".")
    return (first, rest) if rest and (first in (*MODEL_KEYS, "state") or NO_MODEL.fullmatch(first)) else (name,)
