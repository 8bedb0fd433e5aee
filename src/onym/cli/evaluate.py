"""``onym evaluate``: how well models predict a text, side by side."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rich.console import Console

from onym.cli.arguments import EvaluateArguments
from onym.cli.report import as_step, print_json, print_table, shown
from onym.errors import ConfigError
from onym.generation.scoring import stride_of
from onym.tools.evaluation import Evaluation, Text, all_steps, candidates, evaluate, held_out_text, read_text, to_json
from onym.tools.suite import fingerprint, suite_items
from onym.train.display import Display
from onym.train.plot import PICTURES, plot_evaluations
from onym.train.precision import choose_compute
from onym.units import format_size, parse_size

_WIDEST_NAME = 28


def run(given: EvaluateArguments) -> int:
    """``onym evaluate``."""
    _check(given)
    device = choose_compute(given.device, "fp32").device
    limit = None if given.limit is None else parse_size(given.limit, "--limit")

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    settings = {name: getattr(given, name) for name in ("n_heads", "rope_base", "context_length")}
    how: dict[str, Any] = {"part": given.part, "settings": settings, "tokenizer": given.tokenizer, "note": note}
    models = all_steps(given.models[0], **how) if given.all_steps else candidates(given.models, as_step(given.step), **how)
    for each in models:
        if context := (each.found.checkpoint.config or {}).get("context_length"):
            stride_of(context, given.stride)  # before the first one is computed
    display = Display(Console(stderr=True, highlight=False, soft_wrap=True, emoji=False))
    text = read_text(given.data, given.text_field, limit) if given.data else held_out_text(models, limit, display)
    items = suite_items() if given.suite else ()
    found = []
    for each in models:
        title = shown(each.name + (f" step {each.step}" if given.all_steps else ""))
        with display.activity(title) as activity:
            how_far = functools.partial(activity, title)
            found.append(evaluate(each, text, items, given.stride, given.batch_size, device, how_far))
            activity.result = f"{found[-1].score.tokens:,} tokens"
    if given.plot is not None:
        score = found[0].score
        title = f"{PurePath(given.models[0]).name} on {text.description}"
        points = [(each.step or 0, each.score.bits_per_byte) for each in found]
        plot_evaluations(points, given.plot, title, math.log(2) * score.bytes / score.tokens)
    if given.json:
        print_json(to_json(text, items, found))
    else:
        _show(text, found, "step" if given.all_steps else "model")
        if items:
            print(f"Suite: {len(items)} items ({fingerprint(items)}), ± one standard error; only equal items compare.")
        if given.plot is not None:
            print(f"Drawn: {given.plot}")
    return 0


def _check(given: EvaluateArguments) -> None:
    """Refuse what cannot work before anything is opened."""
    if not given.models:
        raise ConfigError("Name at least one model: a run, a checkpoint, a file or a folder.")
    if given.stride is not None and given.stride < 1:
        raise ConfigError(f"--stride must be at least 1, not {given.stride}.")
    if given.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {given.batch_size}.")
    if given.all_steps and (len(given.models) > 1 or given.step != "latest"):
        raise ConfigError("--all-steps is about all steps of one run: name one, and no --step.")
    if given.plot is not None and not given.all_steps:
        raise ConfigError("--plot draws the steps of a run: add --all-steps.")
    if given.plot is not None and given.plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot takes a file that ends with {', '.join(PICTURES)}, not '{given.plot}'.")


def _show(text: Text, found: Sequence[Evaluation], first: str) -> None:
    documents = "1 document" if len(text.documents) == 1 else f"{len(text.documents):,} documents"
    print(f"{text.description[:1].upper()}{shown(text.description[1:])}: {documents}, {format_size(text.bytes)}")
    best = min((each.score.bits_per_byte for each in found if math.isfinite(each.score.bits_per_byte)), default=math.nan)
    tasks = list(found[0].tasks)
    tops = {task: max(each.tasks[task].accuracy for each in found) for task in tasks}
    several = len(found) > 1
    rows = [(first, "tokens", "stride", "loss", "perplexity", "bits/byte", *tasks)]
    for each in found:
        score = each.score
        name = str(each.step) if first == "step" else _short(each.model)
        cells = [f"{score.tokens:,}", f"{each.stride:,}", f"{score.loss:.4f}", f"{score.perplexity:,.2f}"]
        cells.append(_marked(f"{score.bits_per_byte:.4f}", several and score.bits_per_byte == best, several))
        for task in tasks:
            result = each.tasks[task]
            figure = f"{100 * result.accuracy:.1f} ± {100 * result.standard_error:.1f} %"
            cells.append(_marked(figure, several and result.accuracy == tops[task], several))
        rows.append((name, *cells))
    if tasks:
        chances = [f"{100 * found[0].tasks[task].chance:.1f} %" for task in tasks]
        rows.append(("a guess", *[""] * 5, *(_marked(each, False, several) for each in chances)))
    print_table(rows, indent="", numbers=True)
    if several:
        print("* the best. Loss and perplexity compare between models of one tokenizer, bits per byte between all.")


def _marked(cell: str, is_best: bool, several: bool) -> str:
    return cell + ("*" if is_best else " " if several else "")


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST_NAME else "…" + name[-_WIDEST_NAME + 1 :]
