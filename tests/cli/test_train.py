"""The command as a user runs it: a whole small run, continued, finished, interrupted, without a compiler."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import onym as library
from onym.checkpoint.steps import steps
from onym.format.chunk_index import CHUNKS
from onym.format.reader import read_checkpoint
from tests.conftest import TINY_RUN, Run

EAGER = (*TINY_RUN, "--compile", "off")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:09d}"
    pieces, tensors = (folder / CHUNKS).exists(), {}
    for file in ("model", "optimizer", "trainer"):
        name = f"{file}.safetensors"
        found = read_checkpoint(folder).tensors(name).state() if pieces else load_file(folder / name)
        tensors |= {f"{file}/{name}": value.clone() for name, value in found.items()}
    return tensors


def assert_equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_keeps_all_that_it_promises(onym_process: Run, book: Path, tmp_path: Path) -> None:
    done = onym_process("train", "--data", book, *TINY_RUN, "--steps", 20, "--save-every", 8, "--compile", "whole")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "book"
    assert steps(run / "checkpoints") == [8, 16, 20]
    assert sorted(p.name for p in (run / "checkpoints" / "step-000000020").iterdir()) == [
        *("config.json", "manifest.json", "model.safetensors", "optimizer.safetensors"),
        *("tokenizer.json", "trainer.json", "trainer.safetensors"),
    ]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20]
    for row in rows:
        assert {"step", "tokens", "train_loss", "lr", "tokens_per_second", "data_wait", "seconds"} <= row.keys()
        assert row["tokens"] == row["step"] * 4 * 32
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((run / "samples").iterdir())] == [f"step-{n:09d}.txt" for n in (0, 10, 20)]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"

    out = done.stdout
    assert "in place; every name stays as it is" in out, "compiled"
    assert re.search(r"proof +a fresh process without torch.compile opened it: held-out loss [\d.]+, bitwise identical", out)
    assert re.search(r"step 10/20  loss [\d.]+  held-out [\d.]+  [\d,]+ tokens/s  ETA 0:0\d", out)
    assert "generate runs/book" in out
    assert "\x1b" not in out, "no escape codes in a pipe"

    names = list(library.open_checkpoint(run).names)
    assert names == list(library.load_model(run).state_dict()), "all of them, in the order of the model"
    assert not any("_orig_mod" in name for name in names)
    back = library.GPT(library.GPTConfig(**json.loads((run / "checkpoints/step-000000020/config.json").read_text())))
    back.load_state_dict(load_file(run / "checkpoints/step-000000020/model.safetensors"), strict=True)


def test_the_same_command_on_a_finished_run_says_so(onym: Run, book: Path, tmp_path: Path) -> None:
    command = ("train", "--data", book, *EAGER, "--steps", 6)
    assert onym(*command).returncode == 0
    before = checkpoint(tmp_path / "runs" / "book", 6)
    again = onym(*command)
    assert again.returncode == 0
    assert "finished already: nothing to do" in again.stdout
    assert "--steps 12" in again.stdout
    assert_equal_bits(before, checkpoint(tmp_path / "runs" / "book", 6))


@pytest.mark.parametrize("drop_rate", ["0.0", "0.2"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(onym: Run, book: Path, tmp_path: Path, drop_rate: str) -> None:
    command = ("train", "--data", book, *EAGER, "--drop-rate", drop_rate, "--steps", 24, "--save-every", 8)
    assert onym(*command, "--name", "straight").returncode == 0

    killed = tmp_path / "runs" / "killed"
    process = start(*command, "--name", "killed", cwd=tmp_path, kill_at=killed / "checkpoints" / "step-000000008")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = steps(killed / "checkpoints")[-1]
    assert kept < 24, "killed before its end"

    done = onym("train", "--name", "killed")  # options that are not given are those it was started with
    assert done.returncode == 0, done.stderr
    assert f"Continuing after step {kept} of 24" in done.stdout
    assert_equal_bits(checkpoint(tmp_path / "runs" / "straight", 24), checkpoint(killed, 24))
    exact = ("step", "tokens", "train_loss", "val_loss", "lr")
    straight = [{name: row.get(name) for name in exact} for row in metrics(tmp_path / "runs" / "straight")]
    resumed = [{name: row.get(name) for name in exact} for row in metrics(killed)]
    assert straight == resumed


def start(*arguments: object, cwd: Path, kill_at: Path) -> subprocess.Popen[bytes]:
    """A training process, once a path has appeared."""
    environment = {**os.environ, "ONYM_CACHE_DIR": str(cwd / "cache")}
    command = [sys.executable, "-m", "onym", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not kill_at.exists():
        if process.poll() is not None:
            pytest.fail(f"ended before {kill_at.name}: {process.stdout and process.stdout.read()!r}")
        time.sleep(0.002)  # rather than take a core from it, which with two of them makes its threads wait for each other
    return process


def test_a_finished_run_can_be_trained_longer(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 10).returncode == 0
    longer = onym("train", "--name", "book", "--steps", 20)
    assert longer.returncode == 0, longer.stderr
    assert "--steps was 10, is 20" in longer.stdout
    assert [row["step"] for row in metrics(tmp_path / "runs/book")] == [0, 5, 10, 15, 20]


def test_a_run_is_not_continued_as_another_one(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 5).returncode == 0
    other = onym("train", "--data", book, *EAGER, "--steps", 5, "--n-layers", 3, "--seed", 4)
    assert other.returncode == 2
    assert "--n-layers was 2, is 3; --seed was 0, is 4" in other.stderr
    assert steps(tmp_path / "runs/book/checkpoints") == [5]


def test_a_run_does_not_go_on_with_another_text(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 5).returncode == 0
    book.write_text(book.read_text() + "One more line.\n")
    changed = onym("train", "--name", "book", "--steps", 10)
    assert changed.returncode == 2
    assert "The text of the run 'runs/book' has changed" in changed.stderr
    assert steps(tmp_path / "runs/book/checkpoints") == [5]


def test_a_run_may_be_asked_for_fewer_steps_than_it_has(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 9).returncode == 0
    description = tmp_path / "runs/book/run.json"
    description.write_text(description.read_text().replace('"finished"', '"running"'))  # killed during its proof
    fewer = onym("train", "--name", "book", "--steps", 5, "--eval-batches", 1)
    assert fewer.returncode == 0, fewer.stderr
    assert "bitwise identical" in fewer.stdout
    assert steps(tmp_path / "runs/book/checkpoints") == [9]


def test_files_in_the_folder_that_one_stands_in_are_not_run(onym_process: Run, book: Path, tmp_path: Path) -> None:
    (tmp_path / "blake3.py").write_text("raise SystemExit('user code ran')")
    program = Path(sys.executable).with_name("onym")
    done = subprocess.run(
        [program, "train", "--data", book, *EAGER, "--steps", "2"],
        cwd=tmp_path,
        env={**os.environ, "ONYM_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_that_goes_away_does_not_end_the_run(book: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onym", "train", "--data", str(book), *EAGER, "--steps", "20"]
    environment = {**os.environ, "ONYM_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / "runs/book/run.json").read_text())["status"] == "finished"


def test_commands_that_are_printed_can_be_typed(onym: Run, book: Path, tmp_path: Path) -> None:
    book.rename(tmp_path / "my book.txt")
    done = onym("train", "--data", "my book.txt", *EAGER, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "generate 'runs/my book' --prompt" in done.stdout
    assert "train --name 'my book' --steps 4" in done.stdout
    longer = onym("train", "--data", "./my book.txt", "--steps", 3)
    assert longer.returncode == 0, "the same text under another spelling"


def test_a_damaged_description_is_named(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 2).returncode == 0
    description = tmp_path / "runs/book/run.json"
    for content in ("", "{}", "[]", description.read_text().replace('"steps": 2', '"steps": "x"')):
        description.write_text(content)
        done = onym("train", "--name", "book")
        assert done.returncode == 2
        assert "run.json' is damaged" in done.stderr


def test_a_damaged_newest_checkpoint_is_passed_over(onym: Run, book: Path, tmp_path: Path) -> None:
    command = ("train", "--data", book, *EAGER, "--steps", 15, "--save-every", 5)
    assert onym(*command).returncode == 0
    expected = checkpoint(tmp_path / "runs/book", 15)
    damaged = tmp_path / "runs/book/checkpoints/step-000000015/optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = onym(*command)
    assert done.returncode == 0, done.stderr
    assert "optimizer.safetensors' is damaged" in done.stdout
    assert "Continuing after step 10 of 15" in done.stdout
    assert_equal_bits(expected, checkpoint(tmp_path / "runs/book", 15))


def test_without_a_compiler_it_says_why_and_goes_on(onym_process: Run, book: Path, tmp_path: Path) -> None:
    done = onym_process(
        *("train", "--data", book, *TINY_RUN, "--steps", 4, "--compile", "whole"),
        CXX="/no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Going on without torch.compile")]
    assert "no-such-compiler" in line
    assert steps(tmp_path / "runs/book/checkpoints") == [4]


def test_an_existing_tokenizer_is_used_and_kept(onym: Run, book: Path, tmp_path: Path) -> None:
    from onym.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([book.read_text()], 280)
    (tmp_path / "mine.json").write_text(tokenizer.to_json(), encoding="utf-8")
    done = onym("train", "--data", book, *EAGER, "--steps", 2, "--tokenizer", "mine.json")
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "runs/book/checkpoints/step-000000002/tokenizer.json"
    assert kept.read_text(encoding="utf-8") == tokenizer.to_json()
    assert library.load_model(tmp_path / "runs/book").config.vocab_size == 280  # type: ignore[union-attr]


def test_generate_writes_text(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 5).returncode == 0
    run = tmp_path / "runs/book"
    for source in (run, run / "checkpoints", run / "checkpoints/step-000000005"):
        first, second = (onym("generate", source, "--prompt", "the lamp ", "--seed", 1) for _ in range(2))
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("the lamp ")
        assert len(first.stdout) > len("the lamp \n")
        assert first.stdout == second.stdout
    past_the_context = onym("generate", run, "--max-new-tokens", 100, "--temperature", 0)
    assert past_the_context.returncode == 0, past_the_context.stderr

    library.save(library.load_model(run), tmp_path / "model.safetensors")
    alone = onym("generate", "model.safetensors", "--prompt", "x")
    assert alone.returncode == 2
    assert "holds no tokenizer" in alone.stderr
    helped = onym("generate", "model.safetensors", "--tokenizer", run / "checkpoints/step-000000005", "--prompt", "x")
    assert helped.returncode == 0, helped.stderr
