"""From the options to a trainer: data, model, and where it starts."""

from __future__ import annotations

import torch

from onym.checkpoint.checkpointer import Checkpointer
from onym.data.batches import TrainingBatches
from onym.data.prefetch import Prefetcher
from onym.data.tokenizer import Tokenizer
from onym.data.tokens import TokenData, cached_tokenizer, survey, tokenise
from onym.errors import CheckpointError, ConfigError, RunError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.gpt.gpt2 import GPT
from onym.state.rng import seed_all
from onym.train.display import Display
from onym.train.distributed import DistContext
from onym.train.evaluate import Evaluator
from onym.train.init_from import InitFrom
from onym.train.log import TrainLog
from onym.train.loop import Trainer
from onym.train.options import TrainOptions
from onym.train.parallel import Sharding, make_sharding
from onym.train.precision import Compute
from onym.train.recovery import Recovery
from onym.train.run_folder import RunFolder
from onym.train.saving import CheckpointSaver
from onym.train.schedule import make_schedule
from onym.train.state import TrainState
from onym.train.step import Stepper
from onym.units import format_size


def prepare_data(options: TrainOptions, checkpoint: Checkpoint | None, display: Display) -> tuple[Tokenizer, TokenData]:
    """Text -> tokenizer and token streams, from the caches where they are known already.

    Args:
        checkpoint: whose tokenizer is taken.
    """
    data, corpus = options.data, options.data.corpus
    with display.activity("Text") as activity:
        found = survey(corpus, data.held_out, activity)
        activity.result = f"{found.documents:,} documents, {format_size(found.text_bytes)} of {corpus.description}"
    with display.activity("Tokenizer") as activity:
        name = "byte-level BPE"
        if checkpoint is not None:
            text = checkpoint.text(TOKENIZER)
            if text is None:
                raise CheckpointError(f"'{checkpoint.path}' holds no tokenizer: it was not written by onym train.")
            tokenizer = Tokenizer.from_json(text)
        elif data.tokenizer is not None:
            tokenizer = Tokenizer.load(data.tokenizer)
        else:
            tokenizer = cached_tokenizer(corpus, found, data.vocab_size, data.cache_dir, activity)
        activity.result = f"{data.tokenizer or name}, {tokenizer.vocab_size:,} tokens"
    with display.activity("Tokens") as activity:
        tokens = tokenise(corpus, found, tokenizer, data.cache_dir, activity)
        activity.result = f"{len(tokens.train):,} to train on, {len(tokens.held_out):,} held out"
    return tokenizer, tokens


def build_trainer(
    options: TrainOptions,
    folder: RunFolder,
    checkpointer: Checkpointer,
    display: Display,
    ranks: DistContext,
    compute: Compute,
    *,
    tokenizer_of: Checkpoint | None = None,
) -> Trainer:
    """A trainer before its first step.

    Args:
        tokenizer_of: a checkpoint whose tokenizer is taken.
    """
    sharding = make_sharding(options.run, ranks, compute)
    tokenizer, tokens = ranks.local_rank0_first(lambda: prepare_data(options, tokenizer_of, display))
    run, optimization = options.run, options.optimization
    config = options.model.config(tokenizer.vocab_size)
    schedule = make_schedule(optimization, config.context_length, len(tokens.train))
    micro_batches = schedule.micro_batches(optimization.micro_batch, ranks.world_size)
    batches = TrainingBatches(
        tokens.train,
        config.context_length,
        schedule.batch_size,
        optimization.seed,
        options.data.corpus.description,
        (ranks.rank, ranks.world_size),
    )
    seed_all(optimization.seed)
    model = sharding.make(config) if sharding else GPT(config).to(compute.device)
    stepper = Stepper(model, optimization, compute, ranks, sharding)
    saver = CheckpointSaver(checkpointer, folder.checkpoints, display, stepper, tokenizer.to_json())
    log = TrainLog(options, folder, display, ranks, saver, schedule=schedule, config=config, compute=compute)
    gathers_bf16 = sharding is not None and sharding.gather_bf16
    sequences = run.eval_batches * schedule.batch_size
    return Trainer(
        options=options,
        folder=folder,
        schedule=schedule,
        tokens=tokens,
        display=display,
        checkpointer=checkpointer,
        stepper=stepper,
        batches=Prefetcher(batches.__getitem__, compute.device),
        evaluator=Evaluator(tokenizer, tokens.held_out, compute, ranks, gathers_bf16, sequences),
        saver=saver,
        log=log,
        recovery=Recovery(stepper, saver, log, schedule, display),
        state=TrainState(
            tokens=tokens.path.name, environment=_environment(compute, ranks, sharding), micro_batch=micro_batches[0]
        ),
        micro_batches=micro_batches,
    )


def continue_run(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Continue a run from its checkpoint.

    Raises:
        RunError: its text is another one now.
    """
    now, state = trainer.state, TrainState.of(checkpoint)
    if state.tokens != now.tokens:
        if trainer.options.run.data_changed == "refuse":
            raise RunError(
                f"The text of the run '{trainer.folder.path}' has changed since it was started, so it cannot continue as it "
                "was: bring the text back, start a new run under another --name, or continue with --data-changed accept."
            )
        trainer.display.warn("The text has changed; continuing with the new one, as --data-changed says.")
    for name, value in now.environment.items():
        if (before := state.environment.get(name)) != value:
            trainer.display.warn(f"Not bitwise identical to a run without the interruption: {name} was {before}, is {value}.")
    same_processes = state.environment["processes"] == now.environment["processes"]
    if trainer.options.optimization.micro_batch == "auto" and same_processes:  # another split of a batch rounds otherwise
        trainer.micro_batches = [size for size in trainer.micro_batches if size <= state.micro_batch]
    trainer.state = trainer.saver.restore(checkpoint)
    trainer.state.tokens, trainer.state.environment = now.tokens, now.environment
    trainer.state.micro_batch = trainer.micro_batches[0]


def init_from(trainer: Trainer, start: InitFrom) -> None:
    """Start with the weights of another run or program; with its optimizer and its count of steps where they come along."""
    stepper = trainer.stepper
    start.load_into(stepper.model)
    if stepper.average is not None:  # an average of these weights, not of the random ones before
        stepper.average.model.load_state_dict(stepper.model.state_dict())
    if not start.step:
        return
    if start.step >= trainer.schedule.steps:
        raise ConfigError(
            f"'{start.checkpoint.path}' has {start.step} steps behind it, and {trainer.schedule.steps} were asked for: give "
            f"--steps more than {start.step}."
        )
    start.load_into_optimizer(stepper.model, stepper.optimizers)
    trainer.state.step = start.step


def _environment(compute: Compute, ranks: DistContext, sharding: Sharding | None) -> dict[str, str]:
    """What the last bit of a result depends on, besides the options."""
    machine = f"{compute}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    processes = f"{ranks.world_size}{f', {sharding}' if sharding else ''}"
    return {"torch": str(torch.__version__), "machine": machine, "processes": processes}
