"""Lightning's own Trainer, saving and resuming through Onym's files."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import onym
from onym.cli.main import main

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from onym.integrations.lightning import OnymCheckpointIO
from tests.integrations.killing import killed_at_random_and_run_to_the_end

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(LightningModule):
    def __init__(self, compiled: bool = False, settings: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        net: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.net = torch.compile(net, backend="eager") if compiled else net

    def training_step(self, batch: Any, _: int) -> Any:
        loss = ((self.net(batch[0]) - batch[1]) ** 2).mean()
        if not torch.compiler.is_compiling():  # Lightning's own log cannot be traced
            self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def data() -> Any:
    values = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=values)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)


def fit(
    folder: Path,
    epochs: int,
    *,
    compiled: bool = False,
    resume: bool = True,
    keep: Any = None,
    callback: bool = True,
    **options: Any,
) -> tuple[Module, Trainer, Any]:
    torch.manual_seed(1)
    plugin = keep or OnymCheckpointIO()
    files = ModelCheckpoint(folder, "{epoch}", monitor="loss", mode="min", save_top_k=2, save_last=True)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[plugin], callbacks=[files, *([plugin] if callback and isinstance(plugin, OnymCheckpointIO) else [])],
    )  # fmt: skip
    module = Module(compiled, **options)
    trainer.fit(module, data(), ckpt_path="last" if resume else None)
    return module, trainer, files


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    assert values(one).keys() == values(other).keys()
    assert all(torch.equal(value, values(other)[name]) for name, value in values(one).items())


def test_resumed_bit_for_bit(tmp_path: Path) -> None:
    straight, _, _ = fit(tmp_path / "a", 5)
    fit(tmp_path / "b", 2)
    resumed, trainer, _ = fit(tmp_path / "b", 5)
    assert_equal(straight, resumed)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.7**5)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_compiled_or_not_names_are_the_modules_own(tmp_path: Path, before: bool, after: bool) -> None:
    straight, _, _ = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2, compiled=before)
    path = tmp_path / "b" / "last.ckpt"
    state = onym.load_state(path)
    assert set(state["state_dict"]) == set(values(straight))
    assert main(["verify", str(path)]) == 0
    resumed, _, _ = fit(tmp_path / "b", 4, compiled=after)
    assert_equal(straight, resumed)
    plain = Module()
    onym.load(path, into=plain)


def test_a_compiled_lightning_module(tmp_path: Path) -> None:
    keep = OnymCheckpointIO()
    torch.manual_seed(1)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, plugins=[keep], callbacks=[keep],
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(torch.compile(Module(), backend="eager"), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert set(onym.load_state(tmp_path / "x.ckpt")["state_dict"]) == set(values(Module()))


def test_modules_find_the_versions_of_their_layouts(tmp_path: Path) -> None:
    keep, module = OnymCheckpointIO(), Module(True)
    state = module.state_dict()
    keep.save_checkpoint({"state_dict": state}, tmp_path / "x.ckpt")
    found = keep.load_checkpoint(tmp_path / "x.ckpt")["state_dict"]
    assert list(found) == list(state)
    assert found._metadata == state._metadata  # type: ignore[attr-defined]


def test_the_plugin_alone_resumes_under_the_same_wrappers(tmp_path: Path) -> None:
    fit(tmp_path, 2, compiled=True, callback=False)
    module, _, _ = fit(tmp_path, 3, compiled=True, callback=False)
    assert set(onym.load_state(tmp_path / "last.ckpt")["state_dict"]) == set(values(module))


def test_the_best_are_kept_and_the_rest_deleted(tmp_path: Path) -> None:
    _, _, files = fit(tmp_path, 5)
    kept = {path.name for path in tmp_path.glob("epoch*.ckpt")}
    assert kept == {Path(path).name for path in files.best_k_models}
    assert len(kept) == 2
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "last.ckpt"}
    _, _, again = fit(tmp_path, 6)
    assert again.best_model_score <= files.best_model_score
    other = Module()
    onym.load(files.best_model_path if Path(files.best_model_path).exists() else again.best_model_path, into=other)


def test_written_in_the_background(tmp_path: Path) -> None:
    keep = AsyncCheckpointIO(OnymCheckpointIO())
    module, _, _ = fit(tmp_path, 2, keep=keep, callback=False)
    assert all(
        torch.equal(value, onym.load_state(tmp_path / "last.ckpt")["state_dict"][name])
        for name, value in values(module).items()
    )


def test_a_run_changes_over_from_lightnings_files(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, save_last=True)
    torch.manual_seed(1)
    Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[files]
    ).fit(Module(), data())  # fmt: skip
    before = torch.load(tmp_path / "last.ckpt", weights_only=False)
    _, trainer, _ = fit(tmp_path, 3)
    assert trainer.current_epoch == 3
    assert before["global_step"] == 8
    assert trainer.global_step == 12
    newest = max(tmp_path.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert onym.load_state(newest)["global_step"] == 12


def test_settings_of_other_classes_are_kept_as_text(tmp_path: Path) -> None:
    settings = {"args": argparse.Namespace(lr=1, path=Path("x")), "list": [1, (2, None)], "odd": print}
    with pytest.warns(
        UserWarning, match=r"hyper_parameters.settings.odd is a builtin_function_or_method, and is kept as its text"
    ):
        fit(tmp_path, 1, settings=settings)
    found = onym.load_state(tmp_path / "last.ckpt")["hyper_parameters"]["settings"]
    assert found["args"] == {"lr": 1, "path": "x"}
    assert found["list"] == [1, (2, None)]


PROGRAM = """
import sys, warnings, logging
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
from pathlib import Path
from tests.integrations.test_lightning import fit
module, _, _ = fit(Path(sys.argv[1]), 6)
import torch
torch.save(module.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    straight, _, _ = fit(tmp_path / "a", 6)

    def check() -> None:
        for path in (tmp_path / "b").glob("*.ckpt"):
            onym.load_state(path)

    end = killed_at_random_and_run_to_the_end(PROGRAM, tmp_path / "b", lambda: stamps(tmp_path / "b"), 7, check)
    assert all(torch.equal(value, end[name]) for name, value in straight.state_dict().items())


def stamps(folder: Path) -> set[tuple[str, int]]:
    """The checkpoints that are there, each version of them as one."""
    found = set()
    for path in folder.glob("*.ckpt"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found
