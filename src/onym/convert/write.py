"""One checkpoint into another format, tensor by tensor, and then read back and compared.

Nothing is replaced, and what cannot be shown to be equal is removed again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onym.checkpoint.steps import GoodCheckpoint
from onym.convert.lazy import compare, lazily, mapped_on_disk, sharded
from onym.convert.mapping import Recipe, View, counts, nbytes
from onym.convert.opening import cropped, open_any
from onym.convert.registry import Config, FileJob, Target, Writing, family_of
from onym.convert.sources import TEMPLATE_TEXTS, as_json, template_texts
from onym.convert.targets import choose_target, container_of, format_named, of_one_program, require_architecture, require_used
from onym.convert.translation import their_recipes
from onym.errors import CheckpointError, ConfigError, StorageError
from onym.format.manifest import CONFIG, MODEL, TOKENIZER
from onym.format.pth import write_pickle
from onym.format.reader import Checkpoint
from onym.format.safetensors import dtype_called
from onym.format.tensor_writing import Progress
from onym.format.tensors import TensorFile
from onym.format.writer import About, write_files, write_folder, write_safetensors
from onym.storage.paths import as_path, is_local, storage_of

_FAR = 1e-5  # of outputs, that a conversion may differ by


@dataclass(frozen=True)
class _How:
    """What a conversion was asked for besides its ends."""

    shard_bytes: int | None = None
    progress: Progress | None = None
    drop: frozenset[str] = frozenset()
    keeps_texts: bool = True
    """Whether the texts of a source in the same format are preserved."""
    dtype: str | None = None


@dataclass
class Report:
    """What a conversion found and did."""

    source: str
    destination: str
    to: str
    why_to: str
    """Why that, where nobody said."""
    found: dict[str, Any] | None = None
    """How the source was understood; None where it is Onym's own."""
    rules: dict[str, int] = field(default_factory=dict)
    """What was done, of so many tensors."""
    dropped: list[str] = field(default_factory=list)
    """What the target does not have, in words."""
    unused: list[str] = field(default_factory=list)
    """What was in the source besides, and is not in the result."""
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    compared: int = 0
    """Tensors that were read back from the result and are bitwise identical to the source's, or as ``rounded`` says."""
    rounded: str | None = None
    """How these compare, where the target rounds."""
    logits: float | None = None
    """The largest difference between the logits of both, where they are GPTs."""


def convert(
    source: str | Path | Checkpoint,
    destination: str | Path,
    *,
    to: str | None = None,
    part: str | None = None,
    settings: Config | None = None,
    vocab_size: int | None = None,
    shard_bytes: int | None = None,
    tokenizer: str | None = None,
    drop: Collection[str] = (),
    dtype: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    step: int | str = "latest",
) -> Report:
    """Write a checkpoint in another layout, read it back, and compare.

    Args:
        source: anything that :func:`onym.load` takes, or a checkpoint that is open already.
        destination: a file or folder that is not there yet.
        to: one of :func:`onym.convert.registry.targets`; by default as the destination ends.
        part, settings, step: see :func:`onym.convert.opening.open_any`.
        vocab_size: drop the rows of the vocabulary from here on, which padded it.
        shard_bytes: several .safetensors files of at most this size, with an index (``huggingface`` and ``safetensors``).
        tokenizer: the text of a ``tokenizer.json`` to write beside the weights, where the source has none.
        drop: what the target cannot hold and may be dropped, by the words of the refusal.
        dtype: of the values, for a target that rounds (``gguf``); by default the source's.
        dry_run: find out all that can be, and write nothing.
        progress: called with the bytes written since the last call.

    Raises:
        CheckpointError: the source cannot be read, or the target cannot hold it.
        ConfigError: the options do not fit together.
        StorageError: something is at the destination already, or the disk refused.
    """
    path = as_path(destination)
    if not is_local(path):
        raise ConfigError(f"'{destination}' is remote: convert to this machine, and copy the result.")
    found = GoodCheckpoint(source) if isinstance(source, Checkpoint) else open_any(source, step, part=part, settings=settings)
    checkpoint = found.checkpoint
    target, why = choose_target(to, path, checkpoint)
    said = str(source.path if isinstance(source, Checkpoint) else source)
    report = Report(said, str(path), target, why, checkpoint.origin.summary() if checkpoint.origin else None)
    if path.exists() or path.is_symlink():
        raise StorageError(f"There is something at '{path}' already: give another name, or remove it.")
    for number, (skipped, reason) in enumerate(found.skipped):
        report.notes.insert(number, f"Passed over '{skipped}': {reason}")
    require_used(target, path, shard_bytes, tokenizer, dtype)
    how = _How(shard_bytes, progress, frozenset(drop), keeps_texts=tokenizer is None, dtype=dtype)
    report.unused = _unused(checkpoint, target, path)
    if target in ("safetensors", "pth"):
        if drop or vocab_size is not None:
            raise ConfigError(
                f"{target} writes every tensor as it is: leave --drop and --vocab-size out, or choose a format (--to)."
            )
        job: _Plain | _Translated = _Plain(checkpoint, path, report, how)
    else:
        require_architecture(checkpoint, target)
        if vocab_size is not None:
            rows = checkpoint.config["vocab_size"] if checkpoint.config is not None else 0
            checkpoint = cropped(checkpoint, vocab_size)
            report.dropped += [f"{rows - vocab_size} rows of the vocabulary"] if rows > vocab_size else []
        if tokenizer is not None:
            checkpoint._texts[TOKENIZER] = tokenizer
        job = _Translated(checkpoint, path, report, how)
    job.prepare()
    if not dry_run:
        job.write()
        try:
            job.compare()
            job.finish()
        except BaseException:  # what was written is not known to be what was meant, and nobody else has it yet
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
    return report


def _unused(checkpoint: Checkpoint, target: str, path: Path) -> list[str]:
    """What a source has besides what the result will have."""
    plain = target in ("safetensors", "pth")
    used = {MODEL}
    if not plain or (target == "safetensors" and path.suffix and checkpoint.origin is None):
        used.add(CONFIG)
    folder = not plain and container_of(target) == "folder"
    if folder and path.suffix != ".safetensors":
        used |= {TOKENIZER, "vocab.json", "merges.txt", *TEMPLATE_TEXTS}
    if checkpoint.manifest is not None:
        return [file for file in checkpoint.holds if file not in used]
    if checkpoint.origin is None:
        return []
    contents = checkpoint.origin.contents
    if folder and of_one_program(checkpoint.origin.format, format_named(target, checkpoint)):
        used |= contents.texts.keys()
    texts = [name for name in contents.texts if name not in used] if contents.path.is_dir() else []
    values = [key for key in contents.values if key not in contents.further]
    return [*contents.further, *values, *checkpoint.origin.unused, *texts]


class _Plain:
    """The tensors as they are, under clean names."""

    def __init__(self, checkpoint: Checkpoint, path: Path, report: Report, how: _How) -> None:
        self.path, self.report, self.how = path, report, how
        origin = checkpoint.origin
        self.tensors: TensorFile = origin.clean if origin is not None else checkpoint.model
        report.unused = [name for name in report.unused if origin is None or name not in origin.unused]
        self.stored = origin.contents.tensors if origin is not None else checkpoint.model
        self.architecture = checkpoint.architecture if origin is None else None
        self.config = checkpoint.config if origin is None else None
        if any(kind == "value" for kind in self.tensors.dtypes.values()):
            values = [name for name, kind in self.tensors.dtypes.items() if kind == "value"]
            report.dropped += [f"{name} (no tensor)" for name in values]
            kept = {name: Recipe((name,)) for name in self.tensors.names if name not in set(values)}
            self.tensors = View(self.tensors, kept)
        if origin is not None:
            if origin.wrappers:
                report.rules = {"renamed": sum(clean not in self.stored.names for clean in self.tensors.names)}
            report.dropped += [name for name in origin.dropped if name in self.stored.names and name not in self.tensors.names]

    def prepare(self) -> None:
        """Count, and check every byte of the source that can be, and that there is nothing which no file can hold."""
        for name, kind in self.tensors.dtypes.items():
            if name in self.tensors.shapes and dtype_called(kind) is None:
                raise CheckpointError(f"'{name}' is of {kind}, which is not written here: take its dequantize() first.")
        _count(self.report, self.tensors)
        self.stored.require_verified(self.stored.shapes)

    def write(self) -> None:
        """The file or folder."""
        if self.report.to == "pth":
            with mapped_on_disk(self.tensors, self.path, self.how.progress) as values:
                write_pickle(self.path, values, self.report.bytes)
        elif self.how.shard_bytes is not None or not self.path.suffix:
            files, texts = sharded(self.tensors, self.how.shard_bytes)
            write_files(self.path, files, texts, self.how.progress)
        else:
            write_safetensors(self.path, lazily(self.tensors), self.architecture, self.config, self.how.progress)

    def compare(self) -> None:
        """Read back what was written."""
        result = open_any(self.path).checkpoint
        written = result.origin.contents.tensors if result.origin is not None else result.model
        self.report.compared = compare(self.tensors, written, self.path)

    def finish(self) -> None:
        """Nothing is beside it."""


class _Translated:
    """A model of a known architecture, in one of its formats or in Onym's own."""

    def __init__(self, checkpoint: Checkpoint, path: Path, report: Report, how: _How) -> None:
        assert checkpoint.config is not None
        self.checkpoint, self.path, self.report, self.how = checkpoint, path, report, how
        self.config: Config = checkpoint.config
        self.tensors: TensorFile = checkpoint.model
        self.format = format_named(report.to, checkpoint)
        self.target = (self.format.target if self.format is not None else None) or Target()
        self.family = family_of(checkpoint.architecture)
        if (note := self.target.note(self.config)) is not None:
            report.notes.append(note)
        if checkpoint.origin is not None:
            report.notes += checkpoint.origin.notes
            report.dropped += [f"{name} (nothing learned)" for name in checkpoint.origin.dropped]
        self._drop()
        self.original = self.tensors, self.config
        self.tensors, self.config = self.target.rewritten(*self.original)
        self.theirs = self._their_tensors()
        self.file: FileJob | None = None
        self.beside: dict[Path, str] = {}

    def _drop(self) -> None:
        """Refuse what the target cannot hold, unless it is named to be dropped."""
        lacks = self.target.lacks(self.config)
        if unknown := sorted(self.how.drop - lacks.keys()):
            known = f"it could drop {', '.join(lacks)}" if lacks else "nothing has to be dropped"
            raise ConfigError(f"--drop {unknown[0]} names nothing that {self.report.to} cannot hold of this model: {known}.")
        for word, reason in lacks.items():
            if word not in self.how.drop:
                raise CheckpointError(
                    f"'{self.checkpoint.path}' cannot be written as {self.report.to} as it is: {reason}. To do without that, "
                    f"which makes it another model, give --drop {word}."
                )
            self.report.dropped.append(reason)
        if lacks:
            assert self.target.without is not None
            before = self.tensors, self.config
            self.tensors, self.config = self.target.without(self.tensors, self.config, lacks.keys())
            apart = self._outputs_apart(before, (self.tensors, self.config))
            by = f": its logits are up to {apart:.2g} from the source's" if apart is not None else ""
            self.report.notes.append(
                f"It is another model without {' and '.join(lacks)}{by}. What was written is compared with that other model."
            )

    def _their_tensors(self) -> TensorFile:
        """The tensors in the target's format."""
        if self.format is None:
            if self.checkpoint.origin is not None:
                self.report.rules = self.checkpoint.origin.rules
            return self.tensors
        recipes = their_recipes(self.tensors, self.format)
        recipes |= self.target.added(self.config, next(iter(self.tensors.dtypes.values())))
        for name in self.target.omitted(self.config):
            del recipes[name]
        self.report.rules = counts(_from_stored(recipes, self.tensors))
        return View(self.tensors, recipes)

    def prepare(self) -> None:
        """Count, and check every byte of the source that can be."""
        _count(self.report, self.theirs)
        if self.target.file is not None:
            self._prepare_file(self.target.file)
        self.tensors.require_verified(self.tensors.shapes)

    def _prepare_file(self, make: Callable[[Writing, TensorFile], FileJob]) -> None:
        """Make the file that the adapter writes, up to its first byte."""
        writing = self._writing()
        self.file = make(writing, self.theirs)
        self.report.bytes = self.file.nbytes
        self.report.unused = [name for name in self.report.unused if name not in writing.used]
        self.beside = {self.path.with_name(name): text for name, text in self.target.texts(writing).items()}
        for path in self.beside:
            if path.exists() or path.is_symlink():
                raise StorageError(
                    f"There is something at '{path}' already, which belongs beside '{self.path.name}': remove it."
                )

    def write(self) -> None:
        """The file or folder."""
        if self.format is None:
            self._write_ours()
            return
        if self.file is not None:
            self.file.write(self.path, self.how.progress)
            return
        writing = self._writing()
        if self.target.container == "folder":
            files, index = sharded(self.theirs, self.how.shard_bytes)
            write_files(self.path, files, {**index, **self.target.texts(writing)}, self.how.progress)
        else:
            with mapped_on_disk(self.theirs, self.path, self.how.progress) as weights:
                content = self.target.pickle(writing, weights)
                write_pickle(self.path, content, self.report.bytes * (1 if content is weights else 3))
        self.report.unused = [name for name in self.report.unused if name not in writing.used]

    def _write_ours(self) -> None:
        architecture, config = self.checkpoint.architecture, dict(self.config)
        if self.path.suffix == ".safetensors":
            write_safetensors(self.path, lazily(self.theirs), architecture, config, self.how.progress)
            return
        text = self.checkpoint.text(TOKENIZER)
        kept = template_texts(self.checkpoint) if self.how.keeps_texts else {}
        texts = {CONFIG: as_json(config), **kept} | ({TOKENIZER: text} if text is not None else {})
        write_folder(self.path, {MODEL: lazily(self.theirs)}, texts, About(architecture), self.how.progress)

    def _writing(self) -> Writing:
        origin = self.checkpoint.origin
        same = origin is not None and of_one_program(origin.format, self.format) and self.how.keeps_texts
        own = template_texts(self.checkpoint)  # of adapters merged into a base, theirs
        kept = own if origin is None else {**origin.contents.texts, **own}
        return Writing(
            checkpoint=self.checkpoint,
            path=self.path,
            tensors=self.tensors,
            config=self.config,
            tokenizer=self.checkpoint.text(TOKENIZER),
            texts=kept if same else {},
            beside=kept if self.how.keeps_texts else {},
            dtype=self.how.dtype,
            notes=self.report.notes,
            used=set(),
        )

    def compare(self) -> None:
        """Read back what was written, through the table in the other direction."""
        if self.file is not None:
            self.report.rounded = self.file.compare(self.path)
            self.report.compared = len(self.theirs.names)
            return
        again = open_any(self.path, settings={name: self.config.get(name) for name in self.target.settings}).checkpoint
        assert again.config is not None
        self.report.compared = compare(self.tensors, again.model, self.path)
        self.report.logits = self._outputs_apart(self.original, (again.model, again.config))
        if self.report.logits is not None and self.report.logits > _FAR:
            raise CheckpointError(
                f"'{self.path}' was written and removed again: its logits differ from the source's by {self.report.logits:.2g}"
            )

    def finish(self) -> None:
        """The small files next to a file, once it is known to be right."""
        for path, text in self.beside.items():
            with storage_of(path).new_file(path, len(text)) as file:
                file.write(text.encode())

    def _outputs_apart(self, one: tuple[TensorFile, Config], other: tuple[TensorFile, Config]) -> float | None:
        """The largest difference of two models' outputs for the same input, where the family computes them."""
        if self.family is None or self.family.outputs is None:
            return None
        return float((self.family.outputs(*one) - self.family.outputs(*other)).abs().max())


def _from_stored(recipes: Mapping[str, Recipe], ours: TensorFile) -> dict[str, Recipe]:
    """Recipes from our names, as recipes from the names that the source has, for counting: what was undone is not counted."""
    before = ours.recipes if isinstance(ours, View) else {}
    result = {}
    for name, recipe in recipes.items():
        inner = [before[each] for each in recipe.sources if each in before]
        sources = tuple(source for each in inner for source in each.sources) if inner else recipe.sources
        change = recipe.change if recipe.change.said or not inner else inner[0].change
        if inner and recipe.change.said == inner[0].change.said == "transposed":
            change = Recipe().change
        result[name] = Recipe(sources, change, recipe.dtype)
    return result


def _count(report: Report, tensors: TensorFile) -> None:
    report.tensors, report.bytes = len(tensors.shapes), nbytes(tensors)
