"""What a run is trained on: mixtures, files that cannot be read, token files; and that it continues on the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onym.data.tokenizer import Tokenizer
from tests.conftest import TINY_RUN, WORDS, Run

SHORT = ("--compile", "off", "--steps", "10", "--precision", "fp32")


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two sources, of which the second is short."""
    for name, lines in (("web", 400), ("code", 60)):
        (tmp_path / name).mkdir()
        for n in range(lines):
            word = WORDS[n % 12]
            text = f"the {word} is number {n} of many\n" if name == "web" else f"def {word}_{n}(x):\n    return x + {n}\n"
            (tmp_path / name / f"{n:03}.txt").write_text(text * 4)
    return f"web:0.7:{tmp_path / 'web'}", f"code:0.3:{tmp_path / 'code'}"


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_has_a_held_out_loss_for_each_source_and_resumes_bit_for_bit(
    onym: Run, two: tuple[str, str], tmp_path: Path
) -> None:
    straight = onym("train", "--mix", *two, *TINY_RUN, *SHORT, "--name", "straight")
    assert straight.returncode == 0, straight.stdout + straight.stderr
    assert "Mixture: web 70.0%, " in straight.stdout
    assert "code 30.0%, " in straight.stdout
    assert "bitwise identical" in straight.stdout
    last = rows(tmp_path / "runs/straight")[-1]
    assert last["val_loss"] == pytest.approx(0.7 * last["val_loss/web"] + 0.3 * last["val_loss/code"], abs=1e-5)
    assert last["val_loss/web"] != last["val_loss/code"]
    about = json.loads((tmp_path / "runs/straight/run.json").read_text())
    assert [(source["name"], source["weight"]) for source in about["sources"]] == [("web", 0.7), ("code", 0.3)]

    first = onym("train", "--mix", *two, *TINY_RUN, *SHORT, "--name", "web-code", "--steps", "5", "--schedule", "constant")
    assert first.returncode == 0, first.stdout + first.stderr
    again = onym("train", "--mix", *two, *TINY_RUN, *SHORT, "--name", "web-code", "--schedule", "constant")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Continuing after step 5" in again.stdout
    whole = onym("train", "--mix", *two, *TINY_RUN, *SHORT, "--name", "whole", "--schedule", "constant")
    assert whole.returncode == 0
    assert rows(tmp_path / "runs/web-code")[-1]["val_loss"] == rows(tmp_path / "runs/whole")[-1]["val_loss"]
    other = onym("train", "--mix", two[0], two[1].replace("0.3", "0.4"), *TINY_RUN, *SHORT, "--name", "whole", "--steps", "20")
    assert other.returncode == 2
    assert "has changed" in other.stderr


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        (["web:much:WEB"], "is no source: give its name, its weight"),
        (["web:0:WEB"], "is no source: give its name, its weight"),
        (["web:-1:WEB"], "is no source: give its name, its weight"),
        (["web:nan:WEB"], "is no source: give its name, its weight"),
        (["WEB"], "is no source: give its name, its weight"),
        (["..:1:WEB"], "is no source: give its name, its weight"),
        (["a\nb:1:WEB"], "is no source: give its name, its weight"),
        (["a:1e308:WEB", "b:1e308:WEB"], "less than one in 4,096 tokens"),
        (["a:1:WEB", "b:1e-9:WEB"], "--mix gives 'b' less than one in 4,096 tokens"),
        (["web:1:WEB", "--suffix", "*.rst"], "--suffix '*.rst' is no suffix"),
        (["web:0.5:WEB", "web:0.5:WEB"], "two sources that are called 'web'"),
        (["web:0.5:WEB", "x:0.5:nowhere"], "There is no file or folder 'nowhere'"),
        (["web:0.5:WEB", "dry:0.5:DRY"], "The source 'dry' of --mix has"),
        (["web:0.5:WEB", "--data", "DRY"], "--mix and --data are two ways"),
    ],
)
def test_a_bad_mixture_is_one_sentence(onym: Run, two: tuple[str, str], tmp_path: Path, mix: list[str], sentence: str) -> None:
    (tmp_path / "dry.txt").write_text("short")
    paths = {"WEB": str(tmp_path / "web"), "DRY": str(tmp_path / "dry.txt")}
    arguments = [each.replace("WEB", paths["WEB"]).replace("DRY", paths["DRY"]) for each in mix]
    done = onym("train", "--mix", *arguments, *TINY_RUN, *SHORT)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_bad_file_fails_or_is_skipped_and_listed(onym: Run, two: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "web/bad.txt").write_bytes(b"caf\xe9")
    failed = onym("train", "--data", tmp_path / "web", *TINY_RUN, *SHORT)
    assert failed.returncode == 2
    assert "bad.txt' is not UTF-8 text" in failed.stderr
    assert "--on-bad-file skip" in failed.stderr
    assert not (tmp_path / "runs").exists()
    done = onym("train", "--data", tmp_path / "web", "--on-bad-file", "skip", *TINY_RUN, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "Skipped: " in done.stdout
    (skipped,) = json.loads((tmp_path / "runs/web/run.json").read_text())["skipped_files"]
    assert skipped["name"].endswith("bad.txt")
    assert "not UTF-8" in skipped["reason"]
    (tmp_path / "web/bad.txt").unlink()
    assert onym("train", "--data", tmp_path / "web", *TINY_RUN, *SHORT, "--name", "whole").returncode == 0
    assert json.loads((tmp_path / "runs/whole/run.json").read_text())["skipped_files"] == [], "though the tokens are the same"


def test_token_files_of_nanogpt_and_of_our_own(onym: Run, two: tuple[str, str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([path.read_text() for path in sorted((tmp_path / "web").iterdir())], 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    (tmp_path / "bins").mkdir()
    for name, part in (("train", slice(0, 380)), ("val", slice(380, 400))):
        texts = [path.read_text() for path in sorted((tmp_path / "web").iterdir())[part]]
        ids = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.end_of_text)]
        np.array(ids, dtype=np.uint16).tofile(tmp_path / "bins" / f"{name}.bin")
    without = onym("train", "--data", tmp_path / "bins", *TINY_RUN, *SHORT)
    assert without.returncode == 2
    assert "name it with --tokenizer" in without.stderr
    done = onym("train", "--data", tmp_path / "bins", "--tokenizer", tmp_path / "tokenizer.json", *TINY_RUN, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise identical" in done.stdout
    (source,) = json.loads((tmp_path / "runs/bins/run.json").read_text())["sources"]
    again = onym("train", "--data", source["token_cache"], *TINY_RUN, *SHORT, "--name", "again")
    assert again.returncode == 0, again.stdout + again.stderr
    assert rows(tmp_path / "runs/again")[-1]["val_loss"] == rows(tmp_path / "runs/bins")[-1]["val_loss"]
    mixed = onym("train", "--mix", f"old:1:{tmp_path / 'bins'}", two[1], *TINY_RUN, *SHORT, "--name", "mixed")
    assert mixed.returncode == 2
    mixed = onym(
        "train", "--mix", f"old:1:{tmp_path / 'bins'}", two[1], "--tokenizer", tmp_path / "tokenizer.json", *TINY_RUN, *SHORT,
        "--name", "mixed",
    )  # fmt: skip
    assert mixed.returncode == 0, mixed.stdout + mixed.stderr


def test_a_run_from_before_mixtures_continues(onym: Run, book: Path, tmp_path: Path) -> None:
    """Its run.json names one token cache, and its options know nothing of what is new."""
    arguments = ("train", "--data", book, *TINY_RUN, *SHORT, "--schedule", "constant")
    assert onym(*arguments, "--name", "book").returncode == 0
    path = tmp_path / "runs/book/run.json"
    about = json.loads(path.read_text())
    (source,) = about.pop("sources")
    about["token_cache"] = source["token_cache"]
    del about["skipped_files"]
    for name in ("mix", "suffix", "tokenizer_sample", "on_bad_file"):
        del about["options"]["data"][name]
    path.write_text(json.dumps(about))
    done = onym(*arguments, "--name", "book", "--steps", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Continuing after step 10" in done.stdout


def test_a_run_on_data_is_not_continued_with_a_mixture_unseen(onym: Run, two: tuple[str, str], tmp_path: Path) -> None:
    web = tmp_path / "web"
    assert onym("train", "--data", web, *TINY_RUN, *SHORT, "--name", "one").returncode == 0
    other = onym("train", "--mix", *two, *TINY_RUN, *SHORT, "--name", "one", "--steps", "20")
    assert other.returncode == 2
    assert "has changed since it was started" in other.stderr
    same = onym("train", "--mix", f"web:1:{web}", *TINY_RUN, *SHORT, "--name", "one", "--steps", "20")
    assert same.returncode == 0, same.stdout + same.stderr
    back = onym("train", "--data", web, *TINY_RUN, *SHORT, "--name", "one", "--steps", "30")
    assert back.returncode == 0, back.stdout + back.stderr
