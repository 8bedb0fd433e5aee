"""``onym train``: text in, a trained GPT out."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable
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
from onym.units import format_size, plural


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
        saved = f"everything is saved in '{outcome.checkpoint}'. The same command continues."
        if outcome.non_finite:
            where = f"from the one before, '{outcome.checkpoint}'" if outcome.checkpoint else "from the beginning"
            saved = f"its weights are non-finite, so they were not saved. The same command continues {where}."
        display.note(f"Stopped after step {outcome.state.step} ({outcome.reason}); {saved}")
        return outcome.exit_code
    _summarise(outcome, display)
    return 0


def _summarise(outcome: Outcome, display: Display) -> None:
    """What was saved, how it was proved, and what to do next."""
    run, command = outcome.folder.path, program()
    assert outcome.checkpoint is not None
    if outcome.compilation is None and outcome.proof is None:
        display.note(f"The run '{run}' is finished already: nothing to do.")
    if outcome.proof is not None and outcome.proof.sample:
        display.quote("A sample, from the fresh process (what was given is in brackets):", outcome.proof.sample)
    state, proof, compilation = outcome.state, outcome.proof, outcome.compilation
    size, perplexity = _bytes_in(outcome.checkpoint.iterdir()), math.exp(min(state.held_out, 99))
    change = state.held_out / state.first_held_out - 1
    # Of several ranks, all files with shards of the model.
    model_size = _bytes_in(outcome.checkpoint.glob(f"{MODEL.removesuffix('.safetensors')}*.safetensors"))
    tuning = outcome.options.finetune
    adapter, classifies = tuning.lora is not None, tuning.task == "classify"
    counted = f"{outcome.parameters / 1e6:.1f}M parameters"
    if outcome.trained_parameters < outcome.parameters:
        counted += f", {outcome.trained_parameters / 1e6:.2f}M of them trained"
    means = _scores(outcome) if classifies else f", perplexity {perplexity:,.1f}"
    rows = {
        "saved": f"{outcome.checkpoint} ({size}; the {'adapter' if adapter else 'model'} alone {model_size}, {counted})",
        "held-out loss": f"{state.first_held_out:.3f} -> {state.held_out:.3f} ({change:+.0%}){means}",
    }
    if adapter:
        rows["base"] = f"{outcome.options.model.start_from}, which the adapter needs: it is opened and checked with it"
    if compilation is not None and outcome.tokens_per_second:
        how = "compiling and the first step took" if compilation.compiled else "not compiled; the first step took"
        rate = f"{outcome.tokens_per_second:,.0f} tokens/s, {outcome.share_waited:.1%} of the time waiting for data"
        rows["speed"] = f"{rate}; {how} {compilation.seconds:.1f} s"
    if state.skipped_steps:
        back = f"; {plural(state.rollbacks, 'rollback')}" if state.rollbacks else ""
        rows["skipped"] = (
            f"{plural(state.skipped_steps, 'step')} whose loss or gradient was non-finite or a spike{back}: "
            f"see {outcome.folder.metrics}"
        )
    if proof is not None:
        difference = abs(proof.held_out - proof.expected)
        equal = "bitwise identical" if difference == 0 else f"{difference:.1e} apart"
        rows["proof"] = f"a fresh process without torch.compile opened it: held-out loss {proof.held_out:.6f}, {equal}"
    elif compilation is not None:
        rows["proof"] = f"skipped for lack of memory; every byte of the file: {command} verify {quote(str(run))}"
    rows["look at"] = f"{outcome.folder.loss_plot}  {run / 'samples'}  {outcome.folder.metrics}"
    display.table(list(rows.items()))
    display.note("Next:", style="bold")
    name = quote(str(run))
    if classifies:
        display.note(f"  {command} classify {name} 'a text'    (or one a line on standard input)")
    elif tuning.task == "chat":
        display.note(f"  {command} chat {name}")
    else:
        display.note(f"  {command} generate {name} --prompt 'Return the'")
        display.note(f"  {command} evaluate {name}    (bits per byte, which compare with any other model's)")
    if not classifies:
        display.note(f"  {command} serve {name}    (a page to write in, a page of runs, OpenAI's interface)")
    if tuning.given is not None:
        merged = ", merged: --unmerged writes base and adapter" if adapter else ""
        display.note(f"  {command} convert {name} {quote(run.name)}-hf --to huggingface    (for transformers{merged})")
    display.note(f"  {command} train --name {quote(run.name)} --steps {2 * outcome.state.step}{_runs_dir(run)}    (longer)")
    display.note(f"  {_python()} -c {quote(f'import onym; print(onym.load_model({json.dumps(str(run))}))')}")


def _scores(outcome: Outcome) -> str:
    """How often a classifier was right at the last evaluation."""
    rows = [row for row in outcome.folder.read_metrics() if "accuracy" in row]
    return f", accuracy {rows[-1]['accuracy']:.1%}, F1 {rows[-1]['f1']:.3f} on rows that it was not trained on" if rows else ""


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


def _bytes_in(files: Iterable[Path]) -> str:
    return format_size(sum(file.stat().st_size for file in files))
