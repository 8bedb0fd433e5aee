"""Tokens in shards: the same however they are cut, interrupted or read; nothing half-written is ever used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onym.data import readers
from onym.data import survey as survey_module
from onym.data import tokenise as tokenise_module
from onym.data.corpus import Corpus
from onym.data.fast_bpe import Encoder
from onym.data.survey import survey
from onym.data.tokenise import tokenise
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenData
from onym.errors import DataError, StorageError

TOKENIZER = Tokenizer.train([f"document {n} of {n * n} lines\n" for n in range(300)], 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        rows = [json.dumps({"text": f"document {number}.{row} of {row**3} lines\n" * (row % 7 + 1)}) for row in range(30)]
        (folder / f"{number:02}.jsonl").write_text("\n".join(rows))
    (folder / "long.txt").write_text("".join(f"line {n} of a long document\n" for n in range(9000)))
    return Corpus((str(folder),))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise_module, "_BATCH_BYTES", 3_000)
    monkeypatch.setattr(tokenise_module, "_SHARD_BYTES", 10_000)
    monkeypatch.setattr(survey_module, "PIECE", 1_000)


def content(data: TokenData) -> list[Any]:
    return [
        part.tolist()
        for stream in (data.train, data.held_out)
        for part in (stream.read(0, len(stream)), stream.document_starts)
    ]


def test_shards_together_are_what_one_is(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "PIECE", 1_000)
    found = survey(corpus, 0.1)
    one = tokenise(found, TOKENIZER, tmp_path / "one")
    assert len(one.train.shards) == 1
    monkeypatch.setattr(tokenise_module, "_BATCH_BYTES", 3_000)
    monkeypatch.setattr(tokenise_module, "_SHARD_BYTES", 10_000)
    many = tokenise(found, TOKENIZER, tmp_path / "many")
    assert len(many.train.shards) > 20
    assert content(many) == content(one)
    ends = np.append(many.train.document_starts[1:], len(many.train)).astype(int) - 1
    assert all(many.train.read(end, end + 1)[0] == TOKENIZER.end_of_text for end in ends)
    lines = [json.loads(line) for line in (many.path / "files.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [file.name for file in found.files]
    assert sum(line["tokens"] for line in lines) == len(many.train) + len(many.held_out)
    assert sum(line["documents"] for line in lines) == found.documents == 40 * 30 + 1
    assert sum(line["bytes"] for line in lines) == found.text_bytes


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_text_is_the_same_from_memory_and_from_files(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    found = survey(corpus, 0.1, kept=kept)
    assert (found._texts is None) == (kept == 0)
    right = tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "right")
    assert content(tokenise(found, TOKENIZER, tmp_path / "cache")) == content(right)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("fails_at", [1, 2, 17, 40])
def test_what_was_interrupted_goes_on_where_it_was(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    found = survey(corpus, 0.1)
    right = content(tokenise(found, TOKENIZER, tmp_path / "right"))
    calls: list[int] = []
    plain = Encoder.__call__

    def call(self: Encoder, texts: list[bytes]) -> Any:
        calls.append(sum(map(len, texts)))
        if len(calls) == fails_at + 1:  # the first is the comparison of the libraries
            raise KeyboardInterrupt
        return plain(self, texts)

    monkeypatch.setattr(Encoder, "__call__", call)
    with pytest.raises(KeyboardInterrupt):
        tokenise(found, TOKENIZER, tmp_path / "cache")
    assert all(entry.name.startswith(".") for entry in (tmp_path / "cache/tokens").iterdir())
    done = sum(calls[1:-1])
    calls[:] = [0] * 1000
    data = tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")
    assert content(data) == right
    again = sum(calls[1001:])
    assert again < found.text_bytes - done + 15_000, "a shard at most is done again"
    assert [entry.name for entry in (tmp_path / "cache/tokens").iterdir()] == [data.path.name]
    assert not (data.path / "progress.json").exists()


KILLED = """
import sys
from pathlib import Path
from onym.data import survey as s, tokenise as t
from onym.data.corpus import Corpus
from onym.data.tokenizer import Tokenizer
t._BATCH_BYTES, t._SHARD_BYTES, s.PIECE = 3_000, 10_000, 1_000
text, cache, tokenizer = sys.argv[1:]
tell = lambda what, done, total: print(what, done, flush=True)
t.tokenise(s.survey(Corpus((text,)), 0.1), Tokenizer.load(tokenizer), Path(cache), tell)
"""


@pytest.mark.usefixtures("small_shards")
def test_what_was_killed_goes_on_where_it_was(corpus: Corpus, tmp_path: Path) -> None:
    right = content(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "right"))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    command = [sys.executable, "-c", KILLED, corpus.data[0], str(tmp_path / "cache"), str(tmp_path / "tokenizer.json")]
    began: list[int] = []
    code = 1
    for attempt in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told: list[int] = []
            for line in process.stdout:
                if line.startswith("Tokenising"):
                    told.append(int(line.split()[1]))
                if len(told) == 7 and attempt < 5:
                    os.kill(process.pid, signal.SIGKILL)
                    break
        began.append(told[0])
        code = process.returncode
    assert code == 0
    assert began == sorted(began)
    assert began[-1] > began[0] + 50_000, "each went on from the one before"
    assert content(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")) == right


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["cut", "gone", "no json", "other json"])
def test_shards_of_an_interrupted_process_that_are_damaged_are_made_anew(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    found = survey(corpus, 0.1)
    right = tokenise(found, TOKENIZER, tmp_path / "cache")
    expected = content(right)
    temporary = right.path.with_name(f".writing-{right.path.name}")
    right.path.rename(temporary)
    shards = {split: [len(shard) for shard in getattr(right, split).shards[:3]] for split in ("train", "held_out")}
    state = {"shards": shards, "in_document": {}, "file_tokens": [1], "pieces": 1, "text_bytes": 5}
    (temporary / "progress.json").write_text({"no json": "{", "other json": "[]"}.get(damage, json.dumps(state)))
    if damage == "cut":
        os.truncate(temporary / "train-00001.bin", 10)
    elif damage == "gone":
        (temporary / "held_out-00002.bin").unlink()
    assert content(tokenise(found, TOKENIZER, tmp_path / "cache")) == expected


@pytest.mark.usefixtures("small_shards")
def test_two_at_once_write_one_cache(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(corpus, 0.1)
    written: list[str] = []
    plain = tokenise_module.write_shard
    monkeypatch.setattr(tokenise_module, "write_shard", lambda f, name, *rest: (written.append(name), plain(f, name, *rest)))
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(tokenise(found, TOKENIZER, tmp_path / "c"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({data.path for data in results}) == 1
    assert len(results) == 3
    assert len(written) == len(set(written)), "only one of them wrote"
    assert [entry.name for entry in (tmp_path / "c/tokens").iterdir()] == [results[0].path.name]


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
def test_text_that_changes_while_it_is_read_is_named(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    found = survey(corpus, 0.1, kept=0)
    file = Path(corpus.data[0]) / "07.jsonl"
    text = file.read_text()
    if change == "gone":
        file.unlink()
    else:
        file.write_text(text + '\n{"text": "more"}' if change == "longer" else text.replace("document", "Document"))
    with pytest.raises(DataError, match="07.jsonl' " + ("cannot be read" if change == "gone" else "changed while")):
        tokenise(found, TOKENIZER, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache/tokens").iterdir() if not entry.name.startswith(".")]


def test_a_full_disk_leaves_nothing_that_is_taken_for_tokens(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenise_module, "write_shard", full)
    with pytest.raises(StorageError, match="the disk is full"):
        tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")
    monkeypatch.undo()
    assert len(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache").train) > 1000


def test_a_cache_of_format_1_is_read(corpus: Corpus, tmp_path: Path) -> None:
    found = survey(corpus, 0.1)
    data = tokenise(found, TOKENIZER, tmp_path / "cache")
    expected = content(data)
    for split, stream in (("train", data.train), ("held_out", data.held_out)):
        (data.path / f"{split}-00000.bin").rename(data.path / f"{split}.bin")
        (data.path / f"{split}-00000.documents.npy").unlink()
        np.save(data.path / f"{split}.documents.npy", stream.document_starts)
    about = {
        "format": 1,
        "dtype": "uint16",
        "documents": data.documents,
        "vocab_size": 300,
        "corpus": "",
        "corpus_fingerprint": "",
    }
    about["tokens"] = {"train": len(data.train), "held_out": len(data.held_out)}
    (data.path / "tokens.json").write_text(json.dumps(about))
    again = tokenise(found, TOKENIZER, tmp_path / "cache")
    assert again.description["format"] == 1
    assert content(again) == expected


def test_bad_files_are_skipped_where_that_is_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    good = tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")
    folder = Path(corpus.data[0])
    (folder / "03b.jsonl").write_text('{"text": "whole"}\n' * 50 + '{"text": "cut')
    (folder / "zz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"03b\.jsonl:51' is not a JSON object"):
        survey(corpus, 0.1)
    found = survey(corpus, 0.1, skip_bad_files=True)
    assert [Path(name).name for name, _ in found.skipped] == ["03b.jsonl", "zz.txt"]
    data = tokenise(found, TOKENIZER, tmp_path / "cache")
    assert data.path == good.path, "nothing of a bad file is in the text"


def test_a_corpus_of_bad_files_alone_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"no text in .*2 of its files cannot be read; the first: .*not UTF-8"):
        survey(Corpus((str(tmp_path),)), 0.1, skip_bad_files=True)


def test_of_millions_of_documents_the_share_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hashes are not all kept; what is held out is the same."""

    def threshold(most: int) -> tuple[int, int]:
        monkeypatch.setattr(survey_module, "_MOST_HASHES", most)
        seen = survey_module._Seen(0.1)
        for number in range(20_000):
            seen.add(b"x" * (number % 90) + b"%d" % number)
        return seen.threshold()

    assert threshold(1000) == threshold(10**9)


@pytest.mark.parametrize("held_out", [0.001, 0.05, 0.4])
@pytest.mark.parametrize("lines", ["many", "one", "two"])
def test_a_file_that_is_read_in_blocks_gives_the_tokens_of_one_that_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: float, lines: str
) -> None:
    """Whether it is split (it is longer than what is held out) or not, wherever its blocks end."""
    words = [f"wörd{n}é漢 " for n in range(6000)]
    cut = {"many": 7, "one": 10**9, "two": 5000}[lines]
    text = "".join(word + "\n" * (n % cut == cut - 1) for n, word in enumerate(words))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "text/b.txt").write_text(text[:9000] * 2, encoding="utf-8")
    for number in range(30):
        (tmp_path / f"text/c{number}.txt").write_text(f"note {number}\n" * 90)
    corpus = Corpus((str(tmp_path / "text"),))
    monkeypatch.setattr(survey_module, "PIECE", 1_000)
    right = tokenise(survey(corpus, held_out), TOKENIZER, tmp_path / "whole")
    monkeypatch.setattr(readers, "LONG_TEXT", 5_000)
    for block in (997, 100_000):
        monkeypatch.setattr(readers, "BLOCK", block)
        found = survey(corpus, held_out)
        assert found._long
        data = tokenise(found, TOKENIZER, tmp_path / f"{block}")
        assert data.path.name == right.path.name
        assert content(data) == content(right)


MEASURED = """
import resource, sys
from pathlib import Path
from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data import tokenise as module
from onym.data.tokenise import tokenise
from onym.data.train_tokenizer import cached_tokenizer
text, cache = sys.argv[1:]
corpus = Corpus((text,))
small = Path(text).with_suffix(".small.md")
small.write_text("some text to begin with\\n" * 300_000)
first = survey(Corpus((str(small),)), 0.1)
cached_tokenizer([first], 400, Path(cache))
tokenise(first, cached_tokenizer([first], 400, Path(cache)), Path(cache))  # all libraries are loaded, all threads are there
def pages():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
def opened(folder, plain=module.open_tokens):
    if folder.exists():  # the tokens are complete: they are mapped, which takes address space and no memory
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return plain(folder)
module.open_tokens = opened
resource.setrlimit(resource.RLIMIT_AS, (pages() + int(1e9), hard))
found = survey(corpus, 0.05)
tokenizer = cached_tokenizer([found], 1000, Path(cache), sample_bytes=20_000_000)
data = tokenise(found, tokenizer, Path(cache))
print(found.text_bytes, len(data.train) + len(data.held_out), len(data.train.shards))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell of address space in /proc")
def test_a_file_larger_than_memory_is_tokenised(tmp_path: Path) -> None:
    """With less address space than the file has bytes; in full, of 20 GB, under ``make prove``."""
    size = int(20e9) if os.environ.get("ONYM_PROVE") else int(1.5e9)
    block = b"".join(b"%d: the words of a file that does not fit\n" % number for number in range(200_000))
    with (tmp_path / "long.txt").open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(tmp_path / "long.txt"), str(tmp_path / "cache")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        text_bytes, tokens, shards = map(int, done.stdout.split()[-3:])
        assert text_bytes == size // len(block) * len(block)
        assert tokens > text_bytes / 10
        assert shards > 5
    finally:  # pytest keeps the folders of three runs
        (tmp_path / "long.txt").unlink()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_a_bad_file_leaves_no_trace_among_millions_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though hashes were forgotten in the middle of it."""

    def threshold(*, bad: bool) -> tuple[object, ...]:
        monkeypatch.setattr(survey_module, "_MOST_HASHES", 1_000)
        seen = survey_module._Seen(0.1)
        for number in range(2_500):
            seen.add(b"%d" % number)
        seen.begin_file()
        if bad:
            for number in range(4_321):
                seen.add(b"bad %d" % number)
            seen.forget_file()
            seen.begin_file()
        for number in range(2_500, 5_000):
            seen.add(b"%d" % number)
        return (*seen.threshold(), seen.fingerprint, seen.documents, seen.text_bytes, seen.file_digest.digest())

    assert threshold(bad=True) == threshold(bad=False)


@pytest.mark.usefixtures("small_shards")
def test_files_without_documents_have_no_tokens_wherever_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"document {number}\n" * 90 if number % 5 == 2 else " \n" * (number % 2))
    data = tokenise(survey(Corpus((str(folder),)), 0.1), TOKENIZER, tmp_path / "cache")
    lines = [json.loads(line) for line in (data.path / "files.jsonl").read_text().splitlines()]
    assert [line["documents"] for line in lines] == [int(number % 5 == 2) for number in range(60)]
    assert [bool(line["tokens"]) for line in lines] == [number % 5 == 2 for number in range(60)]
    assert sum(line["tokens"] for line in lines) == len(data.train) + len(data.held_out)


def test_a_long_file_that_is_overwritten_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many bytes, whether it is split or not."""
    monkeypatch.setattr(readers, "LONG_TEXT", 5_000)
    for held_out, others in ((0.1, 0), (0.4, 900)):
        folder = tmp_path / f"{others}"
        folder.mkdir()
        text = "".join(f"line {n} of a long document\n" for n in range(500))
        (folder / "long.txt").write_text(text)
        for number in range(others):
            (folder / f"{number}.txt").write_text(f"note {number} of many\n" * 4)
        found = survey(Corpus((str(folder),)), held_out)
        (folder / "long.txt").write_text(text.replace("line 250 ", "LINE 250 "))
        with pytest.raises(DataError, match=r"long\.txt' changed while the text was read"):
            tokenise(found, TOKENIZER, tmp_path / "cache")


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_shard_without_its_documents_is_made_anew(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = content(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "right"))
    plain, calls = tokenise_module.replace_file, list[Path]()

    def stops(path: Path, text: str) -> None:
        plain(path, text)
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenise_module, "replace_file", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")
    (calls[-1].parent / "train-00002.documents.npy").write_bytes(b"")
    monkeypatch.undo()
    assert content(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")) == right


@pytest.mark.usefixtures("small_shards")
def test_shards_of_text_that_changed_are_not_gone_on_from(tmp_path: Path) -> None:
    """The change is seen at the file's end, when shards with it are complete; then the old text comes back."""
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [json.dumps({"text": f"document {row} of {row**3} lines\n" * 5}) for row in range(400)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    corpus = Corpus((str(folder),))
    right = content(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "right"))
    found = survey(corpus, 0.1, kept=0)
    (folder / "a.jsonl").write_text("\n".join(rows).replace("document 7 ", "DOCUMENT 7 "))
    with pytest.raises(DataError, match="changed while"):
        tokenise(found, TOKENIZER, tmp_path / "cache")
    (folder / "a.jsonl").write_text("\n".join(rows))
    assert content(tokenise(survey(corpus, 0.1), TOKENIZER, tmp_path / "cache")) == right
