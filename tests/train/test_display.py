"""What a person sees: a live line in a terminal, plain lines elsewhere; and the picture."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from onym.train.display import Display, TrainStatus, _Block, trend
from onym.train.plot import plot_losses
from onym.train.state import TrainState
from onym.units import format_clock, format_size


def shown(*, terminal: bool, width: int = 80) -> str:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, emoji=False))
    with display.activity("Tokens") as activity:
        activity("Tokenising", 1, 2)
        activity.result = "[bold]2 documents"
    with display.training():
        display.status(TrainStatus(TrainState(step=5), 10, 4.0), stays=False)
        display.status(TrainStatus(TrainState(step=10, held_out=3.75), 10, 3.5, 12345.6, 61), stays=True)
    display.table([("kept", "runs/x [1] :key:"), ("held-out loss", "1.0")])
    return out.getvalue()


def test_a_pipe_gets_plain_lines_and_only_those_that_matter() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("Tokens: [bold]2 documents ("), "text is text, not markup"
    assert lines[1:] == [
        "step 10/10  loss 3.500  held-out 3.750  12,346 tokens/s  ETA 1:01",
        "kept           runs/x [1] :key:",
        "held-out loss  1.0",
    ]


def test_a_terminal_gets_a_live_block() -> None:
    out = shown(terminal=True)
    assert "\x1b[" in out
    assert "loss 3.500" in out


def block(width: int) -> list[str]:
    """What the live block shows at last."""
    full = TrainStatus(
        TrainState(step=1234, held_out=4.1, best=4.05, best_step=1200, skipped_steps=12, rollbacks=1),
        *(20_000, 4.25, 8152.0, 5025.0, [4.4, 4.3, 4.35, 4.25], 8011.0, 0.38, "the matmul rate measured here"),
        *(0.001, 1_250_000_000, "compiled in 10 s", time.monotonic() - 95, 1100, time.monotonic() - 20),
        sample="[the lamp] was the river\n" * 40,
    )
    out = io.StringIO()
    rendered = _Block()
    rendered.status = full
    Console(file=out, force_terminal=False, width=width, highlight=False, emoji=False).print(rendered)
    return out.getvalue().splitlines()


def test_the_block_fits_80_columns() -> None:
    lines = block(80)
    assert [line.rstrip() for line in lines[1:6]] == [
        "step 1,234 of 20,000  6%  1:35 so far  ETA 1:23:45",
        "loss 4.250 █▃▆▁ ↓  held-out 4.100  best 4.050 after step 1,200",
        "8,152 tokens/s in steps  mean 8,011  38% of the matmul rate measured here",
        "1.2 GB memory  data wait 0.1%  compiled in 10 s  step 1,100 saved 0:20 ago",
        "12 steps skipped, 1 rollbacks",
    ]
    assert all(line.startswith("│ [the lamp]") or "│" in line for line in lines[6:])
    assert len(lines) == 9


@pytest.mark.parametrize("width", [10, 40, 80, 131, 132, 160, 250])
def test_the_block_never_wraps(width: int) -> None:
    lines = block(width)
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 9
    assert (len(lines) <= 6) == (width >= 132), "in two columns where there is room"


def test_a_run_without_figures_has_a_block_too() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)
    rendered = _Block()
    console.print(rendered)
    rendered.status = TrainStatus(TrainState(), 10, sample="\n")
    console.print(rendered)
    assert "loss nan" in out.getvalue()
    assert trend([3.0, float("nan"), 3.0]).endswith("→")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (95, "1:35"), (3599.6, "1:00:00"), (36_000, "10:00:00")])
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert format_clock(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (52_300_000, "52.3 MB"), (2e15, "2000.0 TB")])
def test_sizes_have_units(count: float, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_a_picture_is_drawn_of_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    values = [
        {"step": n * 10, "tokens": n * 10_240, "train_loss": 7 - n / 20, **({"val_loss": 7 - n / 21} if n % 5 == 0 else {})}
        for n in range(rows)
    ]
    plot_losses(values, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
