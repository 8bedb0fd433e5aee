"""loss.png: the training and the held-out loss over the steps, with the tokens above."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from origo.store.filesystem import replace_file


def plot_losses(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the rows of a metrics.jsonl.

    Args:
        rows: with ``step``, ``tokens``, ``train_loss`` and, where it was measured, ``val_loss``.
        path: of the picture; replaced as a whole.
        title: above it.
    """
    from matplotlib.figure import Figure  # 0.3 s to import: only where a picture is drawn

    train = [(row["step"], row["train_loss"]) for row in rows if row.get("train_loss") is not None]
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#8fb3d9", linewidth=1, label=f"training ({train[-1][1]:.3f})")
    if held_out:
        label = f"held-out ({held_out[-1][1]:.3f})"
        axes.plot(*zip(*held_out, strict=True), color="#c1440e", linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    if rows and rows[-1]["step"] > 0:
        tokens_per_step = rows[-1]["tokens"] / rows[-1]["step"]
        above = axes.secondary_xaxis("top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
        above.set_xlabel("tokens")
        above.xaxis.set_major_formatter(
            lambda value, _: f"{value / 1e6:g}M" if value >= 1e5 else f"{value / 1e3:g}k" if value else "0"
        )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
