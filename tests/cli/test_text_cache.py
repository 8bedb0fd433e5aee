"""cache: tokenised text is listed beside compiled code, and pruned; clear leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from onym.data.cache import DAY, HOUR
from onym.data.tokens import USED, open_tokens
from tests.cli.test_inspect import told
from tests.conftest import Run
from tests.data.test_cache import aged, make


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """That of the command: two folders of tokens, used a day and two days ago, their tokenizers, a download."""
    cache = tmp_path / "cache"
    for number, name in enumerate(("new", "old")):
        aged(make(tmp_path, cache, name), (number + 1) * DAY)
    (cache / "downloads").mkdir()
    (cache / f"downloads/{'a' * 32}-web.jsonl").write_bytes(b"x" * 5000)
    for path in [*(cache / "tokenizers").iterdir(), *(cache / "downloads").iterdir()]:
        aged(path, 3 * DAY)
    return cache


def keys(cache: Path) -> list[str]:
    """Of the token folders, what was used last first."""
    folders = [path for path in (cache / "tokens").iterdir() if not path.name.startswith(".")]
    return [path.name for path in sorted(folders, key=lambda path: -(path / USED).stat().st_mtime)]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_tokenising_left_is_listed(onym: Run, cache: Path) -> None:
    new, old = keys(cache)
    open_now = open_tokens(cache / "tokens" / new)
    assert open_now is not None
    (cache / "tokens/.writing-ab12").mkdir()
    text = told(onym, "tools", "cache")["text"]
    assert text["bytes"] == size(cache)
    assert text["limit_bytes"] == 50_000_000_000
    assert [(each["key"], each["in_use"]) for each in text["tokens"]] == [(new, True), (old, False)]
    assert text["tokens"][0]["tokens"] == len(open_now.train) + len(open_now.held_out)
    assert text["tokens"][1]["bytes"] == size(cache / "tokens" / old)
    assert "old.txt" in text["tokens"][1]["corpus"]
    assert text["tokenizers"] == {"count": 2, "bytes": size(cache / "tokenizers")}
    assert text["downloads"] == {"count": 1, "bytes": 5000}
    assert [Path(each["path"]).name for each in text["interrupted"]] == [".writing-ab12"]
    listed = onym("tools", "cache").stdout
    assert "Compiled code in" in listed
    assert "Nothing is there yet" in listed, "of compiled code"
    lines = listed.splitlines()
    assert "in use" in next(line for line in lines if new in line)
    assert "2 days ago" in next(line for line in lines if old in line)
    assert "downloads   1, 5.0 kB" in listed
    assert "1 left by interrupted processes" in listed


def test_pruning_says_what_it_freed(onym: Run, cache: Path) -> None:
    new, old = keys(cache)
    assert onym("tools", "cache", "prune").stdout.startswith("0 bytes freed. "), "far below the standard limit"
    before = size(cache)
    done = told(onym, "tools", "cache", "prune", "--limit", f"{size(cache / 'tokens')}")
    assert sorted(each["kind"] for each in done["deleted"]) == ["download", "tokenizer", "tokenizer"]
    assert done["bytes"] == before - size(cache) == before - done["bytes_left"]
    assert keys(cache) == [new, old]
    said = onym("tools", "cache", "prune", "--limit", f"{size(cache / 'tokens') - 1}").stdout
    assert "freed: 1 token folder." in said
    assert keys(cache) == [new]


def test_what_is_in_use_or_was_just_now_stays(onym: Run, cache: Path) -> None:
    new, old = keys(cache)
    data = open_tokens(cache / "tokens" / old)
    assert data is not None
    aged(cache / "tokens" / new, HOUR / 2)
    said = onym("tools", "cache", "prune", "--limit", "1KB").stdout
    assert "used within the last hour" in said
    assert "--limit 0 deletes that too" in said
    assert set(keys(cache)) == {new, old}
    done = told(onym, "tools", "cache", "prune", "--limit", "0")
    assert [Path(each["path"]).name for each in done["in_use"]] == [old]
    assert keys(cache) == [old]
    assert f"another process uses it: {old}" in onym("tools", "cache", "prune", "--limit", "0").stdout
    del data
    assert onym("tools", "cache", "prune", "--limit", "0").stdout.endswith("0 bytes left.\n")
    assert keys(cache) == []


def test_clear_is_about_compiled_code_and_says_so(onym: Run, cache: Path) -> None:
    before = size(cache)
    said = onym("tools", "cache", "clear").stdout
    assert "0 bytes of compiled code freed." in said
    assert "Tokenised text stays: onym tools cache prune --limit 0 deletes it." in said
    assert size(cache) == before


def test_another_folder_can_be_named(onym: Run, cache: Path, tmp_path: Path) -> None:
    cache.rename(tmp_path / "elsewhere")
    assert "No text was tokenised yet" in onym("tools", "cache").stdout
    assert len(told(onym, "tools", "cache", "--cache-dir", "elsewhere")["text"]["tokens"]) == 2
    assert told(onym, "tools", "cache", "prune", "--limit", "0", "--cache-dir", "elsewhere")["bytes_left"] == 0
    assert keys(tmp_path / "elsewhere") == []
