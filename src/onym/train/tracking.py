"""A run's figures in TensorBoard or Weights & Biases too, written by their own libraries."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from onym.errors import ConfigError, StorageError

TrackerName = Literal["tensorboard", "wandb"]

_NAMES = {
    "train_loss": "loss/training",
    "val_loss": "loss/held-out",
    "ema_val_loss": "loss/held-out, average",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}


class Tracker(Protocol):
    """Where rows of metrics.jsonl go, besides that file."""

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows; one with an ``event`` has no figures."""

    def sample(self, step: int, text: str) -> None:
        """Take a sample of what the model writes."""

    def close(self) -> None:
        """Flush."""


class _TensorBoard:
    def __init__(self, folder: Path, options: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process wrote after the checkpoint is hidden: it happens again.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        if first_step == 0:
            self._writer.add_text("options", f"```json\n{json.dumps(options, indent=2)}\n```", 0)

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            for name, value in _figures(row).items():
                self._writer.add_scalar(name, value, row["step"])

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("sample", text, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        known = folder / "wandb.id"  # by it the same run continues there too
        number = known.read_text(encoding="utf-8").strip() if known.exists() else wandb.util.generate_id()
        known.write_text(number, encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "onym"),
            name=folder.name,
            id=number,
            resume="allow",
            dir=str(folder),
            config=dict(options),
        )

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if found := _figures(row):
                self._run.log(found, step=row["step"])

    def sample(self, step: int, text: str) -> None:
        self._run.summary["sample"] = text

    def close(self) -> None:
        self._run.finish()


def require_tracker(name: TrackerName | None) -> None:
    """Check that the library is installed, before anything is done.

    Raises:
        ConfigError: it is not.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError(f"--track {name} needs its library: pip install 'onym[{name}]'.")


def make_tracker(name: TrackerName, folder: Path, options: Mapping[str, Any], first_step: int) -> Tracker:
    """Begin to track a run, or continue to.

    Args:
        name: of the library.
        folder: the run's; TensorBoard's files go into it.
        options: shown with the run.
        first_step: what is there of later steps is replaced.

    Raises:
        ConfigError: the library does not begin.
    """
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, options, first_step)
        return _WeightsAndBiases(folder, options)
    except OSError as error:
        raise StorageError(f"--track {name} cannot write into '{folder}': {error.strerror or error}.") from error
    except Exception as error:  # whatever another library raises: no network, no account
        raise ConfigError(
            f"--track {name} does not begin: {str(error).splitlines()[0][:200] or type(error).__name__}"
        ) from error


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {} if "event" in row else {name: row[field] for field, name in _NAMES.items() if row.get(field) is not None}
