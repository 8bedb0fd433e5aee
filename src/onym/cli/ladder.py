"""``onym tools ladder``: what each technique for faster training is worth on this machine."""

from __future__ import annotations

import json
import math
import textwrap

from rich.console import Console

from onym.cli.arguments import LadderArguments
from onym.cli.report import print_json, print_table
from onym.errors import ConfigError, storage_error
from onym.gpt.config import GPTConfig
from onym.storage.paths import replace_file
from onym.tools.ladder.ladder import BOOK_VOCABULARY, CPU_VOCABULARY, Figure, Ladder, climb
from onym.train.display import Display
from onym.train.plot import plot_ladder
from onym.train.precision import choose_compute
from onym.units import format_clock, format_size

_HEADINGS = ("rung", "tokens/s", "×", "total", "memory", "util", "A100", "×")
_PAYS = 1.03  # a factor below it is within what a shared machine's noise can be


def run(given: LadderArguments) -> int:
    """``onym tools ladder``."""
    for name in ("batch_size", "minutes"):
        value = getattr(given, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0, not {value}.")
    compute = choose_compute(given.device, "auto")
    gpu = compute.device.type == "cuda"
    preset = given.preset or ("gpt2-small" if gpu else "mini")
    lowered = given.vocab_size is None and preset == "mini" and not gpu
    default_vocabulary = CPU_VOCABULARY if lowered else BOOK_VOCABULARY
    shape = {"vocab_size": default_vocabulary if given.vocab_size is None else given.vocab_size}
    if given.context_length is not None:
        shape["context_length"] = given.context_length
    config = GPTConfig.preset(preset, **shape)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("write the ladder", given.out, error) from error

    display = Display(Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)) if given.json else Display()
    display.note(
        f"{preset}: {config.n_layers} layers of {config.emb_dim}, context {config.context_length:,}, vocabulary "
        f"{config.vocab_size:,}, batch {given.batch_size}; within {given.minutes:g} minutes.",
        style="bold",
    )
    if lowered:
        display.note(
            f"The vocabulary is lowered from GPT-2's {BOOK_VOCABULARY:,}, which would take too long here;\n"
            "so the head has the same part of the weights as in GPT-2 small."
        )
    ladder = climb(config, given.batch_size, compute, given.minutes, display)
    text = json.dumps(ladder.to_dict(), indent=2) + "\n"
    try:
        replace_file(given.out / "ladder.json", text)
        title = f"{ladder.machine}: {preset}, context {config.context_length:,}, vocabulary {config.vocab_size:,}"
        plot_ladder(json.loads(text)["figures"], given.out / "ladder.png", title)
    except OSError as error:
        raise storage_error("write the ladder", given.out, error) from error
    if given.json:
        print_json(ladder.to_dict())
    else:
        _show(ladder, given, preset, display)
    return 0


def _show(ladder: Ladder, given: LadderArguments, preset: str, display: Display) -> None:
    display.note("")
    print_table([_HEADINGS, *map(_cells, ladder.figures)], indent="", numbers=True)
    display.note("")
    for figure in ladder.figures:
        if figure.reason:
            display.note(textwrap.fill(f"{figure.number:>2} skipped: {figure.reason}.", 80, subsequent_indent="   "))
    display.note(
        textwrap.fill(
            f"× is to the rung before, total to the first; util is the share of {ladder.peak.flops / 1e12:,.2f} TFLOP/s "
            f"({ladder.peak.source}). A100: the book's figures, for GPT-2 124M.",
            80,
        )
    )
    display.note(f"Drawn: {given.out / 'ladder.png'}; figures: {given.out / 'ladder.json'} ({format_clock(ladder.seconds)})")
    if (gain := ladder.largest_gain) is not None:
        display.note(f"The largest gain here is {gain.title}: {gain.factor:.2f} times the rung before.")
    display.note(f"Next: {_next_command(ladder, given, preset)}", style="bold")


def _cells(figure: Figure) -> tuple[str, ...]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{figure.number:>2} {figure.title}",
        cell(figure.tokens_per_second, ",.0f"),
        cell(figure.factor, ".2f"),
        cell(figure.total, ".2f"),
        "-" if figure.memory_bytes is None else format_size(figure.memory_bytes),
        cell(figure.utilisation, ".0%"),
        cell(figure.a100_tokens_per_second, ",.0f"),
        cell(figure.a100_factor, ".2f"),
    )


def _next_command(ladder: Ladder, given: LadderArguments, preset: str) -> str:
    """``onym train`` at this shape, with what pays here and without what does not."""
    words = ["onym train", f"--preset {preset}"]
    if given.context_length is not None:
        words.append(f"--context-length {given.context_length}")
    batch = 4 * given.batch_size if (ladder.factor_of("batch") or 0) >= _PAYS else given.batch_size
    if batch != 8:
        words.append(f"--batch-size {batch}")
    if (ladder.factor_of("bf16") or 1) < 1 / _PAYS:
        words.append("--precision fp32")
    if (ladder.factor_of("compile") or 1) < 1 / _PAYS:
        words.append("--compile off")
    if given.device != "auto":
        words.append(f"--device {given.device}")
    return " ".join(words)
