"""What differs on an NVIDIA GPU: ``make test-gpu`` runs it there, in less than six minutes on one.

A test that takes ``device`` runs on the CPU too, where the same is promised; one that takes ``cuda`` is about what a CPU does
not have, or does in another test already. What a GPU decides by itself is forced on the CPU (``as_on_cuda``), so that the same
code runs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from onym.cli.main import main
from onym.compile.in_place import graphs_compiled
from onym.generation import captured
from onym.train import loop
from onym.train.step import Stepper
from tests.conftest import TINY_RUN, _proof_in_this_process, write_book

# cuBLAS reads it once in a process, at its first product, and runs with --deterministic are made in this one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LENGTH = ("--steps", 12, "--save-every", 4, "--eval-every", 4, "--eval-batches", 2, "--log-every", 2)


def gpu() -> torch.device:
    """As ``--device cuda`` means it."""
    if not torch.cuda.is_available():
        built = "there is no NVIDIA GPU here" if torch.version.cuda else "this torch is built without CUDA"
        pytest.skip(f"needs an NVIDIA GPU: {built}")
    if "PYTEST_XDIST_WORKER" in os.environ:  # some of them take all of its memory
        pytest.skip("the tests of a GPU run one after the other: make test-gpu")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """What computes."""
    return gpu() if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests that are marked ``cuda``."""
    return gpu()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled code and tokens, for all of these tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _settings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of their own, and torch's settings as before: a training in this process changes them."""
    monkeypatch.setenv("ONYM_CACHE_DIR", str(cache))
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    products = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warns)
    torch.set_float32_matmul_precision(products)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.device], None]:
    """Called with a device: on a CPU everything of the compiler but g++ runs, which takes half a minute a model."""
    torch._dynamo.reset()  # it compiles the same lines eight times at the most

    def choose(device: torch.device) -> None:
        if device.type == "cpu":
            monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
            monkeypatch.setattr(captured, "_OPTIONS", None)

    return choose


@dataclass(frozen=True)
class TrainedRun:
    """A run of ``onym train``."""

    path: Path
    graphs: list[int]
    """How many were compiled, after each step."""
    said: str


@pytest.fixture(scope="session")
def compiled_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> TrainedRun:
    """Compiled whole, on the GPU: it is evaluated, writes samples, saves checkpoints."""
    device, folder, graphs = gpu(), tmp_path_factory.mktemp("run"), list[int]()
    step = Stepper.__call__

    def counted(self: Stepper, *args: object) -> object:
        result = step(self, *args)  # type: ignore[arg-type]
        graphs.append(graphs_compiled())
        return result

    command = ["train", "--data", write_book(folder), *TINY_RUN, *LENGTH, "--compile", "whole", "--device", device.type]
    command += ["--runs-dir", folder, "--name", "compiled"]
    said = io.StringIO()
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("ONYM_CACHE_DIR", str(cache))
        patch.setattr(Stepper, "__call__", counted)
        patch.setattr(loop, "prove", _proof_in_this_process)
        code = main([str(word) for word in command])
    assert code == 0, said.getvalue()
    return TrainedRun(folder / "compiled", graphs, said.getvalue())
