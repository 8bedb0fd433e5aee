"""From the options to a trainer: data, model, and where it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from onym.checkpoint.checkpointer import Checkpointer
from onym.convert.sources import template_texts
from onym.data.batches import TrainingBatches, Windows
from onym.data.cache import LIMIT_BYTES, bound
from onym.data.examples import Examples
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
from onym.gpt.config import ModelConfig
from onym.state.collectives import all_gather_object
from onym.state.rng import seed_all
from onym.train.display import Display
from onym.train.distributed import DistContext
from onym.train.dry_run import trained_share
from onym.train.evaluate import Evaluator, separator_of
from onym.train.finetune import balanced, prepare_rows
from onym.train.init_from import InitFrom
from onym.train.log import TrainLog
from onym.train.loop import Trainer
from onym.train.options import TrainOptions
from onym.train.parallel import Sharding, make_sharding
from onym.train.precision import Compute
from onym.train.recovery import Recovery
from onym.train.run_folder import RunFolder
from onym.train.saving import CheckpointSaver
from onym.train.schedule import Schedule, make_schedule
from onym.train.state import TrainState
from onym.train.step import Stepper
from onym.train.trained import make_trained
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
    base: InitFrom | None = None,
    continues: bool = False,
) -> Trainer:
    """A trainer before its first step.

    Args:
        tokenizer_of: a checkpoint whose tokenizer is taken.
        base: what the run starts from; under an adapter, what stays as it is.
        continues: whether the checkpoint is one of the run itself.
    """
    sharding = make_sharding(options.run, ranks, compute)
    beside = base.checkpoint if base is not None and not continues else tokenizer_of
    if continues:  # the template that it began with, whatever a file says now
        options_of_rows = dataclasses.replace(options, finetune=dataclasses.replace(options.finetune, chat_template=None))
    else:
        options_of_rows = options
    lessons = ranks.local_rank0_first(lambda: prepare_lessons(options_of_rows, tokenizer_of, beside, display))
    sources, tokenizer = lessons.sources, lessons.tokenizer
    if len(set(all_gather_object(sources.key, collective=ranks.world_size > 1))) > 1:
        raise DataError(f"{options.data.description} changed while the processes read it: run the same command again.")
    run, optimization = options.run, options.optimization
    config = lessons.config
    schedule, windows = _windows(options, sources, config, tokenizer, display)
    micro_batches = schedule.micro_batches(optimization.micro_batch, ranks.world_size)
    batches = TrainingBatches(windows, schedule.batch_size, optimization.seed, sources.weights, (ranks.rank, ranks.world_size))
    seed_all(optimization.seed)
    if continues and tokenizer_of is not None:
        require_same_labels(config, tokenizer_of)
    made = make_trained(options, config, sharding, compute, base)
    separator = separator_of(sources, tokenizer, document_mask=optimization.separates_documents)
    if options.finetune.class_weights == "balanced":
        made.model.class_weights = torch.tensor(balanced(lessons.label_counts), device=compute.device)
    stepper = Stepper(made.model, optimization, compute, ranks, sharding, separator, made.lora)
    texts = {TOKENIZER: tokenizer.to_json(), **lessons.texts}
    saver = CheckpointSaver(checkpointer, folder.checkpoints, display, stepper, texts)
    trained = trained_share(made.model)
    log = TrainLog(options, folder, display, ranks, saver, schedule=schedule, config=config, compute=compute, trained=trained)
    rounds = made.rounds_base or (sharding is not None and sharding.gather_bf16)
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
        evaluator=Evaluator(tokenizer, sources, compute, ranks, rounds, sequences, separator),
        saver=saver,
        log=log,
        recovery=Recovery(stepper, saver, log, schedule, display),
        state=TrainState(tokens=sources.key, environment=_environment(compute, ranks, sharding), micro_batch=micro_batches[0]),
        micro_batches=micro_batches,
    )


def require_same_labels(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Refuse rows with other labels than a run's: its head has a row for each, in their order.

    Raises:
        RunError: says which.
    """
    before, now = list((checkpoint.config or {}).get("labels", ())), list(config.labels)
    if before != now:
        raise RunError(
            f"The run was started with the labels {', '.join(before)}, and the rows have {', '.join(now)} now: bring them "
            "back, or start a new run under another --name."
        )


@dataclass(frozen=True)
class Lessons:
    """What is learned from, and the shape of the model that learns."""

    tokenizer: Tokenizer
    sources: Sources | Examples
    config: ModelConfig
    label_counts: tuple[int, ...] = ()
    """Of a classifier, the rows of each label."""
    texts: dict[str, str] = field(default_factory=dict)
    """Files that belong to the model, beside its tokenizer."""


def prepare_lessons(
    options: TrainOptions, checkpoint: Checkpoint | None, beside: Checkpoint | None, display: Display
) -> Lessons:
    """Text or rows -> tokens, from the caches where they are known already.

    Args:
        checkpoint: whose tokenizer is taken.
        beside: whose chat template.
    """
    if options.finetune.source is None:
        tokenizer, sources = prepare_data(options, checkpoint, display)
        texts = template_texts(checkpoint) if checkpoint is not None else {}  # which goes with its tokenizer
        return Lessons(tokenizer, sources, options.model.config(tokenizer.vocab_size), texts=texts)
    if checkpoint is None:
        assert options.data.tokenizer is not None
        tokenizer = Tokenizer.load(options.data.tokenizer)
    else:
        tokenizer = Tokenizer.from_json(checkpoint.text(TOKENIZER) or "")
    rows = prepare_rows(options, beside, tokenizer, options.model.config(1).context_length, display)
    config = options.model.config(rows.tokenizer.vocab_size)
    if rows.labels:
        config = dataclasses.replace(config, labels=rows.labels, tie_embeddings=False)  # type: ignore[call-arg]
    return Lessons(rows.tokenizer, rows.examples, config, rows.label_counts, rows.texts)


def _windows(
    options: TrainOptions, sources: Sources | Examples, config: ModelConfig, tokenizer: Tokenizer, display: Display
) -> tuple[Schedule, list[Windows]]:
    """What a sequence of a batch is, and how many of them are trained on."""
    optimization, description = options.optimization, options.data.description
    if isinstance(sources, Examples):
        rows = sources.windows
        schedule = make_schedule(optimization, sources.window, len(rows) * sources.window + 1)
        # Few rows are few steps: no more than a tenth of them warm up.
        warmup = min(optimization.warmup_steps, max(1, schedule.steps // 10))
        return dataclasses.replace(schedule, options=dataclasses.replace(optimization, warmup_steps=warmup)), [rows]
    schedule = make_schedule(optimization, config.context_length, sources.training_tokens)
    padding = tokenizer.end_of_text if optimization.packing == "documents" else None
    windows = sources.windows(config.context_length, schedule.batch_size, description, padding)
    if padding is not None:  # an epoch is all windows, and padding is in them
        schedule = make_schedule(optimization, config.context_length, sum(map(len, windows)) * config.context_length + 1)
        display.note(f"Packing: {describe(windows)}")
    if sources.mixed:
        epochs = sources.epochs(schedule.steps * schedule.batch_size, windows)
        parts = [f"{name} {share:.1%}, {epochs[name]:.2f} epochs" for name, share in sources.shares.items()]
        display.note(f"Mixture: {'; '.join(parts)}")
    return schedule, windows


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
    if stepper.lora is not None:  # its base is loaded, in the continuation too
        return
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
