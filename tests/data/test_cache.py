"""The text cache: what is used longest ago goes first, what is in use stays, and nothing that is not ours is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onym.data import cache as text_cache
from onym.data.cache import DAY, HOUR, WEEK, Entry, bound, entries, prune
from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data.token_files import link_tokens
from onym.data.tokenise import tokenise
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import USED, open_tokens
from onym.data.train_tokenizer import cached_tokenizer
from onym.storage.lock import NoLocks


def make(folder: Path, cache: Path, name: str, lines: int = 400) -> Path:
    """Tokens of a text of their own, and the tokenizer that was trained on it; not in use."""
    text = folder / f"{name}.txt"
    text.write_text("".join(f"{name} has {n * n} things in line {n}\n" for n in range(lines)))
    found = survey(Corpus((str(text),)), 0.1)
    return tokenise(found, cached_tokenizer([found], 300, cache), cache).path


def aged(path: Path, seconds: float) -> Path:
    """As if it had been used, or written, that long ago."""
    for each in [*path.rglob("*"), path]:
        os.utime(each, (time.time() - seconds,) * 2)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three folders of tokens, used 1, 2 and 3 days ago; their tokenizers and a download, used 10 to 13 days ago."""
    cache = tmp_path / "cache"
    for number, name in enumerate(("new", "middle", "old")):
        aged(make(tmp_path, cache, name), (number + 1) * DAY)
    for number, path in enumerate(sorted((cache / "tokenizers").iterdir())):
        aged(path, (10 + number) * DAY)
    (cache / "downloads").mkdir()
    (cache / f"downloads/{'a' * 32}-web.jsonl").write_bytes(b"x" * 5000)
    aged(cache / f"downloads/{'a' * 32}-web.jsonl", 13 * DAY)
    return cache


def of_kind(cache: Path, kind: str) -> list[Entry]:
    return [entry for entry in entries(cache) if entry.kind == kind]


def corpora(cache: Path) -> list[str]:
    return [Path(entry.description["corpus"].strip("'")).stem for entry in of_kind(cache, "tokens")]


def total(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(processes: list[subprocess.Popen[str]], program: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python, once it has printed that it is ready; it ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{program}\nprint('ready', flush=True)\nsys.stdin.read()", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


OPENED = "from pathlib import Path\nfrom onym.data.tokens import open_tokens\ndata = open_tokens(Path(sys.argv[1]))"
LOCKED = """
import os
from pathlib import Path
from onym.storage.lock import lock
assert lock(Path(sys.argv[1]), os.O_RDWR | os.O_CREAT)
"""


def test_everything_is_listed_with_its_size_and_its_time(cache: Path) -> None:
    assert corpora(cache) == ["new", "middle", "old"]
    assert [len(of_kind(cache, kind)) for kind in ("tokens", "tokenizer", "download", "interrupted")] == [3, 3, 1, 0]
    assert sum(entry.bytes for entry in entries(cache)) == total(cache)
    for number, entry in enumerate(of_kind(cache, "tokens")):
        assert abs(time.time() - entry.used_at - (number + 1) * DAY) < 60
        assert not entry.in_use


def test_what_was_used_longest_ago_goes_first_and_no_more_than_must(cache: Path) -> None:
    before = total(cache)
    tokens = {entry.path.name: entry.bytes for entry in of_kind(cache, "tokens")}
    done = prune(cache, limit=sum(tokens.values()))
    assert {entry.kind for entry in done.deleted} == {"tokenizer", "download"}
    assert corpora(cache) == ["new", "middle", "old"]
    done = prune(cache, limit=sum(tokens.values()) - 1)
    assert [entry.kind for entry in done.deleted] == ["tokens"]
    assert corpora(cache) == ["new", "middle"]
    assert done.bytes_freed == done.deleted[0].bytes
    assert done.bytes_left == total(cache) < before
    assert prune(cache).deleted == (), "all of it is below the standard limit"
    assert not list((cache / "tokens").glob(".*")), "nothing is left aside"


def test_using_something_makes_it_new(cache: Path, tmp_path: Path) -> None:
    data = make(tmp_path, cache, "old")
    assert corpora(cache)[0] == "old"
    assert time.time() - of_kind(cache, "tokens")[0].used_at < 60
    assert time.time() - of_kind(cache, "tokenizer")[0].used_at < 60, "its tokenizer too"
    prune(cache, limit=0, idle_seconds=HOUR)
    assert [entry.path for entry in of_kind(cache, "tokens")] == [data]
    assert len(of_kind(cache, "tokenizer")) == 1
    prune(cache, limit=0, idle_seconds=0)
    assert entries(cache) == []


def test_what_a_process_has_open_stays_until_it_closes_it(cache: Path, other_process: list[subprocess.Popen[str]]) -> None:
    old = of_kind(cache, "tokens")[-1].path
    process = start(other_process, OPENED, old)
    aged(old, 30 * DAY)
    assert of_kind(cache, "tokens")[-1].in_use
    done = prune(cache, limit=0, idle_seconds=0)
    assert corpora(cache) == ["old"]
    assert [entry.path for entry in done.in_use] == [old]
    process.kill()
    process.wait()
    assert not of_kind(cache, "tokens")[0].in_use
    assert [entry.path for entry in prune(cache, limit=0, idle_seconds=0).deleted] == [old]
    assert not old.exists()


def test_in_one_process_too(cache: Path) -> None:
    data = open_tokens(of_kind(cache, "tokens")[-1].path)
    assert data is not None
    prune(cache, limit=0, idle_seconds=0)
    assert corpora(cache) == ["old"]
    del data
    prune(cache, limit=0, idle_seconds=0)
    assert corpora(cache) == []


def test_folders_that_another_one_names_are_in_use_with_it(cache: Path, tmp_path: Path) -> None:
    new, middle, old = (entry.path for entry in of_kind(cache, "tokens"))
    tokenizer = Tokenizer.from_json((middle / "tokenizer.json").read_text())
    (old / "tokenizer.json").write_text(tokenizer.to_json())  # tokens of two are not trained on together
    data = link_tokens((str(middle), str(old)), tokenizer, 0.1, cache)
    prune(cache, limit=0, idle_seconds=0)
    assert {entry.path for entry in of_kind(cache, "tokens")} == {middle, old, data.path}
    assert not new.exists()
    del data
    prune(cache, limit=0, idle_seconds=0)
    assert entries(cache) == []


def test_without_locks_the_time_decides_and_mapped_tokens_can_still_be_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise NoLocks

    for module in ("onym.data.tokens", "onym.data.cache"):
        monkeypatch.setattr(f"{module}.lock", no_locks)
    data = open_tokens(of_kind(cache, "tokens")[-1].path)
    assert data is not None
    before = data.train.read(0, len(data.train)).tolist()
    prune(cache, limit=0, idle_seconds=HOUR)
    assert corpora(cache) == ["old"], "opened just now"
    prune(cache, limit=0, idle_seconds=0)
    assert entries(cache) == []
    assert data.train.read(0, len(data.train)).tolist() == before


def test_after_training_only_what_was_idle_for_a_week_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "__defaults__", (1, HOUR))
    aged(of_kind(cache, "tokens")[-1].path, WEEK + HOUR)
    freed = sum(entry.bytes for entry in entries(cache) if time.time() - entry.used_at > WEEK)
    assert bound(cache) == freed > 0
    assert corpora(cache) == ["new", "middle"]
    assert [entry.kind for entry in entries(cache)] == ["tokens", "tokens"]


def test_what_interrupted_processes_left_goes_after_a_day(cache: Path, other_process: list[subprocess.Popen[str]]) -> None:
    key = "0" * 32
    for folder in (f"tokens/.writing-{key}", f"tokens/.writing-{'1' * 32}", "tokens/.writing-ab12", ".tokenizer-ab12"):
        (cache / folder / "inside").mkdir(parents=True)
        (cache / folder / "inside/text").write_text("text")
        aged(cache / folder, 2 * DAY)
    aged(cache / "tokens/.writing-ab12", 23 * HOUR)
    parts = [cache / f"downloads/{digit * 32}-x.txt.part" for digit in "bc"]
    for part in parts:
        part.write_text("text")
    start(other_process, LOCKED, cache / f"tokens/.lock-{key}")
    start(other_process, LOCKED, parts[0])
    for part in parts:
        aged(part, 2 * DAY)
    running = {cache / f"tokens/.writing-{key}", parts[0]}
    assert {entry.path for entry in of_kind(cache, "interrupted") if entry.in_use} == running
    deleted = {entry.path for entry in prune(cache).deleted}
    assert deleted == {cache / f"tokens/.writing-{'1' * 32}", cache / ".tokenizer-ab12", parts[1]}
    prune(cache, limit=0, idle_seconds=0)
    assert {entry.path for entry in of_kind(cache, "interrupted")} == running


def test_a_temporary_folder_that_was_just_written_to_stays_in_any_case(cache: Path) -> None:
    (cache / ".tokenizer-ab12").mkdir()
    (cache / f"tokens/.writing-{'1' * 32}").mkdir()
    prune(cache, limit=0, idle_seconds=0)
    assert [entry.path.name for entry in entries(cache)] == [".tokenizer-ab12"]


def test_downloads_stay_while_a_process_tokenises(cache: Path, other_process: list[subprocess.Popen[str]]) -> None:
    process = start(other_process, LOCKED, cache / f"tokens/.lock-{'0' * 32}")
    done = prune(cache, limit=0, idle_seconds=0)
    assert [entry.kind for entry in entries(cache)] == [entry.kind for entry in done.in_use] == ["download"]
    process.kill()
    process.wait()
    prune(cache, limit=0, idle_seconds=0)
    assert entries(cache) == []


def test_only_what_is_ours_by_its_name_is_deleted_and_no_link_followed(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    foreign = [cache / name for name in ("mine.txt", "tokens/notes", "tokenizers/mine.json", "downloads/data.zip")]
    foreign += [cache / f"tokens/{'e' * 32}", cache / f"compiled/{'f' * 16}/code.so"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("mine")
    (cache / f"tokens/{'d' * 32}").symlink_to(precious)
    (cache / "tokens/.writing-link").symlink_to(precious)
    (of_kind(cache, "tokens")[0].path / "link").symlink_to(precious)
    prune(cache, limit=0, idle_seconds=0)
    assert entries(cache) == []
    assert (precious / "thesis.txt").exists()
    assert all(path.exists() for path in foreign)


def test_a_damaged_folder_is_listed_and_can_go(cache: Path) -> None:
    new, middle, old = (entry.path for entry in of_kind(cache, "tokens"))
    (new / "tokens.json").write_text("{")
    (middle / "tokens.json").write_text("[1]")
    (old / USED).unlink()
    aged(old, 3 * DAY)
    assert [entry.description for entry in of_kind(cache, "tokens")][:2] == [{}, {}]
    prune(cache, limit=0, idle_seconds=0)
    assert entries(cache) == []


def test_of_a_folder_that_is_not_there_nothing_is_said(tmp_path: Path) -> None:
    assert entries(tmp_path / "absent") == []
    assert prune(tmp_path / "absent", limit=0).deleted == ()
    assert bound(tmp_path / "absent") == 0
    assert not (tmp_path / "absent").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may delete everything")
def test_what_may_not_be_deleted_stays_and_is_said(cache: Path) -> None:
    (cache / "tokens").chmod(0o555)
    try:
        assert len(prune(cache, limit=0, idle_seconds=0).in_use) == 3
        assert len(corpora(cache)) == 3
    finally:
        (cache / "tokens").chmod(0o755)


def test_a_prune_that_is_killed_leaves_a_whole_folder_or_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    new = of_kind(cache, "tokens")[0].path
    monkeypatch.setattr(text_cache.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(cache, limit=0, idle_seconds=0)
    assert all(open_tokens(entry.path) is not None for entry in of_kind(cache, "tokens"))
    assert new.exists()
