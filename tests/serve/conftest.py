"""Runs and a server over them, which the tests of a worker process share: nothing in them changes what another sees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onym.data.chat_template import CHATML
from tests import chat_model
from tests.conftest import TINY_RUN, write_book
from tests.serve.serving import Server


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: ``first`` was trained, to step 30; ``talker`` has random weights, far apart, and a chat template."""
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "onym", "train", "--data", str(write_book(folder)), *TINY_RUN, "--compile", "off"]
    command += ["--steps", "30", "--save-every", "10", "--name", "first"]
    command[command.index("--context-length") + 1] = "64"
    environment = {**os.environ, "ONYM_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    given = [*map(str, command), "--name", "first", "--compile", "off"]
    subprocess.run(given, cwd=folder, env=environment, check=True, capture_output=True)
    torch.manual_seed(1)
    chat_model.save(folder / "runs" / "talker" / "checkpoints", CHATML, chat_model.scattered())
    return folder / "runs"


@pytest.fixture(scope="session")
def served(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The talker, and the folder of runs."""
    with Server(tmp_path_factory.mktemp("server"), "--model", f"talker={runs_folder / 'talker'}", runs_folder) as server:
        yield server
