"""A run's folder: what was asked for, how far it is, and what a person wants to look at.

runs/NAME/run.json        options, model, status
              tokenizer.json
          metrics.jsonl   a row every few steps
          loss.png        samples/step-000000100.txt
          checkpoints/    see store.run
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from onym.checkpoint.steps import CHECKPOINTS
from onym.errors import RunError, storage_error
from onym.storage.paths import replace_file
from onym.train.options import TrainOptions, completed, flag

DESCRIPTION, METRICS = "run.json", "metrics.jsonl"
RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"

CHANGEABLE = {
    # How the text is named; whether it is the same is seen by the tokens.
    *("sft", "classify"),
    *("data", "text_field", "mix", "suffix", "tokenizer_sample", "on_bad_file"),
    *("cache_dir", "name", "runs_dir", "eval_every", "eval_batches", "save_every", "keep_last", "keep_every", "keep_best"),
    *("log_every", "compile", "precision", "deterministic", "device", "processes", "time_limit", "data_changed", "track"),
    "peer_timeout",
    *(
        "steps",
        "epochs",
        "tokens",
        "learning_rate",
        "muon_learning_rate",
        "muon_momentum_warmup",
        "schedule",
        "min_learning_rate",
        "warmup_steps",
        "decay_share",
    ),
    *("micro_batch", "grad_clip", "spike_sigma", "patience", "gradient_checkpointing"),
    *("parallel", "gather_dtype", "cpu_offload"),
}
"""Options that may differ when a run is continued."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path
    writes: bool = True
    """False on ranks other than 0, which write nothing."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the steps."""
        return self.path / CHECKPOINTS

    @property
    def loss_plot(self) -> Path:
        """The picture of the losses."""
        return self.path / "loss.png"

    @property
    def metrics(self) -> Path:
        """One JSON object a row."""
        return self.path / METRICS

    def require_writable(self) -> None:
        """Fail now rather than after the text was read.

        Raises:
            StorageError: the folder cannot be made here.
        """
        if not self.writes:
            return
        new = list(takewhile(lambda folder: not folder.exists(), (self.path, *self.path.parents)))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise storage_error("write the run", self.path, error) from error
        finally:
            for folder in new:  # leave no trace of a run that has not begun
                with suppress(OSError):  # it was not made, or another process has put something into it
                    folder.rmdir()

    def description(self) -> dict[str, Any] | None:
        """What run.json says, or None where the run has not begun.

        Raises:
            RunError: the file is damaged.
        """
        path = self.path / DESCRIPTION
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            TrainOptions.from_dict(values["options"])
            assert isinstance(values["status"], str)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise storage_error("read the run", path, error) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise RunError(f"'{path}' is damaged: take another --name; the checkpoints beside it are whole.") from error
        return values  # type: ignore[no-any-return]

    def _replace(self, name: str, text: str) -> None:
        if self.writes:
            replace_file(self.path / name, text)

    def describe(self, options: TrainOptions, status: str, **facts: Any) -> None:
        """Write run.json anew."""
        self._replace(DESCRIPTION, json.dumps({"status": status, **facts, "options": options.to_dict()}, indent=2) + "\n")

    def keep_tokenizer(self, text: str) -> None:
        """Write the tokenizer beside the run's description, as every checkpoint has it too."""
        self._replace("tokenizer.json", text)

    def add_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows: all of them, or none."""
        if not self.writes:
            return
        try:
            with self.metrics.open("ab", buffering=0) as file:
                end = file.tell()
                lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
                try:
                    if file.write(lines) != len(lines):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise storage_error("write the metrics", self.metrics, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows; a last one that was cut off is skipped."""
        if not self.metrics.exists():
            return []
        rows = []
        try:
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise storage_error("read the metrics", self.metrics, error) from error
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def keep_metrics(self, count: int) -> None:
        """Delete all rows after the first ``count``: their steps will be trained again."""
        self._replace(METRICS, "".join(json.dumps(row) + "\n" for row in self.read_metrics()[:count]))

    def sync_metrics(self) -> None:
        """Make the rows durable (fsync)."""
        if not self.writes:
            return
        try:
            with self.metrics.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error("write the metrics", self.metrics, error) from error

    def add_sample(self, step: int, text: str) -> None:
        """Write a sample of what the model generates."""
        self._replace(f"samples/step-{step:09d}.txt", text)


_NOT_REPORTED = ("--cache-dir", "--name", "--runs-dir", "--data-changed", "--time-limit", "--keep")


def require_same_run(stored: Mapping[str, Mapping[str, Any]], options: TrainOptions, path: Path) -> list[str]:
    """Compare the options of a run that continues with those it was started with.

    Returns:
        The changes, in words, that a run may have.

    Raises:
        RunError: one that it may not.
    """
    changed: list[str] = []
    refused: list[str] = []
    for subject, fields in options.to_dict().items():
        had = completed(subject, stored.get(subject, {}))
        for name, value in fields.items():
            before = had.get(name, value)
            if before == value:
                continue
            change = f"{flag(name)} was {_shown(before)}, is {_shown(value)}"
            (changed if name in CHANGEABLE else refused).append(change)
    if refused:
        raise RunError(
            f"The run '{path}' was started with other options ({'; '.join(refused)}): give the ones it was started with to "
            "continue it, or another --name to start a new one."
        )
    return [change for change in changed if not change.startswith(_NOT_REPORTED)]


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) or "not given" if isinstance(value, list) else str(value)
