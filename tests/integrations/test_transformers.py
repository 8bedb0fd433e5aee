"""transformers' own Trainer, with checkpoints that survive kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import onym
from onym.errors import CheckpointError, StorageError

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from onym.integrations.sealed import SEAL, require_sealed
from onym.integrations.transformers import OnymCallback, last_checkpoint
from tests.integrations.killing import killed_at_random_and_run_to_the_end

pytestmark = pytest.mark.filterwarnings("ignore")


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer_of(folder: Path, steps: int = 8, compiled: bool = False, callback: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, torch_compile=compiled, torch_compile_backend="eager" if compiled else None, logging_steps=2,
        **{"save_total_limit": 2, **options},
    )  # fmt: skip
    return Trainer(model, args, train_dataset=Data(), eval_dataset=Data(), callbacks=[callback or OnymCallback()])


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace("_orig_mod.", ""): value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("compiled", [False, True])
def test_resumed_bit_for_bit_and_opened_by_everybody(tmp_path: Path, compiled: bool) -> None:
    straight = trainer_of(tmp_path / "a", compiled=compiled)
    straight.train()
    trainer_of(tmp_path / "b", steps=4, compiled=compiled, lr_scheduler_type="constant").train()
    straight = trainer_of(tmp_path / "a2", compiled=compiled, lr_scheduler_type="constant")
    straight.train()
    resumed = trainer_of(tmp_path / "b", compiled=compiled, lr_scheduler_type="constant")
    path = last_checkpoint(tmp_path / "b")
    assert path is not None
    assert Path(path).name == "checkpoint-4"
    resumed.train(resume_from_checkpoint=path)
    assert same(values(straight.model), values(resumed.model))
    last = last_checkpoint(tmp_path / "b")
    assert same(values(AutoModelForCausalLM.from_pretrained(last)), values(resumed.model))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    onym.load(last, into=other)
    assert same(values(other), values(resumed.model))


def test_the_trainers_own_limit_and_its_best(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, steps=12, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=1.0,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    left = sorted(tmp_path.glob("checkpoint-*"))
    assert len(left) == 2
    assert str(tmp_path / "checkpoint-12") in map(str, left)
    assert trainer.state.best_model_checkpoint in map(str, left)
    assert trainer.args.save_total_limit == 2
    for path in left:
        require_sealed(path)


def test_what_is_unfinished_or_damaged_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    trainer_of(tmp_path, steps=6, save_total_limit=None).train()
    newest = tmp_path / "checkpoint-6"
    (newest / SEAL).unlink()
    with pytest.warns(UserWarning, match=r"Passed over .*checkpoint-6.*unfinished"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match=r"model.safetensors' is damaged"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    for damage in ("{}", "", (tmp_path / "checkpoint-2" / SEAL).read_text().replace("bytes", "bites")):
        (tmp_path / "checkpoint-2" / SEAL).write_text(damage)
        with pytest.raises(CheckpointError):
            require_sealed(tmp_path / "checkpoint-2")


def test_a_disk_that_refuses_is_said_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onym.storage.disk import disk

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "flush", full)
    with pytest.raises(StorageError, match="the disk is full"):
        trainer_of(tmp_path, steps=4).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) >= 1, "none was deleted"


PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from tests.integrations.test_transformers import trainer_of, values, last_checkpoint
trainer = trainer_of(Path(sys.argv[1]), steps=16)
trainer.train(resume_from_checkpoint=last_checkpoint(sys.argv[1]))
torch.save(values(trainer.model), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    straight = trainer_of(tmp_path / "a", steps=16)
    straight.train()
    end = killed_at_random_and_run_to_the_end(PROGRAM, tmp_path / "b", lambda: seals(tmp_path / "b"), 3)
    assert same(values(straight.model), end)


def seals(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob(f"checkpoint-*/{SEAL}")}
