"""transformers' Trainer: several processes, its other ways to save and delete, and runs that are interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from onym.integrations import transformers as integration
from onym.integrations.sealed import require_sealed
from onym.integrations.transformers import last_checkpoint
from tests.integrations.test_transformers import same, trainer_of, values

pytestmark = pytest.mark.filterwarnings("ignore")


class FailsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_interrupted_and_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = trainer_of(tmp_path / "a", steps=12)
    straight.train()
    late, seal = threading.Event(), integration.seal

    def slow(folder: Path) -> None:
        late.wait(0.5)
        seal(folder)

    monkeypatch.setattr(integration, "seal", slow)
    trainer = trainer_of(tmp_path / "b", steps=12)
    fails = FailsAt(7)
    trainer.add_callback(fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    last = last_checkpoint(tmp_path / "b")
    assert last == str(tmp_path / "b" / "checkpoint-6"), "it is sealed in the background, and waited for"
    trainer.remove_callback(fails)
    trainer.train(resume_from_checkpoint=last)
    assert same(values(straight.model), values(trainer.model))
    assert numbers(tmp_path / "b") == [10, 12], "the limit is the one that was set"
    assert trainer.args.save_total_limit == 2


def test_one_that_is_being_written_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = integration.seal
    writing = threading.Event()

    def slow(folder: Path) -> None:  # until the Trainer writes the next one
        writing.wait(0.5)
        writing.clear()
        seal(folder)

    monkeypatch.setattr(integration, "seal", slow)
    trainer = trainer_of(tmp_path, steps=8, save_total_limit=1)
    save, seen = trainer._save_optimizer_and_scheduler, []

    def saving(output_dir: str) -> None:
        save(output_dir)
        writing.set()
        for thread in threading.enumerate():
            if thread.name == "onym-seal":
                thread.join()
        sealed = [path for path in tmp_path.glob("checkpoint-*") if (path / "onym-seal.json").exists()]
        seen.append(len(sealed))

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", saving)
    trainer.train()
    assert min(seen[1:]) >= 1, "there is always one that is complete"
    assert numbers(tmp_path) == [8]


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_other_strategies(tmp_path: Path, strategy: str) -> None:
    options: dict[str, Any] = {
        "save_strategy": strategy, "eval_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 1.0,
        "metric_for_best_model": "loss", "save_total_limit": 1,
    }  # fmt: skip
    alone = trainer_of(tmp_path / "a", steps=24, callback=TrainerCallback(), **options)
    alone.train()
    ours = trainer_of(tmp_path / "b", steps=24, **options)
    ours.train()
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    for path in (tmp_path / "b").glob("checkpoint-*"):
        require_sealed(path)


def test_the_model_only_and_the_same_step_again(tmp_path: Path) -> None:
    trainer_of(tmp_path, steps=4).train()
    trainer_of(tmp_path, steps=6, save_only_model=True).train()
    assert numbers(tmp_path) == [4, 6]
    for number in (4, 6):
        require_sealed(tmp_path / f"checkpoint-{number}")
    before = (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes()
    trainer_of(tmp_path, steps=6, learning_rate=0.5).train()
    require_sealed(tmp_path / "checkpoint-6")
    assert (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes() != before


def test_a_new_run_in_the_folder_of_a_longer_one(tmp_path: Path) -> None:
    trainer_of(tmp_path, steps=8).train()
    for number in (6, 8):
        os.utime(tmp_path / f"checkpoint-{number}", (1, 1))
    trainer_of(tmp_path, steps=2).train()
    assert 2 in numbers(tmp_path), "the one that was just written is not the oldest"
    assert len(sort_checkpoints(str(tmp_path))) == 2


PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from tests.integrations.test_transformers_more import FailsAt, last_checkpoint, trainer_of, values
from onym.storage.disk import disk
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
trainer = trainer_of(folder, steps=8)
if stop:
    trainer.add_callback(FailsAt(stop))
if stop == 99 and trainer.args.process_index == 0:
    def full(descriptor):
        raise OSError(28, "No space left on device")
    disk.flush = full
try:
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
except BaseException as error:
    sys.stdout.write(f"STOPPED {type(error).__name__}\\n")  # at once: the other process writes there too
    sys.stdout.flush()
torch.save([values(trainer.model), torch.rand(2)], folder.with_name(f"{folder.name}-{trainer.args.process_index}.pth"))
os._exit(0)  # a thread of gloo that lets go of a tensor while Python ends is a SIGABRT (torch 2.13)
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))

    def run(folder: str, stop: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.run(
            [*command, str(tmp_path / "program.py"), str(tmp_path / folder), str(stop)], timeout=180, check=True, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, stdout=subprocess.PIPE,
        ).stdout  # fmt: skip

    run("straight", 0)
    assert run("resumed", 5).count("STOPPED KeyboardInterrupt") == 2
    assert numbers(tmp_path / "resumed") == [2, 4]
    run("resumed", 0)
    for rank in range(2):
        (one, drawn), (two, again) = (torch.load(tmp_path / f"{name}-{rank}.pth") for name in ("straight", "resumed"))
        assert same(one, two)
        assert torch.equal(drawn, again)
    assert numbers(tmp_path / "resumed") == [6, 8]
    assert run("full", 99).count("STOPPED StorageError") == 2, "no process waits for one that failed"
