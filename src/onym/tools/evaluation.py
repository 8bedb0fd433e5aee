"""Models of any origin on the same text: held-out loss, perplexity and bits per byte, and the suite's tasks.

Every model reads the same documents, each whole and by itself, whatever its tokenizer and its context. All are opened and
checked before the first is computed, so that a wrong one is reported at once; one is in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onym.checkpoint.steps import CHECKPOINTS, TO_BUILD, open_step, step_folder, steps
from onym.data.corpus import Corpus, LongDocument
from onym.data.sources import key_of
from onym.data.survey import survey
from onym.data.token_files import is_token_data
from onym.data.tokenise import key_of_tokens
from onym.errors import CheckpointError, ConfigError, DataError, OnymError
from onym.format.reader import Checkpoint, require_path
from onym.generation.opening import FoundModel, find_model
from onym.generation.scoring import Progress, Score, score_texts, stride_of
from onym.storage.paths import as_path
from onym.tools.suite import Item, TaskResult, fingerprint, measure
from onym.train.display import Display
from onym.train.options import DataOptions, TrainOptions
from onym.train.run_folder import DESCRIPTION, RunFolder
from onym.train.state import TrainState

Note = Callable[[str], None]
"""Called with a sentence for the user, while something goes on."""


@dataclass(frozen=True)
class Text:
    """What models are evaluated on."""

    description: str
    documents: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """In UTF-8."""
        return sum(len(document.encode()) for document in self.documents)


@dataclass(frozen=True)
class Evaluation:
    """What was found about one model, or about one step of a run."""

    model: str
    step: int | None
    parameters: int
    vocabulary: int
    """Tokens of its tokenizer."""
    context_length: int
    stride: int
    score: Score
    tasks: Mapping[str, TaskResult]
    """Of the suite; empty without."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the derived figures among them."""
        score = self.score
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("score", "tasks")},
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "log_likelihood": score.log_likelihood,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
        }


@dataclass(frozen=True)
class Candidate:
    """A model that is known to open, and to fit its tokenizer."""

    name: str
    found: FoundModel

    @property
    def step(self) -> int | None:
        """Of a run's checkpoint."""
        manifest = self.found.checkpoint.manifest
        return manifest.step if manifest is not None else None


def candidates(names: Sequence[str], step: int | str, **how: Any) -> list[Candidate]:
    """Open models without reading their weights.

    Args:
        names: paths.
        step: of each that is a run.
        how: as of :func:`onym.generation.opening.find_model`; of several, a tokenizer is that of those whose folder holds none.
    """
    found = []
    for name in names:
        at = step if checkpoints_of(name) is not None or len(names) == 1 else "latest"
        found.append(Candidate(name, find_model(name, step=at, only_missing=len(names) > 1, **how)))
    return found


def all_steps(name: str, note: Note, **how: Any) -> list[Candidate]:
    """The steps of a run that are kept and good, in ascending order.

    Args:
        name: the run, or the folder of its steps.
        note: called with those that are damaged.
        how: as of :func:`onym.generation.opening.find_model`.

    Raises:
        ConfigError: it is no run.
        CheckpointError: no step is good.
    """
    require_path(as_path(name))
    folder = checkpoints_of(name)
    if folder is None:
        raise ConfigError(f"'{name}' has no steps: --all-steps takes a run of onym train, or a folder of checkpoints.")
    found: list[Candidate] = []
    problem = CheckpointError(f"'{name}' has no checkpoints yet.")
    for step in steps(folder):
        path = step_folder(folder, step)
        try:
            open_step(path, files=TO_BUILD)
            found.append(Candidate(name, find_model(path, note=note, **how)))
        except CheckpointError as error:
            problem = error
            note(f"Passed over step {step}: {error}")
    if not found:
        raise problem
    return found


def checkpoints_of(name: str) -> Path | None:
    """The folder of a run's steps; None where the path is something else."""
    path = as_path(name)
    with contextlib.suppress(OnymError, OSError):
        if (path / CHECKPOINTS).is_dir():
            return path / CHECKPOINTS
        if path.is_dir() and steps(path):
            return path
    return None


def read_text(data: Sequence[str], text_field: str, limit: int | None) -> Text:
    """All documents of files and folders.

    Args:
        data: paths, globs or addresses, as of ``onym train --data``.
        text_field: of JSON lines and tables.
        limit: bytes of text to read at most; the last document is cut.

    Raises:
        DataError: there is no text.
    """
    corpus = Corpus(tuple(data), text_field=text_field, cache_dir=DataOptions().cache_dir)
    found = (
        "".join(document.blocks()) if isinstance(document, LongDocument) else document.text for document in corpus.documents()
    )
    return _some(corpus.description, found, limit)


def held_out_text(models: Sequence[Candidate], limit: int | None, display: Display) -> Text:
    """The held-out part of the text that the first run among the models was trained on; without one, of the default corpus.

    Raises:
        DataError: the text is not there any more, or was given as tokens.
    """
    options = {each.name: described for each in models if (described := _options_of(each.name)) is not None}
    name, chosen = next(iter(options.items()), (None, DataOptions()))
    for other, data in options.items():
        if data.sources != chosen.sources or data.held_out != chosen.held_out:
            display.warn(f"'{other}' was trained on other text than '{name}', whose held-out part all are evaluated on.")
    surveys = []
    with display.activity("Text") as activity:
        for source in chosen.sources:
            if is_token_data(source.data):
                raise DataError(f"'{name}' was trained on token files, which hold no text: name a text with --data.")
            corpus, skips = chosen.corpus(source, activity.bytes), chosen.on_bad_file == "skip"
            surveys.append(survey(corpus, chosen.held_out, activity.bytes, skip_bad_files=skips))
        texts = (text for found in surveys for text in found.held_out_texts())
        text = _some(f"the held-out part of {chosen.description}", texts, limit)
        activity.result = f"{len(text.documents):,} documents of {text.description}"
    mine = next((each for each in models if each.name == name), None)
    trained_on = _trained_on(mine.found.checkpoint) if mine is not None else None
    if mine is not None and trained_on is not None:
        keys = [key_of_tokens(each, mine.found.tokenizer) for each in surveys]
        if key_of([(each.name, each.weight, key) for each, key in zip(chosen.sources, keys, strict=True)]) != trained_on:
            display.warn(f"The text has changed since '{name}' was trained, so it may have seen some of what is held out now.")
    return text


def _trained_on(checkpoint: Checkpoint) -> str | None:
    """The key of the tokens that a run was trained on; None where the checkpoint is no whole one of a run."""
    try:
        return TrainState.of(checkpoint).tokens
    except (OnymError, KeyError, TypeError, ValueError):
        return None


def _options_of(name: str) -> DataOptions | None:
    """How a run's text was named; None where it is no run."""
    path = as_path(name)
    for folder in (path, path.parent, path.parent.parent):  # a run, its checkpoints, or one of them
        if isinstance(folder, Path) and (folder / DESCRIPTION).is_file():
            described = RunFolder(folder).description()
            if described is None:
                return None
            options = TrainOptions.from_dict(described["options"])
            return options.data if options.finetune.task is None else None  # rows are no text
    return None


def _some(description: str, found: Iterator[str], limit: int | None) -> Text:
    documents, size = list[str](), 0
    for document in found:
        raw = document.encode()
        if limit is not None and size + len(raw) >= limit:
            if rest := raw[: limit - size].decode(errors="ignore"):
                documents.append(rest)
            break
        documents.append(document)
        size += len(raw)
    if not documents:
        raise DataError(f"There is no text in {description}: name another one with --data.")
    return Text(description, tuple(documents))


def evaluate(
    candidate: Candidate,
    text: Text,
    items: Sequence[Item],
    stride: int | None,
    batch_size: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Evaluation:
    """Score one model.

    Args:
        candidate: read now, and let go of at the end.
        text: for the loss.
        items: of the suite.
        stride: see :mod:`onym.generation.scoring`.
        batch_size: windows that are computed at once.
        device: which computes, in the dtype of the weights.
        progress: called with tokens.
    """
    model, tokenizer, _ = candidate.found.load(device)
    score = Score.total(score_texts(model, tokenizer, text.documents, stride=stride, batch_size=batch_size, progress=progress))
    tasks = measure(model, tokenizer, items, batch_size=batch_size, progress=progress) if items else {}
    context = model.config.context_length
    parameters = sum(each.numel() for each in model.parameters())
    return Evaluation(
        candidate.name, candidate.step, parameters, tokenizer.vocab_size, context, stride_of(context, stride), score, tasks
    )


def to_json(text: Text, items: Sequence[Item], found: Sequence[Evaluation]) -> dict[str, Any]:
    """All of it as JSON values."""
    about: dict[str, Any] = {"description": text.description, "documents": len(text.documents), "bytes": text.bytes}
    suite = {"items": len(items), "fingerprint": fingerprint(items)} if items else None
    return {"text": about, "suite": suite, "models": [each.to_dict() for each in found]}
