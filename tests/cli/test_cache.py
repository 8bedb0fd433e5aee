"""cache: compiled code is listed, moved on purpose, deleted; and an archive that is not one of ours changes nothing.

Tokenised text is in test_text_cache.py.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from onym.compile import archive, cache
from onym.compile.cache_key import facts, key_of
from tests.cli.test_inspect import told
from tests.conftest import Run

Entry = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's, with three files in it."""
    monkeypatch.setenv("ONYM_CACHE_DIR", str(tmp_path / "cache"))
    made = cache.open_folder()
    for name in ("aa/code.so", "fxgraph/bb/entry", "locks/x.lock"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(name.encode())
    return made


def entry(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content) if kind == tarfile.REGTYPE else 0, kind, link
    return info, content


def about(**changes: str) -> Entry:
    here = facts()
    known = {**here, **{name.replace("_", " "): value for name, value in changes.items()}}
    return entry(f"{key_of(here)}/about.json", json.dumps(known).encode())


def pack(path: Path, *entries: Entry) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_it_says_where_it_is_and_what_for(onym: Run, folder: Path) -> None:
    listed = onym("tools", "cache").stdout
    assert str(folder.parent) in listed.replace("\n", "")
    assert f"*  {folder.name}" in listed
    assert "just now" in listed
    result = told(onym, "tools", "cache")
    assert result["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert result["this_machine"] == {"key": folder.name, "about": facts()}
    assert [(each["key"], each["this_machine"], each["about"]) for each in result["keys"]] == [(folder.name, True, facts())]


def test_of_an_empty_cache_it_says_that_it_is_empty(onym: Run) -> None:
    assert "Nothing is there yet" in onym("tools", "cache").stdout
    assert told(onym, "tools", "cache")["keys"] == []
    assert told(onym, "tools", "cache", "clear") == {"bytes": 0, "in_use": []}
    done = onym("tools", "cache", "export", "x.tar.gz")
    assert done.returncode == 2
    assert "There is no compiled code of this machine" in done.stderr


def test_what_was_exported_comes_back(onym: Run, folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    assert told(onym, "tools", "cache", "export", "moved.tar.gz")["files"] == 3, "locks stay where they are"
    assert told(onym, "tools", "cache", "clear")["bytes"] == sum(map(len, before.values()))
    assert not folder.exists()
    assert told(onym, "tools", "cache", "import", "moved.tar.gz", "--i-trust-it")["added"] == 2, "about.json is there already"
    assert contents(folder) == {name: content for name, content in before.items() if "locks" not in name}
    assert {path.stat().st_mode & 0o077 for path in folder.rglob("*.so")} == {0}


def test_what_is_there_already_stays(onym: Run, folder: Path) -> None:
    assert onym("tools", "cache", "export", "moved.tar.gz").returncode == 0
    (folder / "aa/code.so").write_bytes(b"newer")
    (folder / "fxgraph/bb/entry").unlink()
    assert told(onym, "tools", "cache", "import", "moved.tar.gz", "--i-trust-it")["added"] == 1
    assert (folder / "aa/code.so").read_bytes() == b"newer"


def test_without_trust_nothing_is_read(onym: Run, folder: Path) -> None:
    done = onym("tools", "cache", "import", "absent.tar.gz")
    assert done.returncode == 2
    assert "would run with your rights" in done.stderr
    assert "--i-trust-it" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("fact", ["torch", "processor", "C++ compiler", "torch's folder"])
def test_code_for_another_machine_is_refused_with_what_differs(onym: Run, folder: Path, tmp_path: Path, fact: str) -> None:
    key = folder.name
    pack(tmp_path / "x.tar.gz", about(**{fact: "quite another"}), entry(f"{key}/aa/new.so"))
    done = onym("tools", "cache", "import", "x.tar.gz", "--i-trust-it")
    assert done.returncode == 2
    assert f"another machine, {fact}: 'quite another' there, " in done.stderr
    assert not (folder / "aa/new.so").exists()


HOSTILE: dict[str, tuple[Callable[[str], list[Entry]], str]] = {
    "a way out": (lambda key: [about(), entry(f"{key}/../../out.so")], "leads out of it"),
    "a way out by its first part": (lambda key: [about(), entry("../out.so")], "leads out of it"),
    "an absolute name": (lambda key: [about(), entry("/tmp/onym-hostile.so")], "leads out of it"),
    "a name of Windows": (lambda key: [about(), entry(f"{key}/..\\out.so")], "leads out of it"),
    "a drive": (lambda key: [about(), entry(f"{key}/C:out.so")], "leads out of it"),
    "a control character": (lambda key: [about(), entry(f"{key}/a\x1b[2J.so")], "leads out of it"),
    "another key": (lambda key: [about(), entry(f"{'0' * 16}/aa/x.so")], "does not belong there"),
    "a file twice": (lambda key: [about(), entry(f"{key}/aa/x"), entry(f"{key}/aa/x")], "does not belong there"),
    "a link": (lambda key: [about(), entry(f"{key}/aa", b"", tarfile.SYMTYPE, "/etc")], "no plain file"),
    "a hard link": (lambda key: [about(), entry(f"{key}/x", b"", tarfile.LNKTYPE, "/etc/passwd")], "no plain file"),
    "a device": (lambda key: [about(), entry(f"{key}/x", b"", tarfile.CHRTYPE)], "no plain file"),
    "a pipe": (lambda key: [about(), entry(f"{key}/x", b"", tarfile.FIFOTYPE)], "no plain file"),
    "a sparse file": (lambda key: [about(), entry(f"{key}/x", b"", tarfile.GNUTYPE_SPARSE)], "Nothing was imported"),
    "a file that is a folder too": (lambda key: [about(), entry(f"{key}/aa"), entry(f"{key}/aa/x")], ""),
    "no facts": (lambda key: [entry(f"{key}/aa/x.so")], "does not begin with about.json"),
    "facts that are none": (lambda key: [entry(f"{key}/about.json", b"[1]")], "no object of texts"),
    "nothing": (lambda key: [], "empty"),
    "a name that is a megabyte": (lambda key: [about(), entry(f"{key}/{'a' * (2 << 20)}")], "too large"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_changes_nothing(onym: Run, folder: Path, tmp_path: Path, what: str) -> None:
    entries, says = HOSTILE[what]
    pack(tmp_path / "x.tar.gz", *entries(folder.name))
    before = contents(tmp_path)
    done = onym("tools", "cache", "import", "x.tar.gz", "--i-trust-it")
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert contents(tmp_path) == before
    assert not Path("/tmp/onym-hostile.so").exists()


def test_an_archive_that_would_fill_the_disk_is_refused_before_it_does(
    onym: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LIMIT_BYTES", 10 << 20)
    pack(tmp_path / "x.tar.gz", about(), entry(f"{folder.name}/aa/zeros", bytes(20 << 20)))
    assert (tmp_path / "x.tar.gz").stat().st_size < 1 << 20
    before = contents(folder)
    done = onym("tools", "cache", "import", "x.tar.gz", "--i-trust-it")
    assert done.returncode == 2
    assert "larger than 10 MiB" in done.stderr
    assert contents(folder) == before
    monkeypatch.setattr(cache, "LIMIT_BYTES", 1 << 30)
    monkeypatch.setattr(archive, "_MOST_FILES", 1)
    assert onym("tools", "cache", "import", "x.tar.gz", "--i-trust-it").returncode == 2


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.999])
def test_an_archive_that_was_cut_off_changes_nothing(onym: Run, folder: Path, tmp_path: Path, cut: float) -> None:
    assert onym("tools", "cache", "export", "x.tar.gz").returncode == 0
    whole = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: int(len(whole) * cut)])
    before = contents(folder)
    done = onym("tools", "cache", "import", "x.tar.gz", "--i-trust-it")
    assert done.returncode == 2
    assert "Nothing was imported" in done.stderr
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("export",), "onym tools cache export needs a file"),
        (("import",), "onym tools cache import needs a file"),
        (("list", "x"), "onym tools cache list takes no file"),
        (("clear", "x"), "onym tools cache clear takes no file"),
        (("prune", "x"), "onym tools cache prune takes no file"),
        (("clear", "--limit", "1GB"), "onym tools cache clear takes no --limit"),
        (("prune", "--limit", "much"), "--limit 'much' is no size"),
        (("prune", "--limit", "0.5"), "--limit '0.5' is no size"),
        (("import", "absent.tar.gz", "--i-trust-it"), "read the archive"),
        (("export", "absent/x.tar.gz"), "write the compiled code"),
    ],
)
def test_bad_input_is_a_sentence(onym: Run, folder: Path, arguments: tuple[str, ...], says: str) -> None:
    done = onym("tools", "cache", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
