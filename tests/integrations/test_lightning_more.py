"""Lightning: Fabric, several processes, averaged models, loaders with a state, and halves of what the Trainer is given."""

from __future__ import annotations

import contextlib
import enum
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import onym

pytest.importorskip("lightning")
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from onym.integrations.lightning import OnymCheckpointIO
from tests.integrations.test_lightning import Module, assert_equal, data, fit, values

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Loader:
    """As torchdata's StatefulDataLoader: it knows where it is in the middle of an epoch."""

    def __init__(self) -> None:
        self.x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        self.epoch, self.next, self.resumed = 0, 0, False

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        if not self.resumed:
            self.next = 0
        self.resumed = False
        order = torch.randperm(32, generator=torch.Generator().manual_seed(self.epoch))
        while self.next < 8:
            rows = self.x[order[self.next * 4 : self.next * 4 + 4]]
            self.next += 1
            yield rows, rows.sum(1, keepdim=True)
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.next, self.resumed = state["epoch"], state["next"], True


def trainer_of(folder: Path, *more: Callback, keep: Any = None, every: int | None = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    keep = keep or OnymCheckpointIO()
    files = ModelCheckpoint(folder, "{step}", save_top_k=1, save_last=True, every_n_train_steps=every)
    return Trainer(**{**QUIET, "plugins": [keep], "callbacks": [keep, *more, files], **options})


def test_the_middle_of_an_epoch_bit_for_bit_where_the_loader_has_a_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    straight = Module()
    trainer_of(tmp_path / "a", max_steps=21, every=3).fit(straight, Loader())
    for steps, resume in ((11, None), (14, "last"), (21, "last")):
        torch.manual_seed(0)
        resumed = Module()
        trainer_of(tmp_path / "b", max_steps=steps, every=3).fit(resumed, Loader(), ckpt_path=resume)
    assert_equal(straight, resumed)


@pytest.mark.parametrize("average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.02, swa_epoch_start=1)])
@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (False, True)])
def test_averaged_models(tmp_path: Path, average: Any, before: bool, after: bool) -> None:
    def train(folder: Path, epochs: int, compiled: bool, resume: bool) -> Module:
        torch.manual_seed(0)
        module = Module(compiled)
        trainer = trainer_of(folder, average(), max_epochs=5)
        if epochs < 5:
            trainer.callbacks.append(_StopAfter(epochs))
        with contextlib.suppress(Stopped):
            trainer.fit(module, data(), ckpt_path="last" if resume else None)
        return module

    straight = train(tmp_path / "a", 5, False, False)
    train(tmp_path / "b", 2, before, False)
    state = onym.load_state(tmp_path / "b" / "last.ckpt")
    assert "_orig_mod" not in str([*state["state_dict"], *state.get("current_model_state", ())])
    if isinstance(average(), StochasticWeightAveraging):
        return  # Lightning does not resume its averages bit for bit
    assert_equal(straight, train(tmp_path / "b", 5, after, True))


class Stopped(RuntimeError):
    pass


class _StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epochs:
            raise Stopped


def test_what_the_trainer_was_given_half_is_said(tmp_path: Path) -> None:
    both = OnymCheckpointIO()
    for keep, options, said in (
        (both, {}, None),
        (both, {"callbacks": []}, "random number generators are not in"),
        (both, {"plugins": []}, "Lightning writes the checkpoints itself"),
    ):
        trainer = trainer_of(tmp_path / "x", keep=keep, max_epochs=1, default_root_dir=tmp_path, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Module(), data())
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        ours = [str(each.message) for each in caught if "keep = OnymCheckpointIO()" in str(each.message)]
        assert [said] * len(ours) == [said for each in ours if said and said in each]
        assert bool(ours) == (said is not None)


def test_testing_the_best_leaves_the_generators_of_the_next_run_alone(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("error", ((self.net(batch[0]) - batch[1]) ** 2).mean())

        validation_step = test_step

    _, trainer, files = fit(tmp_path, 2)
    tested = Tested()
    trainer.test(tested, data(), ckpt_path=files.best_model_path, verbose=False)
    trainer.validate(tested, data(), ckpt_path="best", verbose=False)
    best = onym.load_state(files.best_model_path)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in values(tested).items())
    keep = next(each for each in trainer.callbacks if isinstance(each, OnymCheckpointIO))

    class Seen(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert keep._rng is None

    trainer.callbacks.append(Seen())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(tested, data())


def test_a_run_that_failed_leaves_no_hook(tmp_path: Path) -> None:
    keep = OnymCheckpointIO()
    first, second = Module(), Module()
    with pytest.raises(Stopped):
        trainer_of(tmp_path, _StopAfter(0), keep=keep, max_epochs=1).fit(first, data())
    trainer_of(tmp_path, keep=keep, max_epochs=1).fit(second, data())
    assert not first._load_state_dict_pre_hooks
    assert not second._load_state_dict_pre_hooks


def test_a_last_that_is_a_link(tmp_path: Path) -> None:
    keep = OnymCheckpointIO()
    files = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=2, save_last="link", every_n_train_steps=2, monitor="step", mode="max"
    )
    module = Module()
    Trainer(**QUIET, max_epochs=2, plugins=[keep], callbacks=[keep, files]).fit(module, data())
    assert (tmp_path / "last.ckpt").is_symlink()
    again = Module()
    Trainer(**QUIET, max_epochs=2, plugins=[keep], callbacks=[keep]).fit(again, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert_equal(module, again)
    onym.load(tmp_path / "last.ckpt", into=Module())


class Colour(enum.Enum):
    RED = 1


def test_settings_of_odd_kinds(tmp_path: Path) -> None:
    settings = {
        "np": np.float64(0.5), "array": np.arange(3), "dtype": torch.bfloat16, "enum": Colour.RED, "set": {1}, "class": Module,
        3: "a number as a key", Colour.RED: "an enum as a key", "nested": [{"path": Path("x"), (1, 2): None}],
    }  # fmt: skip
    fit(tmp_path, 1, settings=settings)
    found = onym.load_state(tmp_path / "last.ckpt")["hyper_parameters"]["settings"]
    assert found["np"] == 0.5
    assert found["array"].tolist() == [0, 1, 2]
    assert found["enum"] == "Colour.RED"
    assert found["nested"][0]["path"] == "x"
    module, _, _ = fit(tmp_path, 2, settings=settings)
    assert module.hparams.settings is settings


@pytest.mark.parametrize("whole", [False, True])
def test_fabric_saves_and_loads_under_clean_names(tmp_path: Path, whole: bool) -> None:
    def made() -> tuple[Fabric, Any, Any]:
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[OnymCheckpointIO()])
        net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        if whole:
            net = torch.compile(net, backend="eager")
        else:
            net[0] = torch.compile(net[0], backend="eager")
        return fabric, *fabric.setup(net, torch.optim.AdamW(net.parameters(), 0.01))

    def train(net: Any, optimizer: Any, fabric: Fabric) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            fabric.backward(net(torch.ones(2, 4)).square().mean())
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fabric, net, optimizer = made()
        train(net, optimizer, fabric)
        fabric.save(tmp_path / "x.ckpt", {"model": net, "optimizer": optimizer, "step": 3})
    train(net, optimizer, fabric)
    other, again, its = made()
    rest = other.load(tmp_path / "x.ckpt", {"model": again, "optimizer": its})
    train(again, its, other)
    assert rest["step"] == 3
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), again.parameters(), strict=True))
    assert sorted(onym.load_state(tmp_path / "x.ckpt")["model"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    onym.load(tmp_path / "x.ckpt", into=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    fabric.save(tmp_path / "raw.ckpt", net.state_dict())
    other.load_raw(tmp_path / "raw.ckpt", again)


PROGRAM = """
import logging, random, sys, warnings
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
from pathlib import Path
import numpy as np
import torch
from tests.integrations.test_lightning_more import *
folder, epochs = Path(sys.argv[1]), int(sys.argv[2])

class Seeds(Callback):
    def on_fit_start(self, trainer, module):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(trainer.global_rank)

trainer = trainer_of(folder, Seeds(), max_epochs=epochs, devices=2, strategy="ddp")
module = Module(True)
trainer.fit(module, data(), ckpt_path="last" if (folder / "last.ckpt").exists() else None)
drawn = [torch.rand(3).tolist(), random.random(), np.random.rand()]
torch.save([dict(module.state_dict()), drawn], folder.with_name(f"{folder.name}-{trainer.global_rank}.pth"))
"""

IMPORTED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from onym.integrations.lightning import OnymCheckpointIO
assert "lightning.pytorch" not in sys.modules
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(torch.nn.Linear(2, 1), backend="eager")
    def training_step(self, batch, _): return self.net(batch).square().mean()
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters())
    def train_dataloader(self): return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
for epochs in (1, 2):
    keep = OnymCheckpointIO()
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, plugins=[keep],
                      callbacks=[keep, ModelCheckpoint(sys.argv[1], save_last=True)])
    trainer.fit(Module(), ckpt_path="last" if epochs == 2 else None)
assert trainer.global_step == 8
import onym
assert set(onym.load_state(sys.argv[1] + "/last.ckpt")["state_dict"]) == {"net.weight", "net.bias"}
"""


def test_pytorch_lightning_in_its_place(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", IMPORTED, str(tmp_path)], check=True, timeout=120)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    for folder, epochs in (("straight", 4), ("resumed", 2), ("resumed", 4)):
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(tmp_path / "program.py"), str(tmp_path / folder), str(epochs)],
            check=True, timeout=180, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
    for rank in range(2):
        (one, drawn), (two, again) = (torch.load(tmp_path / f"{name}-{rank}.pth") for name in ("straight", "resumed"))
        assert drawn == again
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    found = onym.load_state(tmp_path / "resumed" / "last.ckpt")
    assert len(found["onym_rng"]) == 2
    assert not any("_orig_mod" in name or name.startswith("module.") for name in found["state_dict"])
