"""Pictures of runs: loss.png, redrawn as a run continues, and several runs beside each other."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onym.storage.paths import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
"""Of a metrics.jsonl."""
PICTURES = (".png", ".svg", ".pdf")
"""The endings that matplotlib can write."""

TRAIN, HELD_OUT, RATE, EVENT = "#8fb3d9", "#c1440e", "#7a7a7a", "#d9a400"
_COLOURS = ("#c1440e", "#1f6f8b", "#5a8f29", "#8a4fbf", "#b8860b", "#444444", "#d1669b", "#2f9e8f")
UNITS = {"steps": "step", "tokens": "tokens", "seconds": "seconds"}
"""What may be below a picture, and the field of a row that it is."""


def plot_losses(rows: Rows, path: Path, title: str) -> None:
    """Draw one run: losses above, the learning rate below, over the steps, with the tokens on top.

    Args:
        rows: with ``step``, ``tokens``, ``train_loss`` and, where it was measured, ``val_loss``; those with an ``event`` are
            marked at the bottom.
        path: of the picture; replaced as a whole.
        title: above it.
    """
    from matplotlib.figure import Figure  # 0.3 s to import: only where a picture is drawn

    figure = Figure(figsize=(8, 5.2), dpi=120, layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for field, name, style in (
        ("train_loss", "training", {"color": TRAIN, "linewidth": 1}),
        ("val_loss", "held-out", {"color": HELD_OUT, "linewidth": 1.8, "marker": "o", "markersize": 3.5}),
        ("ema_val_loss", "held-out, average", {"color": HELD_OUT, "linewidth": 1.2, "linestyle": "--"}),
    ):
        if points := _points(rows, "step", field):
            axes.plot(*zip(*points, strict=True), label=f"{name} ({points[-1][1]:.3f})", **style)
    if events := [row["step"] for row in rows if "event" in row]:
        transform = axes.get_xaxis_transform()  # x in steps, y from 0 at the bottom to 1
        axes.plot(
            events,
            [0.01] * len(events),
            "^",
            color=EVENT,
            transform=transform,
            label=f"skipped ({len(events)})",
        )
    if axes.has_data():
        axes.legend(frameon=False)
    if rates := _points(rows, "step", "lr"):
        below.plot(*zip(*rates, strict=True), color=RATE, linewidth=1.2)
    axes.set(ylabel="loss, nats per token", title=title)
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    per_step = next((row["tokens"] / row["step"] for row in reversed(rows) if row.get("tokens") and row["step"]), 0)
    if per_step:
        above = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
        above.set_xlabel("tokens")
        above.xaxis.set_major_formatter(_short)
    for each in (axes, below):
        _tidy(each)
    _save(figure, path)


def plot_runs(runs: Mapping[str, Rows], path: Path, unit: str) -> None:
    """Draw several runs in one picture: the held-out loss of each, and its training loss behind it.

    Args:
        runs: rows by name.
        path: of the picture; its ending is the format.
        unit: one of :data:`UNITS`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(runs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = "--" if number >= len(_COLOURS) else "-"
        if train := _points(rows, UNITS[unit], "train_loss"):
            axes.plot(*zip(*train, strict=True), color=colour, linewidth=0.8, alpha=0.35, linestyle=line)
        if held_out := _points(rows, UNITS[unit], "val_loss"):
            best = min(loss for _, loss in held_out)
            axes.plot(
                *zip(*held_out, strict=True),
                color=colour,
                linewidth=1.8,
                linestyle=line,
                marker="o",
                markersize=3.5,
                label=f"{name} (best {best:.3f})",
            )
    axes.set(xlabel=unit, ylabel="loss, nats per token", title="held-out loss; thin: training")
    if unit == "tokens":
        axes.xaxis.set_major_formatter(_short)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    _tidy(axes)
    _save(figure, path)


def plot_evaluations(points: Sequence[tuple[int, float]], path: Path, title: str, loss_of_a_bit: float) -> None:
    """Draw how a run's steps did in ``onym evaluate``: bits per byte over steps, with the loss on the right.

    Args:
        points: steps and bits per byte.
        path: of the picture; its ending is the format.
        title: above it.
        loss_of_a_bit: nats a token at one bit per byte: of one text and one tokenizer both are the same curve.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), color=HELD_OUT, linewidth=1.8, marker="o", markersize=3.5)
    axes.set(xlabel="step", ylabel="bits per byte", title=title)

    def loss_of(bits: Any) -> Any:
        return bits * loss_of_a_bit

    def bits_of(loss: Any) -> Any:
        return loss / loss_of_a_bit

    right = axes.secondary_yaxis("right", functions=(loss_of, bits_of))
    right.set_ylabel("loss, nats per token")
    _tidy(axes)
    _save(figure, path)


def plot_ladder(figures: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the rungs of ``onym tools ladder``: this machine's on the left, the book's A100's on the right.

    Args:
        figures: of a ladder.json, in their order from the first.
        path: of the picture; replaced as a whole.
        title: above it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.46 * len(figures) + 1.5), dpi=120, layout="constrained")
    here, book = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    rows = range(len(figures))
    for axes, prefix, colour in ((here, "", HELD_OUT), (book, "a100_", TRAIN)):
        rates = [each.get(f"{prefix}tokens_per_second") for each in figures]
        most = max((rate for rate in rates if rate), default=1.0)
        axes.barh(rows, [rate or 0 for rate in rates], color=colour, height=0.62)
        for row, (each, rate) in enumerate(zip(figures, rates, strict=True)):
            if rate:
                factor = each.get(f"{prefix}factor")
                axes.text(
                    rate + 0.01 * most, row, f"{rate:,.0f}" + (f"  ×{factor:.2f}" if factor else ""), va="center", fontsize=9
                )
            else:
                said = (each.get("reason") or "left out") if axes is here else "not in the book"
                said = textwrap.fill(textwrap.shorten(said, 120, placeholder=" …"), 64)
                axes.text(0.01 * most, row, said, va="center", fontsize=8, color=RATE)
        totals = [each[f"{prefix}total"] for each in figures if each.get(f"{prefix}total")]
        axes.set(xlim=(0, (1.32 if axes is here else 1.45) * most), xlabel="tokens a second  × to the rung before")
        where = "this machine" if axes is here else "the book's A100, GPT-2 124M"
        axes.set_title(f"{where}: ×{totals[-1]:.2f} in all" if totals else where, fontsize=10, loc="left")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(_short)
        _tidy(axes)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    here.set_yticks(rows, [f"{each['number']}  {each['title']}" for each in figures])
    here.invert_yaxis()  # shared: the first rung on top, as in the table
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _points(rows: Rows, x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]


def _short(value: float, _: object) -> str:
    """``2_000_000`` as ``2M``."""
    return f"{value / 1e6:g}M" if value >= 1e5 else f"{value / 1e3:g}k" if value else "0"


def _tidy(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    replace_file(path, picture.getvalue())
