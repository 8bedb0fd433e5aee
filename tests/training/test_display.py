"""What a person sees: a live line in a terminal, plain lines elsewhere; and the picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from origo.training.display import Display, Standing, clock, size
from origo.training.plot import plot_losses


def shown(*, terminal: bool, width: int = 80) -> str:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, emoji=False))
    with display.activity("Tokens") as activity:
        activity("Tokenising", 1, 2)
        activity.result = "[bold]2 documents"
    with display.training():
        display.standing(Standing(5, 10, 4.0), keep=False)
        display.standing(Standing(10, 10, 3.5, 3.75, 12345.6, 61), keep=True)
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


def test_a_terminal_gets_a_live_line() -> None:
    out = shown(terminal=True)
    assert "\x1b[" in out
    assert "loss 3.500" in out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (95, "1:35"), (3599.6, "1:00:00"), (36_000, "10:00:00")])
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (52_300_000, "52.3 MB"), (2e15, "2000.0 TB")])
def test_sizes_have_units(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_a_picture_is_drawn_of_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    values = [
        {"step": n * 10, "tokens": n * 10_240, "train_loss": 7 - n / 20, **({"val_loss": 7 - n / 21} if n % 5 == 0 else {})}
        for n in range(rows)
    ]
    plot_losses(values, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
