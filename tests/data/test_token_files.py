"""Token files of others: nanoGPT's and llm.c's, and folders of our own, mapped where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data.token_files import is_token_data, link_tokens, tokenizer_of
from onym.data.tokenise import tokenise
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import open_tokens, relink_cache, shards_of
from onym.errors import DataError

TOKENIZER = Tokenizer.train([f"document {n} of {n * n} lines\n" for n in range(300)], 300)
END = TOKENIZER.end_of_text


def documents(first: int, count: int) -> list[int]:
    return [token for n in range(first, first + count) for token in (*TOKENIZER.encode(f"document {n} of lines\n"), END)]


def nanogpt(folder: Path, *, val: bool = True) -> Path:
    """As its prepare.py writes: np.memmap of uint16, no header."""
    folder.mkdir()
    np.array(documents(0, 300), dtype=np.uint16).tofile(folder / "train.bin")
    if val:
        np.array(documents(900, 20), dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def llm_c(path: Path, tokens: list[int], dtype: type, magic: int, version: int) -> None:
    """As its dev/data/data_common.py writes."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=dtype).tobytes())


def test_nanogpts_folder(tmp_path: Path) -> None:
    data = (str(nanogpt(tmp_path / "openwebtext")),)
    assert is_token_data(data)
    tokens = link_tokens(data, TOKENIZER, 0.1, tmp_path / "cache")
    assert tokens.train.read(0, 10**6).tolist() == documents(0, 300)
    assert tokens.held_out.read(0, 10**6).tolist() == documents(900, 20)
    assert isinstance(tokens.train.shards[0], np.memmap)
    starts = tokens.train.document_starts
    assert len(starts) == 300
    assert TOKENIZER.decode(tokens.train.read(int(starts[7]), int(starts[8]) - 1)) == "document 7 of lines\n"
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.bin")) == 0, "nothing is copied"
    assert link_tokens(data, TOKENIZER, 0.1, tmp_path / "cache").path == tokens.path


def test_without_a_held_out_file_the_end_is_held_out(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "a", val=False)
    np.array(documents(500, 100), dtype=np.uint16).tofile(folder / "train_2.bin")
    tokens = link_tokens((str(folder / "*.bin"),), TOKENIZER, 0.1, tmp_path / "cache")
    every = documents(0, 300) + documents(500, 100)
    assert len(tokens.held_out) == len(every) // 10
    assert tokens.train.read(0, 10**6).tolist() + tokens.held_out.read(0, 10**6).tolist() == every
    assert tokens.held_out.document_starts[0] == 0


@pytest.mark.parametrize(("dtype", "magic", "version"), [(np.uint16, 20240520, 1), (np.uint32, 20240801, 7)])
def test_llm_cs_shards(tmp_path: Path, dtype: type, magic: int, version: int) -> None:
    for number in range(1, 4):
        llm_c(tmp_path / f"fineweb_train_{number:06}.bin", documents(number * 100, 100), dtype, magic, version)
    llm_c(tmp_path / "fineweb_val_000000.bin", documents(0, 30), dtype, magic, version)
    tokens = link_tokens((str(tmp_path),), TOKENIZER, 0.1, tmp_path / "cache")
    assert tokens.train.dtype == dtype
    assert tokens.train.read(0, 10**6).tolist() == documents(100, 300)
    assert tokens.held_out.read(0, 10**6).tolist() == documents(0, 30)


def test_folders_of_our_own_are_joined_and_bring_their_tokenizer(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(50):
            (tmp_path / name / f"{number}.txt").write_text(f"document {name} {number} of lines\n")
        made.append(tokenise(survey(Corpus((str(tmp_path / name),)), 0.2), TOKENIZER, tmp_path / "cache"))
    data = tuple(str(each.path) for each in made)
    assert is_token_data(data)
    assert tokenizer_of(data).to_json() == TOKENIZER.to_json()
    joined = link_tokens(data, TOKENIZER, 0.1, tmp_path / "cache")
    for split in ("train", "held_out"):
        parts = [getattr(each, split) for each in made]
        assert getattr(joined, split).read(0, 10**6).tolist() == [t for p in parts for t in p.read(0, 10**6).tolist()]
        assert len(getattr(joined, split).document_starts) == sum(len(p.document_starts) for p in parts)
    assert link_tokens(data[:1], TOKENIZER, 0.1, tmp_path / "cache").path == made[0].path
    made[0].train.shards[0]._mmap.close()  # type: ignore[attr-defined]
    os.truncate(made[0].path / "train-00000.bin", 4)
    assert open_tokens(joined.path) is None
    with pytest.raises(DataError, match="is not complete: name the text itself"):
        link_tokens(data, TOKENIZER, 0.1, tmp_path / "cache")


def test_other_files_of_the_same_names_are_other_tokens(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "a")
    before = link_tokens((str(folder),), TOKENIZER, 0.1, tmp_path / "cache")
    changed = documents(0, 300)
    changed[-2] = 5
    np.array(changed, dtype=np.uint16).tofile(folder / "train.bin")
    assert link_tokens((str(folder),), TOKENIZER, 0.1, tmp_path / "cache").path != before.path


def test_bad_input(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = nanogpt(tmp_path / "a")
    with pytest.raises(DataError, match=r"no tokenizer\.json says of which tokenizer: name it with --tokenizer"):
        tokenizer_of((str(folder),))
    with pytest.raises(DataError, match=r"has the token 2\d\d, and the tokenizer has 260"):
        link_tokens((str(folder),), Tokenizer.train(["ab ab ac ac"], 260), 0.1, cache)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(DataError, match=r"names token files, and '.*text\.txt', which is text: give them as two sources"):
        is_token_data((str(folder), str(tmp_path / "text.txt")))
    (folder / "train.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"train\.bin' has 3 bytes, which are no 16-bit tokens"):
        link_tokens((str(folder),), TOKENIZER, 0.1, cache)
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin' has 0 bytes"):
        link_tokens((str(folder),), TOKENIZER, 0.1, cache)
    llm_c(folder / "train.bin", documents(0, 90), np.uint16, 20240520, 1)
    os.truncate(folder / "train.bin", 1500)
    with pytest.raises(DataError, match=r"is cut off: it states [\d,]+ tokens and has 476 bytes"):
        link_tokens((str(folder),), TOKENIZER, 0.1, cache)
    llm_c(folder / "train.bin", documents(0, 90), np.uint32, 20240801, 7)
    with pytest.raises(DataError, match=r"hold tokens of uint16 and uint32: they are not of one tokenizer"):
        link_tokens((str(folder),), TOKENIZER, 0.1, cache)
    assert not list(cache.rglob("tokens.json"))


def of_its_own(folder: Path, cache: Path, tokenizer: Tokenizer, name: str) -> Path:
    """A token folder that somebody has moved out of the cache."""
    (folder / name).mkdir(parents=True)
    for number in range(50):
        (folder / name / f"{number}.txt").write_text(f"document {name} {number} of lines\n")
    made = tokenise(survey(Corpus((str(folder / name),)), 0.2), tokenizer, cache)
    made.path.rename(folder / f"{name}-tokens")
    return folder / f"{name}-tokens"


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Of the same size: each of their ids is one of it."""
    other = Tokenizer.train(["other words entirely, none of them the same, and numbers too: 17, 19, 23\n" * 9], 300)
    folder = of_its_own(tmp_path, tmp_path / "cache", TOKENIZER, "a")
    with pytest.raises(DataError, match=r"tokenizer\.json' made these tokens, and it is not the tokenizer"):
        link_tokens((str(folder),), other, 0.1, tmp_path / "cache")
    bins = nanogpt(tmp_path / "bins")
    (bins / "tokenizer.json").write_text(TOKENIZER.to_json())
    with pytest.raises(DataError, match=r"tokenizer\.json' made these tokens"):
        link_tokens((str(bins / "*.bin"),), other, 0.1, tmp_path / "cache")
    link_tokens((str(bins),), TOKENIZER, 0.1, tmp_path / "cache")


def test_a_token_folder_elsewhere_is_known_by_what_is_in_it_and_is_never_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    one, two = (of_its_own(tmp_path / name, cache, TOKENIZER, name) for name in ("one", "two"))
    two = two.rename(tmp_path / "two" / one.name)
    first, second = (link_tokens((str(each),), TOKENIZER, 0.1, cache) for each in (one, two))
    assert first.path.name != second.path.name
    assert first.path.parent == second.path.parent == cache / "tokens"
    monkeypatch.chdir(one)
    assert link_tokens((".",), TOKENIZER, 0.1, cache).path == first.path
    (one / "my_notes.txt").write_text("mine")
    moved = one.rename(tmp_path / "elsewhere")
    again = link_tokens((str(moved),), TOKENIZER, 0.1, cache)
    assert again.path.name == first.path.name, "the same tokens"
    assert shards_of(again.path, again.description, "train")[0].file.parent == moved
    os.truncate(moved / "train-00000.bin", 8)
    relink_cache(again, TOKENIZER.to_json())
    assert (moved / "my_notes.txt").read_text() == "mine"
    assert (moved / "files.jsonl").exists()


def test_of_two_files_that_differ_in_the_middle_each_is_itself(tmp_path: Path) -> None:
    one, two = nanogpt(tmp_path / "one"), nanogpt(tmp_path / "two")
    many = documents(0, 300) * 40
    np.array(many, dtype=np.uint16).tofile(one / "train.bin")
    many[len(many) // 2] = 7
    np.array(many, dtype=np.uint16).tofile(two / "train.bin")
    for folder in (one, two):
        data = link_tokens((str(folder),), TOKENIZER, 0.1, tmp_path / "cache")
        assert shards_of(data.path, data.description, "train")[0].file.parent == folder


@pytest.mark.parametrize(("name", "held_out"), [("val", True), ("fineweb_val_000000", True), ("validation-1", True)])
@pytest.mark.parametrize("other", ["retrieval", "medieval_train", "interval"])
def test_a_name_that_merely_contains_val_is_trained_on(tmp_path: Path, name: str, held_out: bool, other: str) -> None:
    np.array(documents(0, 100), dtype=np.uint16).tofile(tmp_path / f"{other}.bin")
    np.array(documents(200, 10), dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    data = link_tokens((str(tmp_path),), TOKENIZER, 0.1, tmp_path / "cache")
    assert data.train.read(0, 10**6).tolist() == documents(0, 100)
    assert data.held_out.read(0, 10**6).tolist() == documents(200, 10)


def test_files_that_are_named_twice_are_trained_on_once(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "a", val=False)
    (tmp_path / "link.bin").symlink_to(folder / "train.bin")
    data = (str(folder / "*.bin"), str(folder / "train.bin"), str(tmp_path / "link.bin"))
    tokens = link_tokens(data, TOKENIZER, 0.1, tmp_path / "cache")
    assert len(tokens.train) + len(tokens.held_out) == len(documents(0, 300))


@pytest.mark.parametrize("pattern", ["", "/*"])
def test_token_files_and_text_in_one_folder_are_named(tmp_path: Path, pattern: str) -> None:
    folder = nanogpt(tmp_path / "a")
    (folder / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"holds token files \('train\.bin'\) and text \('notes\.txt'\): name the ones"):
        is_token_data((f"{folder}{pattern}",))


@pytest.mark.parametrize("entry", ["~nosuchuser/x", "x" * 300, "a\0b"])
def test_a_path_that_cannot_be_followed_is_no_token_data(entry: str) -> None:
    assert not is_token_data((entry,))


def test_a_stream_without_the_end_of_a_document_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    np.full(5000, 7, dtype=np.uint16).tofile(tmp_path / "a/train.bin")
    tokens = link_tokens((str(tmp_path / "a"),), TOKENIZER, 0.1, tmp_path / "cache")
    assert tokens.train.document_starts.tolist() == tokens.held_out.document_starts.tolist() == [0]
