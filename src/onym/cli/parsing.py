"""Arguments of a command -> its dataclass in :mod:`onym.cli.arguments`, by tyro."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tyro

from onym.cli.arguments import COMMANDS, TOOLS, CheckResumeArguments, TrainArguments
from onym.cli.config import arguments_of, one_of_each
from onym.train.options import LENGTHS, SIZES, ModelOptions, OptimizationOptions, TrainOptions, run_path


def parse(program: str, command: str, arguments: list[str]) -> Any:
    """The dataclass of a command.

    ``train`` and ``tools check-resume`` also return the arguments of ``train`` as they were typed, because the processes that
    they start are given these.

    Raises:
        ConfigError: a value that cannot work.
        SystemExit: tyro has printed the help page (0), or what is wrong with the arguments (2).
    """
    if command == "train":
        return parse_options(arguments), arguments
    known: Any = {**COMMANDS, **TOOLS}[command]
    if known is CheckResumeArguments:
        return tyro.cli(CheckResumeArguments, prog=program, args=arguments, return_unknown_args=True)
    return tyro.cli(known, prog=program, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def parse_options(arguments: list[str]) -> TrainOptions:
    """The options of ``onym train``: as typed, else from the configuration file, else from the run if it exists."""
    typed = one_of_each(arguments, "")
    first = _parse_train(arguments, TrainOptions())
    if first.config is not None:
        arguments = [*arguments_of(first.config, instead=typed), *arguments]  # the last one of two counts
        first = _parse_train(arguments, TrainOptions())
    # Without those of the model, which may fit the kind that the run has, and not the default one.
    options = TrainOptions(first.data, ModelOptions(), first.optimization, first.run)
    from onym.train.run_folder import RunFolder  # imports torch: only after the arguments are known to be right

    description = RunFolder(run_path(first.run, first.data, first.finetune)).description()
    if description is None:
        return first.options
    stored = TrainOptions.from_dict(description["options"])
    if any(getattr(options.optimization, name) is not None for name in LENGTHS):  # one takes the place of another
        stored = replace(stored, optimization=replace(stored.optimization, steps=None, epochs=None, tokens=None))
    if not typed.isdisjoint(SIZES):
        plain = OptimizationOptions().batch_size
        stored = replace(stored, optimization=replace(stored.optimization, batch_size=plain, tokens_per_step=None))
    rate, before = options.optimization.learning_rate, stored.optimization
    if rate is not None and before.learning_rate and before.muon_learning_rate:  # both rates change, unless one is typed
        both = before.muon_learning_rate * (rate / before.learning_rate)  # in this order an equal rate changes nothing
        stored = replace(stored, optimization=replace(stored.optimization, muon_learning_rate=both))
    if first.finetune.source is not None:
        rows = replace(stored.finetune, sft=first.finetune.sft, classify=first.finetune.classify)
        stored = replace(stored, finetune=rows)
    if options.data.data or options.data.mix:  # two ways to name the text, of which the new one holds
        stored = replace(stored, data=replace(stored.data, data=(), mix=()))
    stored = replace(stored, run=replace(stored.run, data_changed="refuse", time_limit=None))  # each for one start only
    return _parse_train(arguments, stored).options


def _parse_train(arguments: list[str], defaults: TrainOptions) -> TrainArguments:
    known = TrainArguments(defaults.data, defaults.model, defaults.optimization, defaults.run, defaults.finetune)
    return tyro.cli(TrainArguments, prog="onym train", args=arguments, default=known, config=(tyro.conf.OmitArgPrefixes,))
