"""inspect: what was tokenised, of a folder of tokens and of a run, without a token read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data.token_files import link_tokens
from onym.data.tokenise import tokenise
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import USED, TokenData
from tests.cli.test_inspect import make_run, told
from tests.conftest import TINY_RUN, Run

TOKENIZER = Tokenizer.train([f"document {n} of {n * n} lines\n" for n in range(300)], 300)


@pytest.fixture
def data(tmp_path: Path) -> TokenData:
    """Of twelve files, the first the shortest, and one that cannot be read."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text("".join(f"line {n} of {number}\n" for n in range(10 * number + 10)))
    (folder / "broken.jsonl").write_text("{")
    return tokenise(survey(Corpus((str(folder),)), 0.1, skip_bad_files=True), TOKENIZER, tmp_path / "cache")


def text_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.txt"))


def test_a_folder_of_tokens_says_what_is_in_it(onym: Run, data: TokenData, tmp_path: Path) -> None:
    everything = told(onym, "inspect", data.path)
    tokens = len(data.train) + len(data.held_out)
    size = text_bytes(tmp_path / "text")
    assert everything["kind"] == "tokenised text"
    assert everything["tokens"] == {"train": len(data.train), "held_out": len(data.held_out)}
    assert (everything["text_bytes"], everything["files"], everything["documents"]) == (size, 12, 12)
    assert everything["tokens_per_byte"] == pytest.approx(tokens / size)
    assert everything["shards"] == {"train": 1, "held_out": 1}
    assert (everything["dtype"], everything["vocab_size"]) == ("uint16", TOKENIZER.vocab_size)
    assert everything["tokenizer"] == blake3(TOKENIZER.to_json().encode()).hexdigest()[:32]
    assert everything["bytes"] == sum(file.stat().st_size for file in data.path.iterdir())
    assert [Path(each["name"]).name for each in everything["skipped"]] == ["broken.jsonl"]
    assert everything["files_list"] == str(data.path / "files.jsonl")
    assert [Path(each["name"]).name for each in everything["largest_files"]] == [f"{n:02}.txt" for n in range(11, 1, -1)]
    text = onym("inspect", data.path).stdout
    assert f"{len(data.train):,} to train on, {len(data.held_out):,} held out" in text
    assert "12 files, 12 documents" in text
    assert f"{tokens / size:.3f} ({size / tokens:.2f} bytes a token)" in text
    assert everything["tokenizer"] in text
    assert "could not be read: 1 file" in text
    assert f"and 2 more: {data.path}/files.jsonl" in text
    assert "01.txt" not in text
    assert "11.txt" in text


def test_of_many_skipped_files_the_first_are_named(onym: Run, data: TokenData) -> None:
    description = json.loads((data.path / "tokens.json").read_text())
    description["skipped"] = [{"name": f"bad-{n}.jsonl", "reason": "\x1b[31mit is cut off"} for n in range(9)]
    (data.path / "tokens.json").write_text(json.dumps(description))
    text = onym("inspect", data.path).stdout
    assert "bad-4.jsonl" in text
    assert "bad-5.jsonl" not in text
    assert "and 4 more" in text
    assert "\x1b" not in text
    assert len(told(onym, "inspect", data.path)["skipped"]) == 9


def test_looking_is_no_use(onym: Run, data: TokenData) -> None:
    os.utime(data.path / USED, (1e9, 1e9))
    assert told(onym, "inspect", data.path)["used"] == "2001-09-09T01:46:40Z"
    assert (data.path / USED).stat().st_mtime == 1e9


def test_a_folder_of_version_0_2_is_understood(onym: Run, data: TokenData) -> None:
    """One file a stream, no tokenizer, no list of files."""
    for split in ("train", "held_out"):
        for ending in (".bin", ".documents.npy"):
            (data.path / f"{split}-00000{ending}").rename(data.path / f"{split}{ending}")
    description = json.loads((data.path / "tokens.json").read_text())
    old = ("dtype", "tokens", "documents", "vocab_size", "corpus", "corpus_fingerprint")
    (data.path / "tokens.json").write_text(json.dumps({"format": 1, **{name: description[name] for name in old}}))
    for name in ("files.jsonl", "tokenizer.json", USED):
        (data.path / name).unlink()
    everything = told(onym, "inspect", data.path)
    assert everything["tokens"] == {"train": len(data.train), "held_out": len(data.held_out)}
    assert everything["format"] == everything["shards"]["train"] == 1
    for name in ("text_bytes", "tokens_per_byte", "tokenizer", "files_list"):
        assert everything[name] is None
    text = onym("inspect", data.path).stdout
    assert "12 documents" in text
    assert "None" not in text


def test_token_files_of_others_are_named(onym: Run, tmp_path: Path) -> None:
    for name, count in (("train.bin", 5000), ("val.bin", 300)):
        (np.arange(count) % 250).astype(np.uint16).tofile(tmp_path / name)
    linked = link_tokens((str(tmp_path),), TOKENIZER, 0.1, tmp_path / "cache")
    everything = told(onym, "inspect", linked.path)
    assert everything["tokens"] == {"train": 5000, "held_out": 300}
    assert everything["documents"] is None
    assert [(each["name"], each["tokens"]) for each in everything["linked_files"]] == [
        (str(tmp_path / "train.bin"), 5000),
        (str(tmp_path / "val.bin"), 300),
    ]
    assert "Files elsewhere" in onym("inspect", linked.path).stdout
    (tmp_path / "val.bin").unlink()
    done = onym("inspect", linked.path)
    assert done.returncode == 2
    assert "val.bin' is missing" in done.stderr


def edit(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        description = json.loads((folder / "tokens.json").read_text())
        (folder / "tokens.json").write_text(json.dumps({**description, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "train-00000.bin").write_bytes(b"xx"), "'train-00000.bin' has 2 bytes instead of"),
        (lambda folder: (folder / "held_out-00000.bin").unlink(), "'held_out-00000.bin' is missing"),
        (lambda folder: (folder / "train-00000.documents.npy").write_bytes(b""), "'train-00000.documents.npy' cannot be read"),
        (lambda folder: (folder / "tokens.json").write_text("{"), "tokens.json cannot be understood"),
        (lambda folder: (folder / "tokens.json").write_text("[" * 100_000), "tokens.json cannot be understood"),
        (lambda folder: (folder / "files.jsonl").write_text('{"name": 1}\n'), "files.jsonl cannot be understood"),
        (edit(dtype="no such"), "tokens.json cannot be understood"),
        (edit(tokens={"train": 1e999, "held_out": 1}), "tokens.json cannot be understood"),
        (edit(shards={"train": ["1"], "held_out": []}), "tokens.json cannot be understood"),
        (edit(skipped=[1]), "tokens.json cannot be understood"),
    ],
)
def test_damage_is_a_sentence(onym: Run, data: TokenData, damage: Callable[[Path], object], says: str) -> None:
    damage(data.path)
    done = onym("inspect", data.path)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_what_is_being_written_is_said_to_be(onym: Run, tmp_path: Path) -> None:
    folder = tmp_path / f".writing-{'0' * 32}"
    folder.mkdir()
    done = onym("inspect", folder)
    assert done.returncode == 2
    assert "is not complete" in done.stderr


def test_torch_is_not_imported_and_no_token_read(
    in_fresh_process: Callable[[str], str], data: TokenData, tmp_path: Path
) -> None:
    program = f"""
import sys
from onym.cli.main import main
assert main(["inspect", {str(data.path)!r}]) == 0
print("torch" in sys.modules)
"""
    assert in_fresh_process(program).splitlines()[-1] == "False"


@pytest.mark.slow
def test_a_run_says_what_it_was_trained_on(onym: Run, tmp_path: Path, book: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(30):
        (other / f"{number}.txt").write_text(f"file {number} knows the number {number**5}\n" * 30)
    (other / "broken.jsonl").write_text("{")
    mix = ("--mix", f"book:3:{book}", f"other:1:{other}", "--on-bad-file", "skip")
    done = onym("train", *mix, "--name", "mixed", *TINY_RUN, "--compile", "off", "--steps", 4, "--precision", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    report = told(onym, "inspect", "runs/mixed")
    first, second = report["text"]["sources"]
    assert (first["name"], first["share"], second["name"], second["share"]) == ("book", 0.75, "other", 0.25)
    assert first["tokens"] == told(onym, "inspect", first["token_cache"])
    assert second["tokens"]["files"] == second["tokens"]["documents"] == 30
    assert [Path(each["name"]).name for each in report["text"]["skipped_files"]] == ["broken.jsonl"]
    text = onym("inspect", "runs/mixed").stdout
    assert "a run with 1 checkpoint" in text, "as before"
    assert "Trained on 2 sources" in text
    assert f"{first['tokens']['tokens']['train']:,}" in next(line for line in text.splitlines() if "75.0%" in line)
    assert "could not be read: 1 file" in text
    shutil.rmtree(second["token_cache"])
    text = onym("inspect", "runs/mixed").stdout
    assert " ".join(text.split()).count("was deleted: onym train makes it again when the run goes on") == 1
    report = told(onym, "inspect", "runs/mixed")
    assert report["text"]["sources"][0]["tokens"] == first["tokens"]
    assert report["text"]["sources"][1]["tokens"] is None
    assert "was deleted" in report["text"]["sources"][1]["problem"]


@pytest.mark.parametrize(
    "description", ["{", "[]", "{}", '{"sources": []}', '{"sources": 1}', '{"sources": [{"name": "x", "weight": 0}]}']
)
def test_a_run_that_does_not_say_is_shown_as_before(onym: Run, tmp_path: Path, description: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run/run.json").write_text(description)
    assert "a run with 3 checkpoints" in onym("inspect", "run").stdout
    assert told(onym, "inspect", "run")["text"] is None


def test_a_damaged_token_cache_of_a_run_is_a_line(onym: Run, tmp_path: Path, data: TokenData) -> None:
    make_run(tmp_path / "run")
    source = {"name": "data", "weight": 1.0, "token_cache": str(data.path)}
    (tmp_path / "run/run.json").write_text(json.dumps({"sources": [source], "skipped_files": []}))
    (data.path / "train-00000.bin").write_bytes(b"xx")
    done = onym("inspect", "run")
    assert done.returncode == 0
    assert "Trained on 1 source" in done.stdout
    assert "is damaged: 'train-00000.bin' has 2 bytes" in " ".join(done.stdout.split())
