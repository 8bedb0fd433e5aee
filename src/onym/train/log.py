"""What a run leaves for people: metrics.jsonl, samples, loss.png, a tracker's figures, and the lines in the terminal.

The rows that are not written yet are part of the :class:`TrainState`, so a run that continues writes the same ones. Nothing
here stops training: where the disk is full the rows are retained and tried again, and a tracker that fails is dropped.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from onym.compile.in_place import Compilation, graphs_compiled, why_compiled_again
from onym.errors import OnymError, StorageError
from onym.gpt.config import ModelConfig
from onym.train.display import Display, TrainStatus
from onym.train.distributed import DistContext
from onym.train.metering import Meter, Peak, memory_in_use, peak_of, training_flops_per_token
from onym.train.options import TrainOptions
from onym.train.plot import plot_losses
from onym.train.precision import Compute
from onym.train.run_folder import RunFolder
from onym.train.saving import CheckpointSaver
from onym.train.schedule import Schedule
from onym.train.state import TrainState
from onym.train.tracking import Tracker, make_tracker

SKIPPED, ROLLBACK = "skipped-step", "rollback"
"""Events of metrics.jsonl."""
_MOST_DRAWING = 0.1  # share of the time that drawing may take
_TREND = 16  # losses shown as bars


class TrainLog:
    """The log of one run.

    Args:
        ranks: rank 0 writes.
        config: of the model, whose operations are counted.
        trained: the share of its weights that are not frozen.
    """

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        display: Display,
        ranks: DistContext,
        saver: CheckpointSaver,
        *,
        schedule: Schedule,
        config: ModelConfig,
        compute: Compute,
        trained: float = 1.0,
    ) -> None:
        self._options, self._folder, self._display, self._ranks, self._saver = options, folder, display, ranks, saver
        self._schedule, self._compute = schedule, compute
        self._flops_per_token = training_flops_per_token(config, trained)
        self.meter = Meter(schedule.tokens_per_step)
        self._tracker: Tracker | None = None
        self._rewound = False  # metrics.jsonl has further rows, of steps that a rollback abandoned
        self._disk_writable = True  # as of the last attempt
        self._losses: deque[float] = deque(maxlen=_TREND)
        self._sample = ""
        self._began_at = self._drawn_at = time.monotonic()
        self._started_at = time.perf_counter()
        self._drawing_seconds = 0.3  # of the last picture
        self._compilation: Compilation | None = None
        self._peak: Peak | None = None
        self._graphs = self._compiled_again = 0

    def begin(self, state: TrainState, tokenizer: str) -> None:
        """Make the files those of ``state``: rows that an earlier process wrote after its last checkpoint come again."""
        self._started_at = time.perf_counter() - state.seconds
        self._folder.keep_metrics(state.rows_written)
        self._folder.keep_tokenizer(tokenizer)
        self._tracker = self._new_tracker(state)

    def compiled(self, compilation: Compilation) -> None:
        """The model runs as it will: graphs that are compiled later are reported."""
        self._compilation = compilation if compilation.compiled else None
        self._graphs, self._peak = graphs_compiled(), peak_of(self._compute)

    def seconds(self) -> float:
        """Wall-clock time of the run so far."""
        return time.perf_counter() - self._started_at

    def row(self, state: TrainState, values: dict[str, float], *, first_loss: float | None = None) -> None:
        """Write a row of metrics.jsonl for the steps since the last one, and show it.

        Args:
            values: what an evaluation gave; empty where there was none.
            first_loss: before the first step, which has no result.
        """
        applied = [result for result in state.pending if not result.bad]
        self.report_skipped_steps(state)
        loss = first_loss if first_loss is not None else _mean([result.loss for result in applied])
        norm = _mean([result.norm for result in applied])
        state.pending.clear()
        share_waited, rate = self.meter.share_waited(), self.meter.tokens_per_second()
        state.rows.append(
            {
                "step": state.step,
                "tokens": state.step * self._schedule.tokens_per_step,
                "train_loss": _finite(loss),
                "grad_norm": _finite(norm),
                "lr": self._schedule.learning_rate(max(0, state.step - 1)),
                "tokens_per_second": round(rate, 1),
                "data_wait": round(share_waited, 5),
                "seconds": round(self.seconds(), 3),
                **{name: _finite(value) for name, value in values.items()},
            }
        )
        self._write_rows(state)
        if values and time.monotonic() - self._drawn_at > self._drawing_seconds / _MOST_DRAWING:
            self.draw()
        self._losses.append(loss)
        self._report_recompilation(state)
        self._display.status(self._status(state, loss, rate), stays=bool(values))

    def report_skipped_steps(self, state: TrainState) -> None:
        """Rows and lines for the pending steps that were not applied."""
        for step, result in enumerate(state.pending, state.step - len(state.pending)):
            if not result.bad:
                continue
            loss, norm = float(result.loss), float(result.norm)
            reason = "a spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
            state.skipped_steps += 1
            about = {"event": SKIPPED, "step": step + 1, "batch": state.batch_number(step), "reason": reason}
            state.rows.append({**about, "loss": _finite(loss), "grad_norm": _finite(norm)})
            self._display.warn(f"Step {step + 1} was not applied: loss {loss:.4g}, gradient norm {norm:.4g} ({reason}).")

    def sample(self, state: TrainState, text: str) -> None:
        """Write a sample; some are shown too."""
        step, steps, every = state.step, self._schedule.steps, self._options.run.eval_every
        self._sample = text
        self._track(lambda tracker: tracker.sample(step, text))
        self._try(lambda: self._folder.add_sample(step, text))
        if 0 < step < steps and step % max(1, steps // 3 // every * every) == 0:
            self._display.quote(f"Sample after step {step}, of a held-out text (the prompt is in brackets):", text)

    def describe(self, state: TrainState, status: str, **about: Any) -> None:
        """Write run.json."""
        self._folder.describe(self._options, status, **state.summary(), steps=self._schedule.steps, **about)

    def try_describe(self, state: TrainState, status: str, **about: Any) -> None:
        """Write run.json where the disk allows it."""
        self._try(lambda: self.describe(state, status, **about))

    def sync(self) -> None:
        """Make the rows durable that the next checkpoint counts."""
        self._try(self._folder.sync_metrics)

    def all_rows(self, state: TrainState) -> list[dict[str, Any]]:
        """The rows up to this state, written or not."""
        return [*self._folder.read_metrics()[: state.rows_written], *state.rows]

    def rewind(self, state: TrainState) -> None:
        """Continue from a restored state: later rows are deleted."""
        self._rewound = True
        self._write_rows(state)
        self._track(lambda tracker: tracker.close())
        if self._tracker is not None:
            try:
                self._tracker = self._new_tracker(state)
            except OnymError as error:
                self._display.fail(f"{error} Going on without.")
                self._tracker = None

    def draw(self) -> None:
        """Draw loss.png."""
        if self._ranks.is_rank0:
            start = time.monotonic()
            self._try(lambda: plot_losses(self._folder.read_metrics(), self._folder.loss_plot, self._folder.path.name))
            self._drawn_at = time.monotonic()
            self._drawing_seconds = self._drawn_at - start

    def close(self) -> None:
        """Close the tracker and draw the last picture."""
        self._track(lambda tracker: tracker.close())
        self.draw()

    def _status(self, state: TrainState, loss: float, rate: float) -> TrainStatus:
        peak, compilation = self._peak, self._compilation
        flops = rate * self._flops_per_token
        again = f", {self._compiled_again} times more" if self._compiled_again else ""
        return TrainStatus(
            state,
            self._schedule.steps,
            loss,
            rate,
            seconds_left=(self._schedule.steps - state.step) * self._schedule.tokens_per_step / rate if rate else math.nan,
            losses=self._losses,
            mean_tokens_per_second=self.meter.mean_tokens_per_second(),
            utilisation=flops / (peak.flops * self._ranks.world_size) if peak else 0.0,
            utilisation_of=peak.source if peak else "",
            share_waited=self.meter.mean_share_waited(),
            memory=memory_in_use(self._compute.device),
            compiled=f"compiled in {compilation.seconds:.0f} s{again}" if compilation else "",
            began_at=self._began_at,
            saved_step=self._saver.saved_step,
            saved_at=self._saver.saved_at,
            sample=self._sample,
        )

    def _report_recompilation(self, state: TrainState) -> None:
        again = graphs_compiled() - self._graphs
        if again > self._compiled_again:
            self._compiled_again = again
            self._display.warn(
                f"Something was compiled again by step {state.step}, which takes time and should not be needed; please report "
                f"it: {why_compiled_again()}"
            )

    def _write_rows(self, state: TrainState) -> None:
        def write() -> None:
            if self._rewound:
                self._folder.keep_metrics(state.rows_written)
                self._rewound = False
            self._folder.add_metrics(state.rows)
            self._track(lambda tracker: tracker.rows(state.rows))
            state.rows_written += len(state.rows)
            state.rows.clear()

        self._try(write)

    def _new_tracker(self, state: TrainState) -> Tracker | None:
        """One that replaces what is there of later steps."""
        name = self._options.run.track if self._ranks.is_rank0 else None
        first_step = state.step + 1 if state.step else 0
        return None if name is None else make_tracker(name, self._folder.path, self._options.to_dict(), first_step)

    def _track(self, use: Callable[[Tracker], None]) -> None:
        """Use the tracker; one that fails is dropped, and training continues."""
        if self._tracker is None:
            return
        try:
            use(self._tracker)
        except Exception as error:  # of a network, a disk, or its own
            self._display.fail(f"--track {self._options.run.track} failed, continuing without: {type(error).__name__}: {error}")
            self._tracker = None

    def _try(self, write: Callable[[], None]) -> None:
        """Write what is only for people: a full disk does not stop training for it."""
        try:
            write()
            self._disk_writable = True
        except StorageError as error:
            if self._disk_writable:
                self._display.fail(f"{error} Training continues, and this is tried again each time.")
            self._disk_writable = False


def _mean(values: list[torch.Tensor]) -> float:
    """NaN of none."""
    return float(torch.stack([value.cpu() for value in values]).mean()) if values else math.nan


def _finite(value: float) -> float | None:
    """For JSON, which has no other numbers."""
    return round(value, 6) if math.isfinite(value) else None
