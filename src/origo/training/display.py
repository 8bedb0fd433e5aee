"""What a person sees while a run goes on: a live line in a terminal, and lines that stay there, in a pipe and in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass
class Standing:
    """How far training is."""

    step: int
    steps: int
    loss: float = float("nan")
    held_out: float = float("nan")
    tokens_per_second: float = 0.0
    seconds_left: float = float("nan")

    def __str__(self) -> str:
        parts = [f"step {self.step:>{len(str(self.steps))}}/{self.steps}", f"loss {self.loss:.3f}"]
        if self.held_out == self.held_out:
            parts.append(f"held-out {self.held_out:.3f}")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left == self.seconds_left:
            parts.append(f"ETA {clock(self.seconds_left)}")
        return "  ".join(parts)


class _Console(Console):
    """A console whose reader may go away, as with ``| head``: the run goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Writes to a terminal or to anything else, each as suits it.

    Args:
        console: where to; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False, soft_wrap=True, emoji=False)
        self._live: Progress | None = None

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

    @contextmanager
    def activity(self, title: str) -> Iterator[Activity]:
        """Something that takes a while, shown with how far it is; in a pipe, one line once it is done."""
        start = time.perf_counter()
        activity = Activity(title, self.console)
        with activity.progress:
            yield activity
        self.note(f"{title}: {activity.result or 'done'} ({time.perf_counter() - start:.1f} s)")

    @contextmanager
    def training(self) -> Iterator[None]:
        """The time in which :meth:`standing` is called."""
        if not self.console.is_terminal:
            yield
            return
        columns = (BarColumn(bar_width=16), TextColumn("{task.fields[text]}", markup=False))
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as self._live:
            self._live.add_task("", text="")
            yield
        self._live = None

    def standing(self, standing: Standing, *, keep: bool) -> None:
        """Show how far training is; ``keep`` makes it a line that stays."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=standing.step, total=standing.steps, text=str(standing))
        if keep:
            self.note(str(standing))

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
        self.result = ""
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

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress.update(self._task, description=what, completed=done, total=total or None)


def clock(seconds: float) -> str:
    """``95.0`` as ``1:35``."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def size(count: float) -> str:
    """``52_300_000`` as ``52.3 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
