"""What a save costs under other people's trainers: the time that their loop is held, with Onym's files and with their own.

    python bench/integrations.py [--rounds 9] [--folder DIR] [--layers 6]

A model of some 100 MB with AdamW's moments, three times that in all. Every variant writes new files, and their deletion is not
counted. Ours are on the disk when the save returns, or sealed in the background after that (transformers, Accelerate); the
peers' own are in the system's memory then, and so they are measured once more with an fsync of each file.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from _measure import alternate, save_results, table
from onym.integrations.accelerate import save_state
from onym.integrations.lightning import OnymCheckpointIO
from onym.integrations.transformers import OnymCallback

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
FLUSHED = ", fsynced"


def flush(folder: Path) -> None:
    for file in (entry for entry in folder.rglob("*") if entry.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def model_of(layers: int) -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_positions=64, n_embd=576, n_layer=layers, n_head=8))


def stepped(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def lightning(model: torch.nn.Module, folder: Path) -> dict[str, Callable[[], object]]:
    """Of the checkpoint that Lightning's Trainer makes: its dump is in both."""

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, number: int) -> Any:
            return sum(parameter.sum() for parameter in self.parameters()) * 0

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    def saver(io: Any, name: str) -> Callable[[], object]:
        callbacks = [io] if isinstance(io, OnymCheckpointIO) else []
        trainer = LightningTrainer(
            max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, plugins=[io], callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(1, 1)))
        return lambda: trainer.save_checkpoint(folder / f"{name}.ckpt")

    theirs = saver(TorchCheckpointIO(), "theirs")
    return {
        "TorchCheckpointIO": theirs,
        f"TorchCheckpointIO{FLUSHED}": lambda: (theirs(), flush(folder)),
        "OnymCheckpointIO (flushes)": saver(OnymCheckpointIO(), "ours"),
    }


def transformers(model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    """``_save_checkpoint`` as the training loop calls it, with what its callbacks do."""

    def saver(callback: OnymCallback | None) -> tuple[Trainer, Callable[[], object]]:
        args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_total_limit=2)
        trainer = Trainer(model, args, callbacks=[callback] if callback else None)
        trainer.optimizer = stepped(model)
        trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
        trainer.state.global_step = 1

        def save() -> None:
            trainer._save_checkpoint(model, None)
            trainer.callback_handler.on_save(args, trainer.state, trainer.control)

        return trainer, save

    callback = OnymCallback()
    _, theirs = saver(None)
    _, ours = saver(callback)
    return {
        "Trainer": theirs,
        f"Trainer{FLUSHED}": lambda: (theirs(), flush(folder)),
        "Trainer with OnymCallback, until the loop goes on": ours,
        "Trainer with OnymCallback, until it is sealed (flushes)": lambda: (ours(), callback._wait()),
    }


def accelerate(model: torch.nn.Module, folder: Path) -> dict[str, Callable[[], object]]:
    accelerator = Accelerator(cpu=True)
    accelerator._models, accelerator._optimizers = [model], [accelerator.prepare_optimizer(stepped(model))]

    def theirs() -> None:
        accelerator.save_state(str(folder / "saved"))

    return {
        "accelerator.save_state": theirs,
        f"accelerator.save_state{FLUSHED}": lambda: (theirs(), flush(folder)),
        "onym's save_state, until the loop goes on": lambda: save_state(accelerator, folder / "saved"),
        "onym's save_state, background=False (flushes)": lambda: save_state(accelerator, folder / "saved", background=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=6)
    given = parser.parse_args()
    model = model_of(given.layers)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(
        f"{size / 1e6:.0f} MB of weights, {size * 3 / 1e6:.0f} MB with moments; {os.cpu_count()} cores, torch "
        f"{torch.__version__}"
    )
    results: dict[str, object] = {"MB with moments": round(size * 3 / 1e6)}
    disable_progress_bar()
    for kind in (lightning, transformers, accelerate):
        with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as name:
            folder = Path(name)
            variants = kind(model, folder)
            for save in variants.values():  # what is made once
                save()

            def clear(folder: Path = folder) -> None:
                from threading import enumerate as threads

                for thread in threads():  # that seals what is to be deleted
                    if thread.name in ("onym-seal", "onym-save"):
                        thread.join()
                shutil.rmtree(folder)
                folder.mkdir()
                os.sync()

            clear()
            seconds = alternate(variants, given.rounds, clear)
        results[kind.__name__] = table(
            f"{kind.__name__}, against its own save, which leaves it to the system:", seconds, next(iter(variants))
        )
    save_results("integrations", results)


if __name__ == "__main__":
    main()
