"""What a user can get wrong: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY_RUN, Run

Prepare = Callable[[Path], object]

# name: (what is put into the folder, the arguments, what the sentence says)
TABLE: dict[str, tuple[Prepare, str, str]] = {
    "a missing file": (lambda _: None, "--data gone.txt", "There is no file or folder 'gone.txt'"),
    "an empty file": (lambda p: (p / "x.txt").touch(), "--data x.txt", "There is no text in 'x.txt'"),
    "a binary file": (lambda p: (p / "x.txt").write_bytes(bytes(range(256))), "--data x.txt", "'x.txt' is not UTF-8 text"),
    "a short file": (lambda p: (p / "x.txt").write_text("some words\n" * 9), "--data x.txt", "'x.txt' has "),
    "an empty folder": (lambda p: (p / "texts").mkdir(), "--data texts", "The folder 'texts' holds no"),
    "a wrong field": (lambda p: (p / "x.jsonl").write_text('{"body": "a"}\n'), "--data x.jsonl", "--text-field"),
    "a file for a runs folder": (lambda p: (p / "f").touch(), "--runs-dir f", "Could not write the run at 'f/"),
    "a folder that cannot be made": (lambda _: None, "--runs-dir /proc/runs", "Could not write the run at '/proc/runs/"),
    "an unknown preset": (lambda _: None, "--preset gpt2-smal", "no preset 'gpt2-smal' (did you mean 'gpt2-small'?)"),
    "a negative size": (lambda _: None, "--n-layers -2", "n_layers must be a whole number of at least 1, not -2"),
    "no steps": (lambda _: None, "--steps 0", "--steps must be more than 0"),
    "a negative batch": (lambda _: None, "--batch-size -1", "--batch-size must be more than 0"),
    "heads that do not divide": (lambda _: None, "--n-heads 5", "cannot be split over n_heads=5"),
    "too large a seed": (lambda _: None, f"--seed {2**63}", "--seed must be below 2^63"),
    "a model larger than any memory": (lambda _: None, "--emb-dim 2000000", "Out of memory: lower --micro-batch"),
    "all held out": (lambda _: None, "--held-out 1", "--held-out must be between 0 and 1"),
    "a tiny vocabulary": (lambda _: None, "--vocab-size 100", "at least 257 tokens"),
    "a path for a name": (lambda _: None, "--name ../x", "--name must be a plain folder name"),
    "a device without memory": (lambda _: None, "--device meta", "There is no device 'meta' here"),
    "no such device": (lambda _: None, "--device tpu", "There is no device 'tpu' here"),
    "a corrupt tokenizer": (lambda p: (p / "t.json").write_text("{}"), "--tokenizer t.json", "'t.json' cannot be read"),
    "a missing tokenizer": (lambda _: None, "--tokenizer t.json", "There is no tokenizer file 't.json'"),
}


@pytest.mark.parametrize(("prepare", "arguments", "says"), TABLE.values(), ids=TABLE)
def test_it_says_what_is_wrong_and_leaves_nothing(
    onym: Run, book: Path, tmp_path: Path, prepare: Prepare, arguments: str, says: str
) -> None:
    prepare(tmp_path)
    given = arguments.split()
    before = listing(tmp_path)
    data = () if "--data" in given else ("--data", str(book))
    done = onym("train", *data, *TINY_RUN, "--compile", "off", "--steps", 3, *given)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("onym: ")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == before


def test_a_hub_name_without_network(onym_process: Run, book: Path, tmp_path: Path) -> None:
    done = onym_process("train", "--data", book, *TINY_RUN, "--tokenizer", "gpt2", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 2
    assert "as a name on the Hugging Face hub it cannot be fetched" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def listing(folder: Path) -> list[str]:
    """Every file and folder, but for the token cache, which is whole or not there."""
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    assert not [name for name in found if "writing" in name], "nothing half-written"
    return [name for name in found if not name.startswith("cache")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "gone"), "There is nothing at 'gone'"),
        (("generate", "."), "The folder '.' holds no weights"),
        (("generate", "book.txt"), "'book.txt' is no weight file"),
        (("trian",), "no command 'trian' (did you mean 'train'?)"),
    ],
)
def test_other_commands_say_it_too(onym: Run, book: Path, arguments: tuple[str, ...], says: str) -> None:
    done = onym(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_full_disk_while_saving_a_pth(book: Path, tmp_path: Path) -> None:
    program = """
import resource, signal, torch, onym
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for ending in (".pth", ".safetensors", ""):
    try:
        onym.save(torch.nn.Linear(200, 200), f"model{ending}")
    except onym.OnymError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("raise the limit, or choose another folder") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_an_unknown_option_is_refused_with_the_nearest(onym: Run) -> None:
    done = onym("train", "--stepps", 3)
    assert done.returncode == 2
    assert "--steps" in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("what", ["token cache", "run"])
def test_a_full_disk(onym: Run, book: Path, tmp_path: Path, what: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("this system does not let us mount a tmpfs")
    try:
        if what == "token cache":
            book.write_text(book.read_text() * 50)
            arguments = ("--cache-dir", disk)
        else:
            arguments = ("--runs-dir", disk / "runs", "--n-layers", 4)
        done = onym("train", "--data", book, *TINY_RUN, "--compile", "off", "--steps", 3, *arguments)
        assert done.returncode == 2, done.stdout
        assert "the disk is full: free some space" in done.stderr
        assert "Traceback" not in done.stderr
        assert not [path for path in disk.rglob("*") if "writing" in path.name], "nothing half-written"
        assert not list(disk.rglob("train.bin"))
        assert not list(disk.rglob("checkpoints/*"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody without permission")
def test_a_folder_without_permission(book: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    program = "import os, sys; os.setuid(65534); sys.argv[0] = 'onym'; from onym.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", f"import onym.train.loop, onym.cli.train, onym.cli.parsing, pydoc_data.topics; {program}"]
    command += ["train", "--data", str(book), *TINY_RUN, "--runs-dir", str(locked), "--cache-dir", str(tmp_path / "cache")]
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's folders are private
        if folder.name.startswith("pytest-of"):
            break
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "permission denied: make it writable for you" in done.stderr
    assert list(locked.iterdir()) == []
