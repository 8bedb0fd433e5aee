"""From the options to a trainer: data, model, and where it starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from onym.checkpoint.checkpointer import Checkpointer
from onym.data.batches import TrainingBatches
from onym.data.cache import LIMIT_BYTES, bound
from onym.data.packing import describe
from onym.data.prefetch import Prefetcher
from onym.data.sources import Source, Sources
from onym.data.survey import KEPT, Survey, survey
from onym.data.token_files import is_token_data, link_tokens, tokenizer_of
from onym.data.tokenise import tokenise
from onym.data.tokenizer import Tokenizer
from onym.data.train_tokenizer import cached_tokenizer
from onym.errors import CheckpointError, ConfigError, DataError, RunError
from onym.format.manifest import TOKENIZER
from onym.format.reader import Checkpoint
from onym.gpt.models import make_model
from onym.state.collectives import all_gather_object
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
from onym.units import format_size, parse_size


def prepare_data(options: TrainOptions, checkpoint: Checkpoint | None, display: Display) -> tuple[Tokenizer, Sources]:
    """Text -> tokenizer and token streams, from the caches where they are known already.

    Args:
        checkpoint: whose tokenizer is taken.
    """
    data = options.data
    specs = data.sources
    texts: dict[str, Survey] = {}
    with display.activity("Text") as activity:
        for spec in specs:
            if not is_token_data(spec.data):
                corpus = data.corpus(spec, activity.bytes)
                skips, kept = data.on_bad_file == "skip", KEPT // len(specs)
                texts[spec.name] = survey(corpus, data.held_out, activity.bytes, skip_bad_files=skips, kept=kept)
        activity.result = _described(texts.values(), data.description) if texts else f"token files of {data.description}"
    for found in texts.values():
        for _, reason in found.skipped:
            display.warn(f"Skipped: {reason}")
    with display.activity("Tokenizer") as activity:
        name = data.tokenizer or "byte-level BPE"
        linked = [spec.data for spec in specs if spec.name not in texts]
        if checkpoint is not None:
            text = checkpoint.text(TOKENIZER)
            if text is None:
                raise CheckpointError(f"'{checkpoint.path}' holds no tokenizer: it was not written by onym train.")
            tokenizer = Tokenizer.from_json(text)
        elif data.tokenizer is not None:
            tokenizer = Tokenizer.load(data.tokenizer)
        elif linked:
            tokenizer, name = tokenizer_of([entry for entries in linked for entry in entries]), "that of the token files"
        else:
            sample = parse_size(data.tokenizer_sample, "--tokenizer-sample")
            surveys = list(texts.values())
            tokenizer = cached_tokenizer(
                surveys, data.vocab_size, data.cache_dir, activity.bytes, sample_bytes=sample, warn=display.warn
            )
        activity.result = f"{name}, {tokenizer.vocab_size:,} tokens"
    with display.activity("Tokens") as activity:
        made = []
        for spec in specs:
            if spec.name in texts:
                tokens = tokenise(texts[spec.name], tokenizer, data.cache_dir, activity.bytes, display.warn)
            else:
                tokens = link_tokens(spec.data, tokenizer, data.held_out, data.cache_dir)
            skipped = texts[spec.name].skipped if spec.name in texts else ()
            made.append(Source(spec.name, spec.weight, tokens, skipped))
        sources = Sources(tuple(made))
        activity.result = f"{sources.training_tokens:,} to train on, {sources.held_out_tokens:,} held out"
    if freed := bound(data.cache_dir):
        limit = format_size(LIMIT_BYTES)
        display.note(f"Text cache: {format_size(freed)} deleted that nobody had used for a week (limit {limit}).")
    return tokenizer, sources


def _described(texts: Iterable[Survey], name: str) -> str:
    documents, text_bytes = (sum(getattr(found, what) for found in texts) for what in ("documents", "text_bytes"))
    return f"{documents:,} documents, {format_size(text_bytes)} of {name}"


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
    tokenizer, sources = ranks.local_rank0_first(lambda: prepare_data(options, tokenizer_of, display))
    if len(set(all_gather_object(sources.key, collective=ranks.world_size > 1))) > 1:
        raise DataError(f"{options.data.description} changed while the processes read it: run the same command again.")
    run, optimization = options.run, options.optimization
    config = options.model.config(tokenizer.vocab_size)
    schedule = make_schedule(optimization, config.context_length, sources.training_tokens)
    micro_batches = schedule.micro_batches(optimization.micro_batch, ranks.world_size)
    padding = tokenizer.end_of_text if optimization.packing == "documents" else None
    windows = sources.windows(config.context_length, schedule.batch_size, options.data.description, padding)
    if padding is not None:  # an epoch is all windows, and padding is in them
        schedule = make_schedule(optimization, config.context_length, sum(map(len, windows)) * config.context_length + 1)
        display.note(f"Packing: {describe(windows)}")
    batches = TrainingBatches(windows, schedule.batch_size, optimization.seed, sources.weights, (ranks.rank, ranks.world_size))
    if sources.mixed:
        epochs = sources.epochs(schedule.steps * schedule.batch_size, windows)
        parts = [f"{name} {share:.1%}, {epochs[name]:.2f} epochs" for name, share in sources.shares.items()]
        display.note(f"Mixture: {'; '.join(parts)}")
    seed_all(optimization.seed)
    model = sharding.make(config) if sharding else make_model(config).to(compute.device)
    if optimization.zero_init:
        model.zero_residual_outputs()
    masked = optimization.separates_documents
    stepper = Stepper(model, optimization, compute, ranks, sharding, tokenizer.end_of_text if masked else None)
    saver = CheckpointSaver(checkpointer, folder.checkpoints, display, stepper, tokenizer.to_json())
    log = TrainLog(options, folder, display, ranks, saver, schedule=schedule, config=config, compute=compute)
    gathers_bf16 = sharding is not None and sharding.gather_bf16
    sequences = run.eval_batches * schedule.batch_size
    return Trainer(
        options=options,
        folder=folder,
        schedule=schedule,
        sources=sources,
        display=display,
        checkpointer=checkpointer,
        stepper=stepper,
        batches=Prefetcher(batches.__getitem__, compute.device),
        evaluator=Evaluator(tokenizer, sources, compute, ranks, gathers_bf16, sequences, masked),
        saver=saver,
        log=log,
        recovery=Recovery(stepper, saver, log, schedule, display),
        state=TrainState(tokens=sources.key, environment=_environment(compute, ranks, sharding), micro_batch=micro_batches[0]),
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
