"""What the tests share: a small corpus, a small model, and the command run as a user runs it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from onym import GPT, GPTConfig
from onym.cli.main import main
from onym.data.sources import Sources
from onym.train import loop, proof

settings.register_profile("bounded", max_examples=150, deadline=None)  # what else the machine does is no fault
settings.register_profile("prove", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("bounded")

# Each test has a cache of its own for tokens; compiled code is shared between them, outside the user's cache. It is what spares
# them some ten seconds of g++ each.
_user = getattr(os, "getuid", int)()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"onym-tests-compiled-{_user}")))

Run = Callable[..., "subprocess.CompletedProcess[str]"]


TINY = GPTConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_layers=2)

# A model and a corpus so small that a whole run takes seconds.
TINY_RUN = (
    *("--preset", "nano", "--arch", "gpt2", "--n-layers", "2", "--emb-dim", "32", "--n-heads", "2", "--context-length", "32"),
    *("--vocab-size", "300", "--batch-size", "4", "--eval-every", "10", "--log-every", "5", "--warmup-steps", "2"),
    *("--optimizer", "adamw", "--learning-rate", "1.5e-3"),
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a test leaves in the environment ends with it: TrainingArguments(torch_compile=True) has Accelerate compile too."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def tiny() -> GPT:
    return GPT(TINY).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (2, TINY.context_length))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text file of 30 paragraphs, enough for some batches."""
    return write_book(tmp_path)


def write_book(folder: Path) -> Path:
    """For what several tests share."""
    path = folder / "book.txt"
    lines = [f"{word} was the {n}th of the {n * 7} things, and the {word} knew it.\n\n" for n, word in enumerate(WORDS * 10)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


WORDS = ["lamp", "river", "stone", "engine", "garden", "letter", "shadow", "teacher", "window", "harvest", "mirror", "island"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This process's, with a token cache of the test's own."""
    return {**os.environ, "ONYM_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files without a whole training first, so that a failure shows soon; then those with the most of them."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (slow[item.path] > 0, -slow[item.path]))
    if not os.environ.get("ONYM_PROVE"):
        left = [item for item in items if item.get_closest_marker("prove")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _proof_in_this_process(checkpoint: Path, expected: float, sources: Sources, **how: object) -> proof.Proof:
    """What the fresh process at a run's end does, without its second and a half of imports."""
    request = {"checkpoint": str(checkpoint), "sources": sources.to_list(), **how}
    held_out, sample = proof._open_and_measure(request)
    return proof.Proof(held_out, expected, sample)


@pytest.fixture
def onym(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command, called in this process and in the test's folder: a process of its own costs seconds to start.

    So does the proof at a run's end, which is made here too; of ``onym_process`` all is as for a user.
    """
    monkeypatch.setattr(loop, "prove", _proof_in_this_process)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ONYM_CACHE_DIR", environment["ONYM_CACHE_DIR"])
        capsys.readouterr()
        given = [str(argument) for argument in arguments]
        try:
            code = main(given)
        except SystemExit as left:
            code = int(left.code or 0)
        out, error = capsys.readouterr()
        return subprocess.CompletedProcess(given, code, out, error)

    return run


@pytest.fixture
def onym_process(tmp_path: Path, environment: dict[str, str]) -> Run:
    """The command, in a process of its own, in the test's folder."""

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "onym", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, **changes}, capture_output=True, text=True, encoding="utf-8", check=False
        )

    return run


@pytest.fixture
def in_fresh_process(tmp_path: Path) -> Callable[[str], str]:
    """Run a program in another Python, and return what it printed."""

    def run(program: str) -> str:
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started, by rank, as Linux shows them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # one that ends meanwhile
            parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            environment = (entry / "environ").read_bytes().split(b"\0") if int(parent) == launcher else []
            found += [(int(each[5:]), int(entry.name)) for each in environment if each.startswith(b"RANK=")]
    return [pid for _, pid in sorted(found)]
