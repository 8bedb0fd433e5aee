"""Compiled code is found again by the next process, and by nobody and nothing that it is not for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from onym.cli.main import main
from onym.compile import cache, inductor
from onym.compile.cache import ABOUT, bound, open_folder, root, warm_start
from onym.compile.cache_key import facts, key_of
from onym.compile.inductor import Counts
from onym.errors import StorageError
from tests.conftest import TINY_RUN, Run

# One step of a training, as the loop takes it, in a process of its own.
PROGRAM = """
import json, os, torch
from onym import GPT, GPTConfig
from onym.compile.cache import warm_start
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper
compute = choose_compute("cpu", "fp32")
compute.set_deterministic(False)
model = GPT(GPTConfig(vocab_size=61, context_length=16, emb_dim=16, n_heads=2, n_layers=1))
stepper = Stepper(model, OptimizationOptions(), compute)
batch = torch.zeros(2, 2, 16, dtype=torch.int64).unbind()
notes = []
with warm_start(True, notes.append) as warm:
    compilation, _ = prepare(stepper, batch, [2], "whole")
place = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
print(json.dumps([compilation.compiled, warm.counts.found, warm.counts.made, str(warm), notes, place]))
"""


@dataclass(frozen=True)
class Told:
    compiled: bool
    found: int
    made: int
    line: str
    notes: list[str]
    place: str | None
    compilations: int
    """Calls of the C++ compiler that made something."""


Start = Callable[[], Told]


@dataclass(frozen=True)
class Machine:
    """A cache, and a C++ compiler that writes down what it is asked for."""

    path: Path

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR", "TRITON"))}
        return inherited | {
            "ONYM_CACHE_DIR": str(self.cache),
            "CXX": str(self.path / "g++"),
            "TMPDIR": str(self.path / "tmp"),  # nothing is found there, as after a restart
        }

    def start(self, program: str = PROGRAM) -> Told:
        log = self.path / "asked"
        log.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=self.path, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        made = [line for line in log.read_text().splitlines() if ".so" in line or "c++-header" in line]
        return Told(*json.loads(done.stdout.splitlines()[-1]), len(made))  # type: ignore[misc]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    made = Machine(tmp_path_factory.mktemp("machine"))
    (made.path / "tmp").mkdir()
    compiler = made.path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {made.path}/asked\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def cold(machine: Machine) -> Told:
    return machine.start()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this process's own, that torch is not pointed at by the tests."""
    monkeypatch.setenv("ONYM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(inductor, "_set_here", {})
    monkeypatch.setattr(cache, "point_at", lambda folder: None)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path / "cache" / "compiled"


def libraries(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*.so")}


def test_the_next_process_finds_everything_compiled(machine: Machine, cold: Told) -> None:
    assert cold.compiled
    assert cold.found == 0
    assert cold.made == 2, "forward and backward"
    assert cold.line == "; cold"
    assert cold.compilations > 5
    assert cold.place is not None
    assert Path(cold.place).parent == machine.cache / "compiled"
    before = libraries(machine.cache)

    shutil.rmtree(machine.path / "tmp")  # as after a restart of the machine
    (machine.path / "tmp").mkdir()
    warm = machine.start()
    assert (warm.compiled, warm.found, warm.made) == (True, 2, 0)
    assert warm.line == "; warm, 2 graphs from the cache"
    assert warm.compilations == 0
    assert libraries(machine.cache) == before
    assert not list((machine.path / "tmp").rglob("*.gch")), "the precompiled header is kept in the cache too"


def test_what_a_killed_compiler_left_is_made_anew(machine: Machine, cold: Told) -> None:
    """Two libraries as a linker leaves them that is killed: empty, and without the header, which is written last."""
    one, other = sorted(path for path in (machine.cache / "compiled").rglob("*.main.so"))[:2]
    whole = other.stat().st_size
    one.write_bytes(b"")
    other.write_bytes(bytes(whole // 2))
    told = machine.start()
    assert told.compiled
    assert told.compilations == 2
    assert one.stat().st_size > 0
    assert other.read_bytes()[:4] == b"\x7fELF"
    assert machine.start().compilations == 0


def test_moved_on_purpose_the_cpp_objects_come_along(
    machine: Machine, cold: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    file = machine.path / "moved.tar.gz"
    assert main(["tools", "cache", "export", str(file)]) == 0
    assert "It is code" in capsys.readouterr().out
    assert main(["tools", "cache", "clear"]) == 0
    assert not libraries(machine.cache)
    assert main(["tools", "cache", "import", str(file)]) == 2
    assert "--i-trust-it" in capsys.readouterr().err
    assert not libraries(machine.cache)
    assert main(["tools", "cache", "import", str(file), "--i-trust-it"]) == 0
    warm = machine.start()
    assert (warm.compiled, warm.found, warm.made, warm.compilations) == (True, 2, 0, 0)


def test_no_option_of_a_run_says_where_code_is_taken_from(
    onym_process: Run, book: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A run that came from elsewhere brings its options along, and whatever lies in its folder."""
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    environment["CXX"] = str(tmp_path / "absent")  # where nothing can be compiled it is seen just as well, and sooner
    known = {**facts(), "C++ compiler": "none"}
    planted = tmp_path / "runs" / "book" / "compiled" / key_of(known)
    put(planted, ABOUT, 10, 1)
    put(planted, "aa/code.so", 10, 1)
    done = onym_process(
        "train", "--data", book, *TINY_RUN, "--compile", "whole", "--time-limit", "1s", "--cache-dir", planted.parent.parent
    )
    assert done.returncode == 75, done.stderr
    assert "Going on without torch.compile" in done.stdout + done.stderr
    assert sorted(path.name for path in planted.rglob("*")) == ["aa", ABOUT, "code.so"]
    assert (tmp_path / "cache" / "compiled" / planted.name / ABOUT).exists()
    assert (planted / ABOUT).read_bytes() == bytes(10)


@pytest.mark.parametrize("fact", sorted(facts()))
def test_the_key_changes_with_each_fact(fact: str) -> None:
    known = facts()
    assert key_of(known) == key_of(dict(reversed(known.items())))
    assert key_of({**known, fact: known[fact] + "x"}) != key_of(known)


def test_the_facts_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = facts()
    other = tmp_path / "c++"
    other.write_text("#!/bin/sh\necho another compiler 99\n")
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert facts() == {**before, "C++ compiler": "another compiler 99"}
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert facts()["C++ compiler"] == "none"


def test_a_place_that_the_user_set_is_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    with warm_start(True, pytest.fail):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert not here.exists()


def test_nothing_is_made_where_nothing_is_compiled(here: Path) -> None:
    with warm_start(False, pytest.fail) as warm:
        assert str(warm) == ""
    assert not here.exists()


def test_only_its_owner_can_look_in(here: Path) -> None:
    folder = open_folder()
    assert [path.stat().st_mode & 0o777 for path in (here, folder)] == [0o700, 0o700]
    assert json.loads((folder / ABOUT).read_text()) == facts()
    assert root() == here


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_folder_that_others_could_write_to_is_not_used(here: Path, level: int) -> None:
    folder = open_folder()
    (folder, here, here.parent)[level].chmod(0o777)
    notes: list[str] = []
    with warm_start(True, notes.append):
        pass
    assert len(notes) == 1
    assert "can be written by others" in notes[0]
    assert "ONYM_CACHE_DIR" in notes[0]


def test_a_folder_of_another_user_is_not_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    here.parent.chmod(0o1777)  # as /tmp
    with pytest.raises(StorageError, match="is another's"):
        open_folder()


def test_a_link_is_not_followed_to_somewhere_else(here: Path, tmp_path: Path) -> None:
    folder = open_folder()
    shutil.move(folder, tmp_path / "planted")
    folder.symlink_to(tmp_path / "planted")
    with pytest.raises(StorageError, match="is no folder"):
        open_folder()


def test_a_cache_that_cannot_be_written_does_not_stop_training(here: Path) -> None:
    here.parent.write_text("a file where the folder would be")
    notes: list[str] = []
    with warm_start(True, notes.append):
        pass
    assert len(notes) == 1
    assert notes[0].startswith("Compiled code is not cached for the next start. Could not write at ")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_cache_does_not_stop_training(here: Path) -> None:
    """Of a file system that is read-only, to root too."""
    here.parent.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", here.parent], check=False).returncode:
        pytest.skip("this system does not let us mount a tmpfs")
    try:
        notes: list[str] = []
        with warm_start(True, notes.append):
            pass
    finally:
        subprocess.run(["umount", here.parent], check=True)
    assert len(notes) == 1
    assert notes[0].startswith("Compiled code is not cached for the next start. Could not write at ")


def put(folder: Path, name: str, size: int, days_ago: float) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    then = time.time() - 86_400 * days_ago
    os.utime(path, (then, then))
    return path


def test_the_size_is_bounded_and_what_was_used_longest_ago_goes_first(here: Path) -> None:
    mine = open_folder()
    old, older, recent = ("0" * 16, "1" * 16, "2" * 16)
    for key, days in ((old, 20), (older, 30), (recent, 1)):
        put(here / key, "aa/code.so", 1000, days)
        put(here / key, ABOUT, 2, days)
    put(here, "notes.txt", 1000, 100)
    total = sum(entry.size for entry in cache.entries())
    assert bound(total) == 0
    assert bound(total - 1) == 1002
    assert {entry.key for entry in cache.entries()} == {mine.name, old, recent}
    assert bound(total - 1500) == 1002
    assert {entry.key for entry in cache.entries()} == {mine.name, recent}
    assert (here / "notes.txt").exists(), "what is not a key is not ours"


def test_the_files_of_a_gpu_kernel_go_together(here: Path) -> None:
    mine = open_folder()
    kernels = [
        [put(mine, f"triton/0/{name}/a.{kind}", 1000, days) for kind in ("cubin", "json")]
        for name, days in (("A", 9), ("B", 3))
    ]
    assert bound(sum(entry.size for entry in cache.entries()) - 1) == 2000
    assert [[file.exists() for file in files] for files in kernels] == [[False, False], [True, True]]


def test_of_this_machines_key_files_go_but_not_those_just_used(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = open_folder()
    unused = [put(mine, f"aa/{number}.so", 1000, 10 - number) for number in range(5)]
    name = "c" + "a" * 51
    used = [put(mine, f"aa/{name}.py", 1000, 50), put(mine, "fxgraph/aa/fkey/entry", 1000, 50)]
    used[1].write_bytes(b"\x00pickled " + name.encode() + b"\x00")
    module = type(sys)("found_compiled")
    module.__file__ = str(used[0])
    monkeypatch.setitem(sys.modules, "found_compiled", module)
    size = sum(entry.size for entry in cache.entries())
    assert bound(size - 1500) == 2000
    assert [path.exists() for path in unused] == [False, False, True, True, True]
    bound(0)
    assert not any(path.exists() for path in unused)
    assert all(path.exists() for path in used)
    assert (mine / ABOUT).exists()


def test_what_another_process_compiles_into_stays(here: Path) -> None:
    mine = open_folder()
    put(mine, "aa/code.so", 1000, 10)
    other = put(here / ("0" * 16), "aa/code.so", 1000, 10).parent.parent
    holding = [cache._lock(folder, alone=False) for folder in (mine, other)]
    try:
        assert bound(0) == 0
        assert cache.clear() == (0, [mine.name, other.name])
    finally:
        for descriptor in holding:
            assert descriptor is not None
            os.close(descriptor)
    freed, busy = cache.clear()
    assert freed > 2000
    assert busy == []
    assert cache.entries() == []


@pytest.mark.parametrize(
    ("found", "made", "says"),
    [(0, 0, ""), (2, 0, "warm, 2 graphs from the cache"), (1, 1, "1 of 2 graphs from the cache"), (0, 1, "cold")],
)
def test_what_was_found_is_said(found: int, made: int, says: str) -> None:
    assert str(Counts(found, made)) == says
