"""A file or folder repaired in place: names that wrappers changed, an index that does not match its files.

The new file is written beside the old one, which stays as ``….bak`` until every tensor was read back and found equal.
Everything else that a file holds (an optimizer, a step number) goes over as it is.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onym.convert.clean_names import clean_names
from onym.convert.folders import open_contents
from onym.convert.lazy import compare, lazily
from onym.convert.mapping import Recipe, View, nbytes
from onym.convert.opening import open_any
from onym.convert.sources import Contents, as_json
from onym.errors import CheckpointError, StorageError, storage_error
from onym.format.manifest import parse_json
from onym.format.pth import read_pickle, write_pickle
from onym.format.reader import require_path
from onym.format.safetensors_file import SafetensorsFile
from onym.format.tensors import TensorFile
from onym.format.writer import write_safetensors
from onym.names.match import renamed_state
from onym.names.wrappers import AVERAGE_COUNTER
from onym.storage.paths import as_path, is_local, replace_file


@dataclass
class Repaired:
    """What was found, and done."""

    path: str
    kind: str
    done: str
    wrappers: dict[str, int] = field(default_factory=dict)
    compared: int = 0


def repair(path: str | Path, *, dry_run: bool = False) -> Repaired:
    """Repair names or an index; nothing else is changed.

    Args:
        path: a file of torch.save, a .safetensors file, or a folder with an index.
        dry_run: say what would be done.

    Raises:
        CheckpointError: it is damaged in another way, which cannot be repaired.
        StorageError: a ``.bak`` is there already, or the disk refused.
    """
    path = as_path(path)
    if not is_local(path):
        raise CheckpointError(f"'{path}' is remote: copy it here, repair it, and copy it back.")
    require_path(path)
    if path.is_dir():
        indexes = sorted(path.glob("*.index.json"))
        if len(indexes) != 1:
            raise CheckpointError(f"'{path}' is a folder without an index: name the file in it that is to be repaired.")
        return _repair_index(indexes[0], dry_run)
    origin = open_any(path, complete=False).checkpoint.origin
    if origin is None:
        return Repaired(str(path), "a file that Onym wrote", "nothing: its names are clean")
    contents: Contents = origin.contents
    names, wrappers = _new_names(contents.tensors)
    changed = sum(old != new for old, new in names.items())
    if not changed:
        return Repaired(str(path), origin.kind, "nothing: its names are clean")
    if contents.foreign:
        place, kind = next(iter(contents.foreign.items()))
        raise CheckpointError(
            f"'{path}' also holds objects that are not read, and would be lost ({place or 'the content'}: {kind}): onym "
            f"convert {path} clean.safetensors writes its tensors under clean names; nothing was changed."
        )
    result = Repaired(str(path), origin.kind, f"{changed} of {len(names)} tensors renamed", wrappers)
    if contents.further:  # as in a file with a model and its average
        result.done += f"; {', '.join(contents.further)} left as it is"
    if dry_run:
        return result
    contents.tensors.require_verified(contents.tensors.shapes)
    expected = View(contents.tensors, {new: Recipe((old,)) for old, new in names.items()})
    with _backup(path):
        if isinstance(contents.tensors, SafetensorsFile):
            write_safetensors(path, lazily(expected))
        else:
            _rewrite_pickle(path, contents, names)
        result.compared = compare(expected, open_contents(path, contents.within).tensors, path)
    return result


def _new_names(stored: TensorFile) -> tuple[dict[str, str], dict[str, int]]:
    """Every stored name -> what it shall be, and how often each wrapper was in them.

    Only what a wrapper alone can have put there is taken out: a Lightning module really has a ``model``, and what another
    program would call it is no matter of repair. ``module`` before every name is DDP's; of an average it is its own.
    """
    names = list(stored.names)
    averaged = any(name.rpartition(".")[2] == AVERAGE_COUNTER for name in names)
    return clean_names(names, roots=() if averaged else ("module",))


def _rewrite_pickle(path: Path, contents: Contents, names: Mapping[str, str]) -> None:
    content = read_pickle(path).content
    place = contents.within.split(".") if contents.within else []

    def renamed(value: Any, rest: list[str]) -> Any:
        if rest:
            inner = {key: renamed(each, rest[1:]) if key == rest[0] else _param_names(each) for key, each in value.items()}
            return type(value)(inner) if type(value) in (dict, OrderedDict) else inner
        return renamed_state(value, names)

    write_pickle(path, renamed(content, place), path.stat().st_size)


def _param_names(value: Any) -> Any:
    """An optimizer's groups may name their parameters, as the model they were made from had them."""
    if not isinstance(value, Mapping) or "param_groups" not in value:
        return value
    groups = [
        {**group, "param_names": list(clean_names(group["param_names"], roots=("module",))[0].values())}
        if isinstance(group, Mapping) and isinstance(group.get("param_names"), list)
        else group
        for group in value["param_groups"]
    ]
    return {**value, "param_groups": groups}


def _repair_index(index: Path, dry_run: bool) -> Repaired:
    """Make an index say what the files beside it hold."""
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{index}' cannot be read: {error}.") from error
    content = parse_json(text, f"'{index}'")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    named = {file for file in listed.values() if isinstance(file, str)} if isinstance(listed, dict) else set()
    weights = [file for file in sorted(index.parent.iterdir()) if file.suffix in (".safetensors", ".bin") and file.is_file()]
    absent = sorted(name for name in named if not (index.parent / name).is_file())
    shards = [file for file in weights if file.name in named or "-of-" in file.name]
    if absent or not shards:
        raise CheckpointError(
            f"'{index}' names files that are missing ({', '.join(absent[:3]) or 'all'}): what was in them is nowhere else, so "
            "fetch them again."
        )
    placed = {name: file.name for file in shards for name in open_contents(file).tensors.names}
    if any(old != new for old, new in clean_names(placed, roots=("module",))[0].items()):
        raise CheckpointError(
            f"The names in '{index.parent}' have wrappers in them, in {len(shards)} files at once: onym convert "
            f"{index.parent} clean --to safetensors writes them anew without; nothing was changed."
        )
    kind = f"{len(shards)} files with an index"
    if isinstance(content, dict) and content.get("weight_map") == placed:
        return Repaired(str(index.parent), kind, "nothing: its index fits its files")
    total = sum(nbytes(open_contents(file).tensors) for file in shards)
    done = f"the index now lists {len(placed)} tensors in {len(shards)} files"
    if not dry_run:
        with _backup(index):
            replace_file(index, as_json({"metadata": {"total_size": total}, "weight_map": placed}))
            open_contents(index)
    return Repaired(str(index.parent), kind, done)


@contextmanager
def _backup(path: Path) -> Iterator[None]:
    """Save the old file as ``….bak`` while the new one is written and verified; restore it where that fails."""
    old = path.with_name(f"{path.name}.bak")
    if old.exists():
        raise StorageError(f"'{old}' is there already, perhaps from a repair that was cut short: move it away first.")
    try:
        try:
            os.link(path, old)
        except OSError:  # a file system without links
            shutil.copy2(path, old)
    except OSError as error:
        raise storage_error("rename the old file", old, error) from error
    try:
        yield
    except BaseException:
        os.replace(old, path)
        raise
    with suppress(OSError):
        old.unlink()
