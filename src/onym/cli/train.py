"""``onym train``: text in, a trained GPT out."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from shlex import quote

from onym.format.manifest import MODEL
from onym.train.display import Display
from onym.train.distributed import launched
from onym.train.launch import launch
from onym.train.loop import Outcome
from onym.train.options import RunOptions, TrainOptions
from onym.train.run import train
from onym.train.run_folder import FINISHED
from onym.units import format_size


def run(given: tuple[TrainOptions, list[str]]) -> int:
    """``onym train``."""
    options, arguments = given
    display = Display()
    if options.run.processes > 1 and not launched():
        called = [sys.argv[0]] if Path(sys.argv[0]).name == "onym" else ["-m", "onym"]
        return launch(options.run.processes, [sys.executable, *called, "train", *arguments])
    outcome = train(options, display)
    if not outcome.is_rank0:
        return outcome.exit_code
    if outcome.status != FINISHED:
        kept = f"everything is saved in '{outcome.checkpoint}'. The same command continues."
        if outcome.non_finite:
            where = f"from the one before, '{outcome.checkpoint}'" if outcome.checkpoint else "from the beginning"
            kept = f"its weights are non-finite, so they were not saved. The same command continues {where}."
        display.note(f"Stopped after step {outcome.state.step} ({outcome.reason}); {kept}")
        return outcome.exit_code
    _summarise(outcome, display)
    return 0


def _summarise(outcome: Outcome, display: Display) -> None:
    """What was saved, how it was proved, and what to do next."""
    run, command = outcome.folder.path, program()
    assert outcome.checkpoint is not None
    if outcome.compilation is None and outcome.proof is None:
        display.note(f"The run '{run}' is finished already: nothing to do.")
    if outcome.proof is not None:
        display.quote("A sample, from the fresh process (what was given is in brackets):", outcome.proof.sample)
    drop = 1 - outcome.state.held_out / outcome.state.first_held_out
    rows = [
        (
            "saved",
            f"{outcome.checkpoint} ({format_size(_bytes_in(outcome.checkpoint))}; the model alone {_model_size(outcome)})",
        ),
        (
            "held-out loss",
            f"{outcome.state.first_held_out:.3f} -> {outcome.state.held_out:.3f} ({-drop:+.0%}), "
            f"perplexity {math.exp(min(outcome.state.held_out, 99)):,.1f}",
        ),
    ]
    if outcome.compilation is not None and outcome.tokens_per_second:
        how = "compiling and the first step took" if outcome.compilation.compiled else "not compiled; the first step took"
        rate = f"{outcome.tokens_per_second:,.0f} tokens/s, {outcome.share_waited:.1%} of the time waiting for data"
        rows.append(("speed", f"{rate}; {how} {outcome.compilation.seconds:.1f} s"))
    if outcome.state.skipped_steps:
        back = f"; {outcome.state.rollbacks} rollbacks" if outcome.state.rollbacks else ""
        rows.append(
            (
                "left out",
                f"{outcome.state.skipped_steps} steps whose loss or gradient was no good{back}: see {outcome.folder.metrics}",
            )
        )
    if outcome.proof is not None:
        difference = abs(outcome.proof.held_out - outcome.proof.expected)
        rows.append(
            (
                "proof",
                f"a fresh process without torch.compile opened it: held-out loss {outcome.proof.held_out:.6f}, "
                f"{'bitwise identical' if difference == 0 else f'{difference:.1e} apart'}",
            )
        )
    elif outcome.compilation is not None:
        rows.append(("proof", f"left out for want of memory; every byte of the file: {command} verify {quote(str(run))}"))
    rows.append(("look at", f"{outcome.folder.loss_plot}  {run / 'samples'}  {outcome.folder.metrics}"))
    display.table(rows)
    display.note("Next:", style="bold")
    display.note(f"  {command} generate {quote(str(run))} --prompt 'Return the'")
    display.note(f"  {command} train --name {quote(run.name)} --steps {2 * outcome.state.step}{_runs_dir(run)}    (longer)")
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
    return f"{format_size(sum(file.stat().st_size for file in files))}, {outcome.parameters / 1e6:.1f}M parameters"
