"""A power cut at any moment: a disk that forgets what was not flushed, or keeps it in another order.

Everything that changes a disk goes through ``disk.Disk``. Here it is done for real and written down; afterwards, for each
moment, the states are built that a disk may be left in: what was flushed is there, of the rest anything. A write to a file that
was not flushed may be there, be lost, or be a hole of zeros beside a later one; an entry of a folder that was not flushed may
be there or not, in any combination. All moments and more states with ONYM_PROVE=1 in the environment, else a sample.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import onym
from onym.checkpoint.steps import newest_good, step_folder, steps
from onym.format.reader import read_checkpoint
from onym.storage import local
from onym.storage.disk import Disk
from tests.kills import model_of, prepare, state, value_in

PROVE = bool(os.environ.get("ONYM_PROVE"))


@dataclass
class Change:
    """An entry of one folder or two that changes, in one step."""

    kind: str
    folders: tuple[int, ...]
    names: tuple[str, ...]
    nodes: tuple[int, ...]


@dataclass
class Write:
    node: int
    position: int
    data: bytes


@dataclass
class Flush:
    node: int


@dataclass
class Done:
    task: int


@dataclass
class Tree:
    """Folders and files by number."""

    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path, numbers: itertools.count[int]) -> Tree:
        tree = cls()

        def add(path: Path) -> int:
            number = next(numbers)
            if path.is_dir():
                tree.folders[number] = {}
                tree.folders[number] = {entry.name: add(entry) for entry in path.iterdir()}
            else:
                tree.files[number] = path.read_bytes()
            return number

        assert add(root) == 0
        return tree

    def copy(self) -> Tree:
        return Tree({number: dict(entries) for number, entries in self.folders.items()}, dict(self.files))

    def apply(self, change: Change) -> None:
        """Do it as far as it can be done: an earlier change may have been lost."""
        folders, names, nodes = change.folders, change.names, change.nodes
        for number in folders:
            self.folders.setdefault(number, {})
        if change.kind in ("create", "make_folder"):
            self.folders[folders[0]][names[0]] = nodes[0]
            if change.kind == "create":
                self.files.setdefault(nodes[0], b"")
            else:
                self.folders.setdefault(nodes[0], {})
        elif change.kind == "remove":
            if self.folders[folders[0]].get(names[0]) == nodes[0]:
                del self.folders[folders[0]][names[0]]
        elif change.kind == "rename":
            if self.folders[folders[0]].get(names[0]) == nodes[0]:
                del self.folders[folders[0]][names[0]]
            self.folders[folders[1]][names[1]] = nodes[0]
        else:
            self.folders[folders[0]][names[0]], self.folders[folders[1]][names[1]] = nodes[1], nodes[0]

    def write_to(self, root: Path) -> None:
        def put(number: int, path: Path) -> None:
            if number in self.folders:
                path.mkdir()
                for name, entry in self.folders[number].items():
                    put(entry, path / name)
            else:
                path.write_bytes(self.files.get(number, b""))

        put(0, root)


class Recorder(Disk):
    """The real disk, with everything written down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers = itertools.count()
        self.before = Tree.read(root, self.numbers)
        self.now = self.before.copy()
        self.log: list[Change | Write | Flush | Done] = []
        self.open: dict[int, int] = {}

    def place(self, path: Path) -> tuple[int, str]:
        number = 0
        parts = path.relative_to(self.root).parts
        for part in parts[:-1]:
            number = self.now.folders[number][part]
        return number, parts[-1]

    def node(self, path: Path) -> int:
        if path == self.root:
            return 0
        folder, name = self.place(path)
        return self.now.folders[folder][name]

    def note(self, kind: str, *paths: Path, nodes: tuple[int, ...]) -> None:
        places = [self.place(path) for path in paths]
        change = Change(kind, tuple(folder for folder, _ in places), tuple(name for _, name in places), nodes)
        self.now.apply(change)
        self.log.append(change)

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self.open[descriptor] = next(self.numbers)
        self.note("create", path, nodes=(self.open[descriptor],))
        return descriptor

    def write(self, descriptor: int, data: memoryview, position: int) -> int:
        done = super().write(descriptor, data, position)
        self.log.append(Write(self.open[descriptor], position, bytes(data[:done])))
        return done

    def flush(self, descriptor: int) -> None:
        super().flush(descriptor)
        self.log.append(Flush(self.open[descriptor]))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.note("make_folder", path, nodes=(next(self.numbers),))

    def flush_folder(self, path: Path) -> None:
        super().flush_folder(path)
        self.log.append(Flush(self.node(path)))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.note("rename", source, target, nodes=(self.node(source),))

    def exchange(self, one: Path, other: Path) -> bool:
        assert super().exchange(one, other)
        self.note("exchange", one, other, nodes=(self.node(one), self.node(other)))
        return True

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self.note("remove", path, nodes=(self.node(path),))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.note("remove", path, nodes=(self.node(path),))


def after_a_cut(recorder: Recorder, moment: int, chance: random.Random, kept: float) -> Tree:
    """The disk as it may be: what was flushed before the moment, and of the rest each change with a probability.

    Of a rename between two folders the flush of the one that it leads to counts.
    """
    log = recorder.log[:moment]
    flushed: dict[int, int] = {entry.node: index for index, entry in enumerate(log) if isinstance(entry, Flush)}
    tree = recorder.before.copy()
    contents = {number: bytearray(content) for number, content in tree.files.items()}
    for index, entry in enumerate(log):
        if isinstance(entry, Change):
            if flushed.get(entry.folders[-1], -1) > index or chance.random() < kept:
                tree.apply(entry)
        elif isinstance(entry, Write) and (flushed.get(entry.node, -1) > index or chance.random() < kept):
            content = contents.setdefault(entry.node, bytearray())
            content.extend(bytes(max(0, entry.position - len(content))))
            content[entry.position : entry.position + len(entry.data)] = entry.data
    tree.files |= {number: bytes(content) for number, content in contents.items()}
    return tree


def record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    root = folder / "disk"
    root.mkdir()
    prepare(root)
    recorder = Recorder(root)
    with monkeypatch.context() as patch:
        patch.setattr(local, "disk", recorder)
        checkpointer = onym.Checkpointer(root / "run", keep_last=2, background=False)
        for step in (3, 4):
            checkpointer.save(step, state(step))
            recorder.log.append(Done(step))
        for number, name in enumerate(("m.safetensors", "m.pth", "m"), start=5):
            onym.save(model_of(1), root / name)
            recorder.log.append(Done(number))
        checkpointer.close()
    return recorder


def examine(root: Path, done: int) -> None:
    run = root / "run"
    found = newest_good(run)
    assert found is not None
    newest = found.checkpoint.manifest.step if found.checkpoint.manifest else None
    assert newest in ((2, 3), (3, 4))[done - 2] if done < 4 else newest == 4, f"step {newest} is the newest, {done} was told"
    assert value_in(step_folder(run, newest or 0)) == newest
    for number, name in enumerate(("m.safetensors", "m.pth", "m"), start=5):
        value = value_in(root / name)
        assert value == 1 if done >= number else value in (0, 1), f"{name} is {value}"
    with onym.Checkpointer(run, keep_last=2, background=False) as checkpointer:
        checkpointer.save(9, state(9))
    assert value_in(run) == 9


def try_all(folder: Path, recorder: Recorder, seeds: int, every: int) -> int:
    tried = 0
    for moment in range(0, len(recorder.log) + 1, every):
        done = max((entry.task for entry in recorder.log[:moment] if isinstance(entry, Done)), default=2)
        for seed in range(seeds):
            kept = (0.0, 1.0, 0.5, 0.9, 0.1)[seed % 5]
            root = folder / "after"
            shutil.rmtree(root, ignore_errors=True)
            after_a_cut(recorder, moment, random.Random(f"{moment} {seed}"), kept).write_to(root)
            try:
                examine(root, done)
            except BaseException as error:
                at = recorder.log[moment - 1] if moment else "the beginning"
                raise AssertionError(
                    f"power cut after {moment} ({str(at)[:80]}), keeping {kept}, seed {seed}: {error}"
                ) from error
            tried += 1
    return tried


def test_a_power_cut_at_any_moment_loses_nothing_that_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(tmp_path, monkeypatch)
    tried = try_all(tmp_path, recorder, *((25, 1) if PROVE else (3, 4)))
    print(f"{len(recorder.log)} moments, {tried} states tried")
    assert tried > 100


@pytest.mark.parametrize("forgotten", ["flush", "flush_folder"])
def test_a_writer_that_does_not_flush_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """The proof can fail."""
    recorder = record(tmp_path, monkeypatch)
    files = set(recorder.before.files) | {entry.node for entry in recorder.log if isinstance(entry, Write)}
    recorder.log = [
        entry for entry in recorder.log if not (isinstance(entry, Flush) and (entry.node in files) == (forgotten == "flush"))
    ]
    with pytest.raises(AssertionError, match="power cut after"):
        try_all(tmp_path, recorder, 5, 1)


def test_the_simulated_disk_ends_as_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(tmp_path, monkeypatch)
    after_a_cut(recorder, len(recorder.log), random.Random(0), 1.0).write_to(tmp_path / "after")
    real, simulated = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "disk", tmp_path / "after")
    )
    assert real == simulated
    assert [read_checkpoint(step_folder(tmp_path / "after" / "run", step)) for step in steps(tmp_path / "after" / "run")]
