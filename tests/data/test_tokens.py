"""Token files: made once, found again, never half there; and the split by document."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data.tokenise import tokenise
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenData
from onym.data.train_tokenizer import cached_tokenizer
from onym.errors import DataError
from onym.storage import local

TEXTS = [f"document number {n} tells of {n * n} things\nand ends here\n" for n in range(200)]


def write(folder: Path, texts: list[str]) -> Corpus:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return Corpus((str(folder),))


def build(corpus: Corpus, cache: Path, held_out: float = 0.1) -> tuple[TokenData, Tokenizer]:
    found = survey(corpus, held_out)
    tokenizer = cached_tokenizer([found], 300, cache)
    return tokenise(found, tokenizer, cache), tokenizer


def documents(data: TokenData, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    both = []
    for stream in (data.train, data.held_out):
        bounds = [*stream.document_starts.tolist(), len(stream)]
        pieces = [stream.read(a, b).tolist() for a, b in itertools.pairwise(bounds)]
        assert all(piece[-1] == tokenizer.end_of_text for piece in pieces)
        both.append([tokenizer.decode(piece[:-1]) for piece in pieces])
    return both[0], both[1]


def test_every_document_is_in_one_stream_and_whole(tmp_path: Path) -> None:
    data, tokenizer = build(write(tmp_path / "text", TEXTS), tmp_path / "cache")
    train, held_out = documents(data, tokenizer)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert 10 <= len(held_out) <= 30, "about a tenth"


def test_new_documents_do_not_move_the_old_ones(tmp_path: Path) -> None:
    before, tokenizer = build(write(tmp_path / "a", TEXTS), tmp_path / "cache")
    after, other = build(write(tmp_path / "b", [*TEXTS, *(f"new {n}\n" for n in range(20))]), tmp_path / "cache")
    moved = set(documents(before, tokenizer)[0]) & set(documents(after, other)[1])
    assert len(moved) <= 2, "only as far as the share of held-out text is kept"


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    data, tokenizer = build(write(tmp_path / "text", TEXTS * 2), tmp_path / "cache")
    train, held_out = documents(data, tokenizer)
    assert not set(train) & set(held_out)


def test_of_few_documents_the_last_part_of_each_is_held_out(tmp_path: Path) -> None:
    texts = ["".join(TEXTS[:50]), "".join(TEXTS[50:120])]
    data, tokenizer = build(write(tmp_path / "text", texts), tmp_path / "cache")
    train, held_out = documents(data, tokenizer)
    assert [a + b for a, b in zip(train, held_out, strict=True)] == texts
    assert all(part.endswith("\n") for part in train), "cut at the end of a line"


def test_a_document_that_dominates_is_split(tmp_path: Path) -> None:
    texts = ["".join(f"line {n}\n" for n in range(10_000)), *(f"note {n}\n" * 5 for n in range(11))]
    data, tokenizer = build(write(tmp_path / "text", texts), tmp_path / "cache")
    assert 0.05 < len(data.held_out) / (len(data.held_out) + len(data.train)) < 0.2, "about a tenth"
    train, held_out = documents(data, tokenizer)
    assert [a + b for a in train for b in held_out].count(texts[0]) == 1


def test_a_long_line_is_cut_where_it_must_be(tmp_path: Path) -> None:
    data, _ = build(write(tmp_path / "text", ["My title\n" + "word " * 20_000]), tmp_path / "cache")
    assert len(data.train) > 5 * len(data.held_out)


@pytest.mark.parametrize("held_out", [1e-20, 0.5])
def test_both_streams_have_something(tmp_path: Path, held_out: float) -> None:
    data, _ = build(write(tmp_path / "text", TEXTS), tmp_path / "cache", held_out=held_out)
    assert len(data.train) >= 2
    assert len(data.held_out) >= 2


def test_the_cache_is_found_again_and_a_change_looks_elsewhere(tmp_path: Path) -> None:
    corpus, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    first, _ = build(corpus, cache)
    written = (first.path / "tokens.json").stat().st_mtime_ns
    assert (build(corpus, cache)[0].path / "tokens.json").stat().st_mtime_ns == written
    (tmp_path / "text" / "0000.txt").write_text("another text\n")
    assert build(corpus, cache)[0].path != first.path
    assert build(corpus, cache, held_out=0.2)[0].path != first.path


@pytest.mark.parametrize("damage", ["truncate", "remove", "no-json", "empty-index"])
def test_a_cache_that_is_not_whole_is_made_again(tmp_path: Path, damage: str) -> None:
    corpus, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    first, _ = build(corpus, cache)
    before = first.train.read(0, len(first.train)).copy()
    file = first.path / ("tokens.json" if damage == "no-json" else "train-00000.bin")
    if damage == "empty-index":
        (first.path / "train-00000.documents.npy").write_bytes(b"")
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        file.unlink()
    again, _ = build(corpus, cache)
    assert np.array_equal(again.train.read(0, len(again.train)), before)
    assert [entry.name for entry in (cache / "tokens").iterdir()] == [first.path.name]


def test_another_process_that_puts_the_same_there_first_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines that share the cache: the first process of each tokenises."""
    corpus, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    rename = os.replace

    def after_the_other(source: Path, target: Path) -> None:
        if target.parent.name == "tokens" and not target.exists():
            shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", after_the_other)
    data, _ = build(corpus, cache)
    assert [entry.name for entry in (cache / "tokens").iterdir()] == [data.path.name]


def test_a_damaged_tokenizer_in_the_cache_is_made_again(tmp_path: Path) -> None:
    corpus, cache = write(tmp_path / "text", TEXTS), tmp_path / "cache"
    _, tokenizer = build(corpus, cache)
    (file,) = (cache / "tokenizers").iterdir()
    file.write_text("{")
    assert build(corpus, cache)[1].to_json() == tokenizer.to_json() == file.read_text(encoding="utf-8")


def test_the_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    corpus = write(tmp_path / "text", TEXTS)
    data, tokenizer = build(corpus, tmp_path / "cache")
    assert data.train.dtype == np.uint16
    tokenizer.vocab_size = (1 << 16) + 1
    wide = tokenise(survey(corpus, 0.3), tokenizer, tmp_path / "cache")
    assert wide.train.dtype == np.uint32


def test_a_long_document_is_encoded_in_pieces_and_stays_one(tmp_path: Path) -> None:
    text = "".join(f"line {n} of a long document\n" for n in range(120_000))
    data, tokenizer = build(write(tmp_path / "text", [text]), tmp_path / "cache")
    train, held_out = documents(data, tokenizer)
    assert len(train) == len(held_out) == 1
    assert train[0] + held_out[0] == text


def test_an_empty_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(DataError, match=r"no text in '.*empty\.txt'"):
        survey(Corpus((str(tmp_path / "empty.txt"),)), 0.1)


def test_on_a_file_system_that_maps_no_files_tokens_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write(tmp_path / "texts", TEXTS)
    mapped, tokenizer = build(corpus, tmp_path / "mapped")
    assert isinstance(mapped.train.shards[0], np.memmap)

    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(local, "mmap", refused)
    monkeypatch.setattr(np, "memmap", refused)
    read, _ = build(corpus, tmp_path / "read")
    assert documents(read, tokenizer) == documents(mapped, tokenizer)
