"""One run of ``onym train``: it meets the other processes, finds what is there, trains, and puts failures into sentences."""

from __future__ import annotations

import math
import os
import time

from onym.checkpoint.checkpointer import Checkpointer
from onym.checkpoint.steps import newest_good
from onym.errors import LESS_MEMORY, OnymError, ReportedElsewhere, RunError, is_out_of_memory
from onym.format.reader import Checkpoint
from onym.train.build import build_trainer, continue_run, init_from
from onym.train.display import Display
from onym.train.distributed import LAUNCHER, DistContext, is_lost_connection, join, reason_of
from onym.train.init_from import base_under, starting_point
from onym.train.launch import leave_with_the_launcher
from onym.train.loop import Outcome
from onym.train.optimizer import with_recipe
from onym.train.options import TrainOptions
from onym.train.precision import choose_compute
from onym.train.run_folder import FINISHED, RunFolder, require_same_run
from onym.train.state import TrainState
from onym.train.tracking import require_tracker


def train(options: TrainOptions, display: Display) -> Outcome:
    """Start a run, or continue it.

    Raises:
        OnymError: the user's input or the surroundings prevent it.
    """
    began = time.monotonic()
    leave_with_the_launcher()
    if options.model.start_from is None:  # else the width is that of the weights
        options = with_recipe(options)
    ranks, device = join(options.run.device, options.run.peer_timeout)
    folder = RunFolder(options.run_path, writes=ranks.is_rank0)
    display = display if ranks.is_rank0 else Display.silent()
    checkpointer = Checkpointer(
        folder.checkpoints,
        keep_last=options.run.keep_last,
        keep_every=options.run.keep_every or None,
        keep_best="val_loss" if options.run.keep_best else None,
    )
    try:
        with checkpointer:
            outcome = _train(options, folder, checkpointer, display, ranks, device=device, began=began)
        for note in checkpointer.notes:
            display.warn(note)
        ranks.close()
        return outcome
    except Exception as error:
        reported = _as_reported(error, ranks, checkpointer, options.run.peer_timeout)
        if reported is error:
            raise
        raise reported from error


def _train(
    options: TrainOptions,
    folder: RunFolder,
    checkpointer: Checkpointer,
    display: Display,
    ranks: DistContext,
    *,
    device: str,
    began: float,
) -> Outcome:
    require_tracker(options.run.track)
    before = folder.description()
    checkpoint, start = None, None
    if before is None:
        ranks.on_all_ranks(folder.require_writable)
    else:
        changes = require_same_run(before["options"], options, folder.path)
        if before["status"] != FINISHED:
            ranks.on_all_ranks(checkpointer.acquire)  # before looking what is there: another process may be adding to it
        if (found := newest_good(folder.checkpoints)) is not None:
            checkpoint = found.checkpoint
            for path, reason in found.skipped:
                display.warn(f"Passed over '{path}': {reason}")
            done = before["status"] == FINISHED and not changes and TrainState.of(checkpoint).step >= before["step"]
            if done:
                return _finished(options, folder, checkpoint, ranks)
        for change in changes:
            display.note(f"Changed since the run was started: {change}.")
    compute = choose_compute(device, options.run.precision)
    compute.set_deterministic(options.run.deterministic)
    tokenizer_of = checkpoint
    if checkpoint is None and options.model.start_from is not None:
        options, start = starting_point(options)
        tokenizer_of = start.checkpoint if options.data.tokenizer is None else None
    base = start
    if checkpoint is not None and options.finetune.lora is not None:
        base = base_under(checkpoint)
    trainer = build_trainer(
        options,
        folder,
        checkpointer,
        display,
        ranks,
        compute,
        tokenizer_of=tokenizer_of,
        base=base,
        continues=checkpoint is not None,
    )
    try:
        if before is not None and before.get("steps") == trainer.schedule.steps:  # in a longer run, another way may pay
            trainer.compiled = before.get("compiled")
        if checkpoint is not None:
            continue_run(trainer, checkpoint)
        elif start is not None:
            init_from(trainer, start)
        sharded = f", {trainer.stepper.sharding}" if trainer.stepper.sharding else ""
        processes = f"; {ranks.world_size} processes{sharded}" if ranks.world_size > 1 else ""
        display.note(
            f"Model: {options.model.preset}, {trainer.parameters / 1e6:.1f}M parameters, context "
            f"{trainer.stepper.model.config.context_length}; {compute}{processes}"
        )
        return trainer.run(began)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or not (steps := checkpointer.steps):
            raise
        raise RunError(
            f"Out of memory after step {trainer.state.step}: {LESS_MEMORY}. The same command continues from step {steps[-1]}."
        ) from error
    finally:
        trainer.batches.close()


def _finished(options: TrainOptions, folder: RunFolder, checkpoint: Checkpoint, ranks: DistContext) -> Outcome:
    """The outcome of a run that has nothing left to do."""
    parameters = sum(math.prod(shape) for shape in checkpoint.model.shapes.values())
    return Outcome(
        status=FINISHED,
        options=options,
        folder=folder,
        checkpoint=checkpoint.path,
        state=TrainState.of(checkpoint),
        parameters=parameters,
        trained_parameters=parameters,
        is_rank0=ranks.is_rank0,
    )


def _as_reported(error: Exception, ranks: DistContext, checkpointer: Checkpointer, timeout_seconds: int) -> Exception:
    """An error as the user is to read it: once, where several processes have the same one or learn of it."""
    if ranks.world_size == 1:
        return error
    if not isinstance(error, OnymError) and is_lost_connection(error):
        steps = checkpointer.steps
        where = f"from step {steps[-1]}" if steps else "from the beginning"
        if LAUNCHER in os.environ:
            return ReportedElsewhere()  # the launcher knows which process it was
        if not ranks.reports_error(on_each_machine=True):
            return ReportedElsewhere()
        return RunError(
            f"Process {ranks.rank} lost its connection to another one, which has died, or did not answer within "
            f"--peer-timeout {timeout_seconds} ({reason_of(error)}). The same command continues {where}."
        )
    if isinstance(error, OnymError):
        return error if ranks.reports_error() else ReportedElsewhere()
    error.add_note(f"In process {ranks.rank} of {ranks.world_size}.")
    return error
