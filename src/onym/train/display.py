"""What a person sees while a run continues: a live block in a terminal, and lines that stay, in a pipe and in a log file."""

from __future__ import annotations

import io
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from onym.units import format_clock, format_size

if TYPE_CHECKING:
    from onym.train.state import TrainState

_SAMPLE_LINES = 3
_BARS = "▁▂▃▄▅▆▇█"
_PIPE_SECONDS = 30  # between two lines about something that takes a while, where no terminal shows it
_WIDE = 132  # columns from which the sample goes beside the figures


@dataclass
class TrainStatus:
    """How far training is, and how fast."""

    state: TrainState
    steps: int
    loss: float = math.nan
    tokens_per_second: float = 0.0
    """Of the training steps alone."""
    seconds_left: float = math.nan
    losses: Sequence[float] = ()
    """The last training losses, for their trend."""
    mean_tokens_per_second: float = 0.0
    utilisation: float = 0.0
    """Share of the operations that ``utilisation_of`` stands for."""
    utilisation_of: str = ""
    share_waited: float = 0.0
    """Of the steps' time, for data."""
    memory: int = 0
    compiled: str = ""
    began_at: float = 0.0
    """Of :func:`time.monotonic`."""
    saved_step: int = -1
    saved_at: float = 0.0
    sample: str = ""

    def __str__(self) -> str:
        parts = [f"step {self.state.step:>{len(str(self.steps))}}/{self.steps}", f"loss {self.loss:.3f}"]
        if not math.isnan(self.state.held_out):
            parts.append(f"held-out {self.state.held_out:.3f}")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if not math.isnan(self.seconds_left):
            parts.append(f"ETA {format_clock(self.seconds_left)}")
        return "  ".join(parts)

    def lines(self, now: float) -> list[list[str]]:
        """What the live block shows: lines of parts that stay together."""
        state = self.state
        steps = [f"step {state.step:,} of {self.steps:,}", f"{state.step / max(1, self.steps):.0%}"]
        if self.began_at:
            steps.append(f"{format_clock(now - self.began_at)} so far")
        if not math.isnan(self.seconds_left):
            steps.append(f"ETA {format_clock(self.seconds_left)}")
        losses = [f"loss {self.loss:.3f} {trend(self.losses)}".rstrip()]
        if not math.isnan(state.held_out):
            losses.append(f"held-out {state.held_out:.3f}")
        if not math.isnan(state.best):
            losses.append(f"best {state.best:.3f} after step {state.best_step:,}")
        speed, rest = [], [f"{format_size(self.memory)} memory"] if self.memory else []
        if self.tokens_per_second:
            speed = [f"{self.tokens_per_second:,.0f} tokens/s in steps", f"mean {self.mean_tokens_per_second:,.0f}"]
            speed += [f"{self.utilisation:.0%} of {self.utilisation_of}"] if self.utilisation else []
            rest.append(f"data wait {self.share_waited:.1%}")
        if self.compiled:
            rest.append(self.compiled)
        if self.saved_step >= 0:
            rest.append(f"step {self.saved_step:,} saved {format_clock(now - self.saved_at)} ago")
        return [line for line in (steps, losses, speed, rest) if line]

    @property
    def trouble(self) -> str:
        """What went wrong so far, and was recovered from."""
        skipped = f"{self.state.skipped_steps} steps skipped" if self.state.skipped_steps else ""
        return f"{skipped}, {self.state.rollbacks} rollbacks" if self.state.rollbacks else skipped


def trend(losses: Sequence[float], width: int = 16) -> str:
    """The last values as bars, and whether they fall.

    >>> trend([4.0, 3.5, 3.2, 3.0])
    '█▅▂▁ ↓'
    """
    recent = [loss for loss in losses if math.isfinite(loss)][-width:]
    if len(recent) < 2:
        return ""
    low, high = min(recent), max(recent)
    bars = "".join(_BARS[round((loss - low) / (high - low or 1) * (len(_BARS) - 1))] for loss in recent)
    half = len(recent) // 2
    before, after = sum(recent[:half]) / half, sum(recent[half:]) / (len(recent) - half)
    return f"{bars} {'↓' if after < before else '↑' if after > before else '→'}"


class _Block:
    """The live block; rendered anew at each refresh, so that times advance between two steps."""

    def __init__(self) -> None:
        self.status: TrainStatus | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, width = self.status, options.max_width
        if status is None:
            return
        wide = width >= _WIDE
        column = width // 2 if wide else width
        yield ProgressBar(total=max(1, status.steps), completed=status.state.step, width=width)
        yield Segment.line()
        left = [Text("  ".join(_fitting(parts, column))) for parts in status.lines(time.monotonic())]
        if status.trouble:
            left.append(Text(status.trouble, style="yellow"))
        sample = " ".join(status.sample.split())
        lines = textwrap.wrap(sample, max(10, column - 4), max_lines=_SAMPLE_LINES, placeholder=" …") if sample else []
        right = [Text(f"│ {line}", style="dim") for line in lines]
        if wide:
            table = Table.grid()
            table.add_column(width=column)
            table.add_column()
            table.add_row(Text("\n").join(left), Text("\n").join(right))
            yield table
        else:
            for text in (*left, *right):
                text.truncate(width, overflow="ellipsis")
                yield text


def _fitting(parts: list[str], width: int) -> list[str]:
    """As many parts as go into a line."""
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return parts


class _Console(Console):
    """A console whose reader may go away, as with ``| head``: the run continues without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Writes to a terminal or to anything else, each as suits it.

    Args:
        console: where to; standard output by default.
    """

    @classmethod
    def silent(cls) -> Display:
        """A display that shows nothing, for ranks other than 0."""
        return cls(Console(file=io.StringIO(), quiet=True))

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False, soft_wrap=True, emoji=False)
        self._block = _Block()

    def note(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(escape(text), style=style or None)

    def warn(self, text: str) -> None:
        """A line that stays and should be read."""
        self.note(text, style="yellow")

    def fail(self, text: str) -> None:
        """A line that stays: something was lost, or is about to be."""
        self.note(text, style="bold red")

    def quote(self, title: str, text: str) -> None:
        """A sample of generated text, indented below its title."""
        self.note(title, style="bold")
        for line in text.strip().splitlines():
            self.note(f"  │ {line}", style="dim" if self.console.is_terminal else "")

    def marked(self, title: str, parts: Iterable[tuple[str, bool]]) -> None:
        """A text with some of it marked: by colour, and where there is none, by brackets like these: ⟦…⟧."""
        self.note(title, style="bold")
        line = Text("  │ ")
        colours = self.console.is_terminal and not self.console.no_color
        for text, is_marked in parts:
            shown = text.replace("\n", "\n  │ ")
            if colours:
                line.append(shown, style="green" if is_marked else "dim")
            else:
                line.append(f"⟦{shown}⟧" if is_marked else shown)
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def activity(self, title: str) -> Iterator[Activity]:
        """Something that takes a while, shown with how far it is; in a pipe, one line once it is done."""
        start = time.perf_counter()
        activity = Activity(title, self.console)
        with activity.progress:
            yield activity
        self.note(f"{activity.title}: {activity.result or 'done'} ({time.perf_counter() - start:.1f} s)")

    @contextmanager
    def training(self) -> Iterator[None]:
        """The time in which :meth:`status` is called."""
        if not self.console.is_terminal:
            yield
            return
        with Live(self._block, console=self.console, transient=True, refresh_per_second=4):
            yield

    def status(self, status: TrainStatus, *, stays: bool) -> None:
        """Show how far training is in the live block, and, where it ``stays``, as a line."""
        self._block.status = status
        if stays:
            self.note(str(status))

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Facts with their names."""
        if not self.console.is_terminal:
            for name, value in rows:
                self.note(f"{name:<{max(len(name) for name, _ in rows)}}  {value}")
            return
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, escape(value))
        self.console.print(table)


class Activity:
    """One thing being done: call it with what, how much, and of how much (0: unknown)."""

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.result = title, ""
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task(title, total=None)

        self._console = console
        self._what, self._began_at, self._began_with, self._told_at = "", 0.0, 0, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress.update(self._task, description=what, completed=done, total=total or None)

    def bytes(self, what: str, done: int, total: int) -> None:
        """The same with bytes, and how fast they go; in a pipe, a line every half minute."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._began_at, self._began_with = what, now, done
        parts = [format_size(done) + (f" of {format_size(total)}" if total else "")] if done or total else []
        seconds, read = now - self._began_at, done - self._began_with
        if seconds > 0.5 and read > 0:
            parts.append(f"{format_size(read / seconds)}/s")
            if total > done:
                parts.append(f"ETA {format_clock((total - done) * seconds / read)}")
        self(what + (f": {', '.join(parts)}" if parts else ""), done, total)
        if not self._console.is_terminal and now - self._told_at > _PIPE_SECONDS:
            self._told_at = now
            self._console.print(escape(f"{what}: {', '.join(parts)}"))
