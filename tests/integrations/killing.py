"""Programs that are killed while they train under other people's trainers, and started again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def killed_at_random_and_run_to_the_end(
    program: str, folder: Path, checkpoints: Callable[[], set[Any]], seed: int, check: Callable[[], None] = lambda: None
) -> dict[str, torch.Tensor]:
    """Kill a program a few times, then let it end; returns what it has saved then.

    Args:
        program: trains in the folder of its first argument, and saves a state dict under the second.
        folder: where it trains.
        checkpoints: what is there now; a kill comes a moment after one to three more are.
        seed: of the moments.
        check: called after each kill.
    """
    chance = random.Random(seed)
    stays = "\nimport time\ntime.sleep(600)"  # so that every kill that is wanted happens, however fast the machine is

    def command(ending: Path, more: str = "") -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(program) + more, str(folder), str(ending)]

    for number in range(20 if os.environ.get("ONYM_PROVE") else 2):
        before, wanted, done = checkpoints(), chance.randrange(1, 4), folder.with_name(f"end-{number}.pth")
        process = subprocess.Popen(command(done, stays), stdout=subprocess.DEVNULL)
        while len(checkpoints() - before) < wanted and not done.exists():
            assert process.poll() is None, "it failed"
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.wait()
        check()
    end = folder.with_name("end.pth")
    subprocess.run(command(end), check=True, stdout=subprocess.DEVNULL)
    found: dict[str, torch.Tensor] = torch.load(end, weights_only=True)
    return found
