"""``onym train``: text in, a trained GPT out."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from onym.cli.config import arguments_of, one_of_each
from onym.errors import OnymError, ReportedElsewhere
from onym.format.manifest import MODEL
from onym.train.display import Display, size
from onym.train.distributed import launched
from onym.train.launch import launch
from onym.train.loop import Outcome, train
from onym.train.options import LENGTHS, SIZES, DataOptions, ModelOptions, OptimizationOptions, RunOptions, TrainOptions
from onym.train.run_folder import FINISHED, RunFolder


@dataclass(frozen=True)
class _Arguments:
    """Train a GPT on text and keep it under its own names.

    Without any option: a small GPT on the documentation that Python carries, in a few minutes on two cores. The same command
    continues a run that was stopped; of a run that exists, options that are not given are those it was started with.
    """

    data: DataOptions
    model: ModelOptions
    optimization: OptimizationOptions
    run: RunOptions
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml", help_behavior_hint="(default: none)")] = None
    """A TOML file with any of these options; what is given on the command line goes before it."""

    @property
    def options(self) -> TrainOptions:
        return TrainOptions(self.data, self.model, self.optimization, self.run)


def run(arguments: list[str]) -> int:
    """``onym train``."""
    display = Display()
    try:
        options = parse_options(arguments)
    except OnymError as error:
        raise error if os.environ.get("RANK", "0") == "0" else ReportedElsewhere from error
    if options.run.processes > 1 and not launched():
        called = [sys.argv[0]] if Path(sys.argv[0]).name == "onym" else ["-m", "onym"]
        return launch(options.run.processes, [sys.executable, *called, "train", *arguments])
    outcome = train(options, display)
    if not outcome.tells:
        return outcome.exit_code
    if outcome.status != FINISHED:
        kept = f"all of it is kept in '{outcome.checkpoint}'. The same command continues."
        if outcome.spoilt:
            where = f"from the one before, '{outcome.checkpoint}'" if outcome.checkpoint else "from the beginning"
            kept = f"its weights are not finite, so it was not kept. The same command goes on {where}."
        display.note(f"Stopped after step {outcome.step} ({outcome.reason}); {kept}")
        return outcome.exit_code
    _summarise(outcome, display)
    return 0


def parse_options(arguments: list[str]) -> TrainOptions:
    """The options given; of a run that exists, completed with its own."""

    def parse(defaults: TrainOptions, given: list[str]) -> _Arguments:
        known = _Arguments(defaults.data, defaults.model, defaults.optimization, defaults.run)
        return tyro.cli(_Arguments, prog="onym train", args=given, default=known, config=(tyro.conf.OmitArgPrefixes,))

    typed = one_of_each(arguments, "")
    first = parse(TrainOptions(), arguments)
    if first.config is not None:
        arguments = [*arguments_of(first.config, instead=typed), *arguments]  # the last one of two counts
        first = parse(TrainOptions(), arguments)
    options = first.options
    description = RunFolder(options.run_path).description()
    if description is None:
        return options
    stored = TrainOptions.from_dict(description["options"])
    if any(getattr(options.optimization, name) is not None for name in LENGTHS):  # one takes the place of another
        stored = replace(stored, optimization=replace(stored.optimization, steps=None, epochs=None, tokens=None))
    if not typed.isdisjoint(SIZES):
        plain = OptimizationOptions().batch_size
        stored = replace(stored, optimization=replace(stored.optimization, batch_size=plain, tokens_per_step=None))
    stored = replace(stored, run=replace(stored.run, data_changed="refuse", time_limit=None))  # each for one time only
    return parse(stored, arguments).options


def _summarise(outcome: Outcome, display: Display) -> None:
    """What was kept, how it is known to be right, and what to do next."""
    run, command = outcome.folder.path, program()
    assert outcome.checkpoint is not None
    if outcome.compilation is None and outcome.proof is None:
        display.note(f"The run '{run}' is finished already: nothing to do.")
    if outcome.proof is not None:
        display.quote("A sample, from the fresh process (what was given is in brackets):", outcome.proof.sample)
    drop = 1 - outcome.held_out / outcome.first_held_out
    rows = [
        ("kept", f"{outcome.checkpoint} ({size(_bytes_in(outcome.checkpoint))}; the model alone {_model_size(outcome)})"),
        (
            "held-out loss",
            f"{outcome.first_held_out:.3f} -> {outcome.held_out:.3f} ({-drop:+.0%}), "
            f"perplexity {math.exp(min(outcome.held_out, 99)):,.1f}",
        ),
    ]
    if outcome.compilation is not None and outcome.tokens_per_second:
        how = "compiling and the first step took" if outcome.compilation.compiled else "not compiled; the first step took"
        rate = f"{outcome.tokens_per_second:,.0f} tokens/s, {outcome.share_waited:.1%} of the time waiting for data"
        rows.append(("speed", f"{rate}; {how} {outcome.compilation.seconds:.1f} s"))
    if outcome.left_out:
        back = f"; {outcome.roll_backs} roll-backs" if outcome.roll_backs else ""
        rows.append(
            ("left out", f"{outcome.left_out} steps whose loss or gradient was no good{back}: see {outcome.folder.metrics}")
        )
    if outcome.proof is not None:
        difference = abs(outcome.proof.held_out - outcome.proof.expected)
        rows.append(
            (
                "proof",
                f"a fresh process without torch.compile opened it: held-out loss {outcome.proof.held_out:.6f}, "
                f"{'the same to the last bit' if difference == 0 else f'{difference:.1e} apart'}",
            )
        )
    elif outcome.compilation is not None:
        rows.append(("proof", f"left out for want of memory; every byte of the file: {command} verify {quote(str(run))}"))
    rows.append(("look at", f"{outcome.folder.loss_plot}  {run / 'samples'}  {outcome.folder.metrics}"))
    display.table(rows)
    display.note("Next:", style="bold")
    display.note(f"  {command} generate {quote(str(run))} --prompt 'Return the'")
    display.note(f"  {command} train --name {quote(run.name)} --steps {2 * outcome.step}{_runs_dir(run)}    (longer)")
    display.note(f"  {_python()} -c {quote(f'import onym; print(onym.load_model({json.dumps(str(run))}))')}")


def program() -> str:
    """How this program is called from here."""
    if shutil.which("onym"):
        return "onym"
    called = Path(sys.argv[0])
    return os.path.relpath(called) if called.name == "onym" else f"{_python()} -m onym"


def _runs_dir(run: Path) -> str:
    return "" if run.parent == RunOptions().runs_dir else f" --runs-dir {quote(str(run.parent))}"


def _python() -> str:
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    return os.path.relpath(sys.executable) if inside else "python"


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _model_size(outcome: Outcome) -> str:
    assert outcome.checkpoint is not None
    files = outcome.checkpoint.glob(f"{MODEL.removesuffix('.safetensors')}*.safetensors")  # of several processes' shares, all
    return f"{size(sum(file.stat().st_size for file in files))}, {outcome.parameters / 1e6:.1f}M parameters"
