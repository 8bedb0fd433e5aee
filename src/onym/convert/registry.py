"""The registry of formats: what the library knows of a model family's files.

A format is a table of (their name, our name, transformation), with how it is recognised and what its settings mean. A family
registers its formats from outside (:func:`register_format`); the library knows none by itself.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from onym.convert.mapping import Recipe, Rule, Shape, View
from onym.convert.sources import Contents
from onym.errors import ConfigError
from onym.format.reader import Checkpoint
from onym.format.tensor_writing import Progress
from onym.format.tensors import TensorFile
from onym.names.families import load_families

Config = Mapping[str, Any]
"""A model's configuration as plain JSON values."""


@dataclass(frozen=True)
class NamedShapes:
    """What has to be recognised: an opened file or folder, its names without wrappers."""

    contents: Contents
    shapes: Mapping[str, Shape]
    """By name, wrappers left out."""

    @property
    def names(self) -> list[str]:
        """Names without wrappers."""
        return list(self.shapes)

    def shape(self, *names: str) -> Shape | None:
        """The shape of the first of these that exists."""
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def has(self, pattern: str) -> bool:
        """Whether a regular expression matches a full name."""
        return any(re.fullmatch(pattern, name) for name in self.shapes)


_SUMMARISED = ("kind", "why", "wrappers", "rules", "unused", "notes", "not_ours", "problem")


@dataclass
class Origin:
    """How a checkpoint of another program was understood."""

    contents: Contents
    clean: TensorFile
    """Its tensors as they are, under names without wrappers."""
    format: Format | None = None
    """None where no registered format matches."""
    why: str = ""
    """By what the format was recognised."""
    wrappers: dict[str, int] = field(default_factory=dict)
    """Segments that wrappers had added to names, and to how many."""
    rules: dict[str, int] = field(default_factory=dict)
    """What was done to tensors: renamed, transposed, joined ..."""
    dropped: list[str] = field(default_factory=list)
    """Tensors that hold nothing learned: masks, counters."""
    unused: list[str] = field(default_factory=list)
    """Tensors that the format has no place for."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, in sentences."""
    assumed: set[str] = field(default_factory=set)
    """Fields of the configuration that were assumed, because neither settings nor shapes say them."""
    not_ours: str | None = None
    """Which part of it the architecture does not have."""
    problem: str | None = None
    """Why it cannot be the model that it seems to be: something is missing or contradicts itself."""
    config: Config | None = None
    """Of a complete model, its configuration."""
    given: Config = field(default_factory=dict)
    """Fields of the configuration that the user gave."""
    completed: bool = False
    """Whether its tensors were made of several checkpoints' and are the architecture's already."""

    @property
    def kind(self) -> str:
        """In words, whose format it is and how it is stored."""
        return f"{self.format.title}, {self.contents.kind}" if self.format else self.contents.kind

    def renamed(self) -> dict[str, str]:
        """Stored names that wrappers had changed -> names without wrappers."""
        recipes = self.clean.recipes if isinstance(self.clean, View) and self.clean is not self.contents.tensors else {}
        return {recipe.sources[0]: name for name, recipe in recipes.items() if recipe.sources != (name,)}

    def summary(self) -> dict[str, Any]:
        """For ``--json`` and reports."""
        return {
            "format": self.format.name if self.format else None,
            "dropped": len(self.dropped),
            "further": self.contents.further,
            "foreign": dict(self.contents.foreign),
            **{name: getattr(self, name) for name in _SUMMARISED},
        }


@dataclass(frozen=True)
class Stated:
    """What a format's own settings say of the model."""

    config: Config = field(default_factory=dict)
    """Fields of our configuration."""
    source: str = ""
    """Where they are stated, as ``config.json``."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our field -> what they call it."""
    not_ours: str | None = None
    """Which part the architecture does not have, where the settings ask for one."""


Understand = Callable[[Origin, TensorFile, Stated, Config], "tuple[TensorFile, Config] | None"]
"""(origin, tensors under clean names, stated settings, settings given by the user) -> our tensors and their configuration.

None after setting ``origin.not_ours``. Raises a CheckpointError where something is missing or contradicts itself."""


@dataclass(frozen=True)
class Writing:
    """A model that is being written in a format."""

    checkpoint: Checkpoint
    path: Path
    """Its destination."""
    tensors: TensorFile
    """Under our names."""
    config: Config
    tokenizer: str | None
    """The text of its ``tokenizer.json``."""
    texts: Mapping[str, str]
    """The texts beside the weights of a source of the same format, which are preserved."""
    beside: Mapping[str, str]
    """The texts beside the weights of any source, where the tokenizer is the source's own; of Onym's own, its chat template."""
    dtype: str | None
    """Of the values, where the user names one of the target's ``dtypes``."""
    notes: list[str]
    """Sentences for the report."""
    used: set[str]
    """Further entries of the source that the result holds."""


class FileJob(Protocol):
    """A file that an adapter writes itself, completely or not at all, and compares with its source."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """Write it, durably."""

    def compare(self, path: Path) -> str:
        """Read it back; returns how it compares, in words that follow "26 tensors read back, ". CheckpointError where it
        differs by more than its dtype explains."""


@dataclass(frozen=True)
class Target:
    """How a format is written. Everything has a default that does nothing."""

    container: Literal["pth", "folder", "file"] = "pth"
    """A file of ``torch.save``, a folder of .safetensors files, or a file that the adapter writes."""
    ending: str = ""
    """How the name of such a file ends, ``.gguf``; a destination that ends so is written in this format."""
    dtypes: tuple[str, ...] = ()
    """What ``--dtype`` may be; none where values stay as they are."""
    file: Callable[[Writing, TensorFile], FileJob] | None = None
    """Such a file, from what is written and the tensors under its names; says in ``used`` and ``notes`` what it does."""
    settings: tuple[str, ...] = ()
    """Fields of the configuration that its files cannot state: they have to be given again when one is opened."""
    refuses: Callable[[Config], str | None] = lambda config: None
    """Why it cannot hold a model of this configuration at all, in words that follow "it cannot hold this model: "."""
    lacks: Callable[[Config], dict[str, str]] = lambda config: {}
    """What it cannot hold of a model: a word for ``--drop``, and a sentence."""
    without: Callable[[TensorFile, Config, Collection[str]], tuple[TensorFile, Config]] | None = None
    """The model without what these words name; required where ``lacks`` returns any."""
    rewritten: Callable[[TensorFile, Config], tuple[TensorFile, Config]] = lambda tensors, config: (tensors, config)
    """A model that computes the same, of tensors that it can hold, as one whose bias is part of another."""
    added: Callable[[Config, str], dict[str, Recipe]] = lambda config, dtype: {}
    """Tensors that it has and our model has not, as biases of zeros, from the configuration and the weights' dtype."""
    omitted: Callable[[Config], tuple[str, ...]] = lambda config: ()
    """Its tensors that are not stored, as a tied head."""
    pickle: Callable[[Writing, OrderedDict[str, Tensor]], Any] = lambda writing, weights: weights
    """What its file of ``torch.save`` holds, from the weights under its names."""
    texts: Callable[[Writing], dict[str, str]] = lambda writing: {}
    """The files beside the weights, by name: in the folder, or next to the file."""
    note: Callable[[Config], str | None] = lambda config: None
    """A sentence that the user should know."""


@dataclass(frozen=True)
class Format:
    """One program's layout of a model: its names, and how they become those of an architecture that is registered here.

    ``name``, ``title``, ``recognise``, ``architecture``, ``rules`` and ``config`` suffice for most.
    """

    name: str
    """For ``--to`` and reports."""
    title: str
    """In a sentence: "nanoGPT's GPT"."""
    recognise: Callable[[NamedShapes], str | None]
    """By what it is recognised, in words; None where it is another one."""
    architecture: str | None = None
    """The name given to :func:`onym.register_architecture`; None for models that are recognised and never built here."""
    program: str = ""
    """A word for ``--to`` that several formats of a program share: the one that holds the model is taken."""
    rules: tuple[Rule, ...] = ()
    """The table, read in both directions."""
    config: Callable[[NamedShapes], Config] = lambda named: {}
    """The configuration that the shapes and settings imply."""
    stated: Callable[[NamedShapes], Stated] = lambda named: Stated()
    """What the format's settings say."""
    understand: Understand | None = None
    """In place of the general way (rules, then ``config``), for a format whose files need more."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that hold nothing learned: masks."""
    prefix: str = ""
    """A segment that all its names may have or lack."""
    not_ours: str | None = None
    """Which part of it the architecture does not have, where the layout alone proves that."""
    hidden: tuple[str, ...] = ()
    """Fields of the configuration that change the computation and show in no shape: they are compared before loading."""
    live: Callable[[nn.Module], Config | None] = lambda model: None
    """What a live model in this layout, of a class that is not registered, states of these fields."""
    extra: Callable[[str, Shape, str], Recipe | None] = lambda name, shape, dtype: None
    """A tensor of a live model in this layout that our model has not, made from its name, shape and dtype."""
    target: Target | None = None
    """How it is written; None for a format that is only read."""

    def __repr__(self) -> str:
        return f"<format {self.name}>"


@dataclass(frozen=True)
class Family:
    """What the library may ask of an architecture beyond its formats."""

    architecture: str
    outputs: Callable[[TensorFile, Config], Tensor] | None = None
    """The model's outputs for some fixed input, to compare before and after a conversion."""
    peft: Callable[[Config], Format | None] | None = None
    """The format whose names a model of this configuration has in transformers, and its adapters in peft's files."""
    crop_vocabulary: Callable[[TensorFile, Config, int], tuple[TensorFile, Config]] | None = None
    """The model with fewer rows in its vocabulary."""


Completion = Callable[[Checkpoint], "Checkpoint | None"]
"""A checkpoint that is no model by itself (adapters alone) -> the model; None of any other."""

_COMPLETIONS: list[Completion] = []
_FORMATS: dict[str, Format] = {}
_FAMILIES: dict[str, Family] = {}
RESERVED = ("safetensors", "pth", "onym")
"""Names that ``--to`` knows besides formats."""


def register_format(known: Format) -> None:
    """Let :func:`onym.load`, :func:`onym.load_model` and ``onym convert`` read and write another layout of a model family.

    Registering a name again replaces that format, so that a notebook cell can be run twice.

    Raises:
        ConfigError: the name is taken by Onym itself, or the format has rules and no architecture.

    >>> from onym.convert.mapping import same
    >>> register_format(Format("old-line", "the old Line", lambda named: "w and b" if named.names == ["w", "b"] else None,
    ...     architecture="line", rules=(same("w", "line.weight"), same("b", "line.bias")),
    ...     config=lambda named: {"width": named.shapes["w"][1]}))
    """
    if known.name in RESERVED:
        raise ConfigError(f"A format cannot be called {known.name!r}, which onym convert --to has already: take another name.")
    if known.rules and known.architecture is None:
        raise ConfigError(f"The format {known.name!r} has rules: say which architecture they lead to.")
    _FORMATS[known.name] = known


def register_family(family: Family) -> None:
    """Let conversions of an architecture compare outputs and crop vocabularies."""
    _FAMILIES[family.architecture] = family


def register_completion(complete: Completion) -> None:
    """Let everything that opens a model open a checkpoint that needs another one beside it."""
    _COMPLETIONS.append(complete)


def completed(checkpoint: Checkpoint) -> Checkpoint:
    """The model that a checkpoint is a part of; itself where it is one already."""
    load_families()
    return next((whole for each in _COMPLETIONS if (whole := each(checkpoint)) is not None), checkpoint)


def formats() -> list[Format]:
    """All formats, in the order in which they are tried: the newest registration last."""
    load_families()
    return list(_FORMATS.values())


def family_of(architecture: str | None) -> Family | None:
    """What is registered for an architecture."""
    load_families()
    return _FAMILIES.get(architecture or "")


def targets() -> list[str]:
    """What can be written: registered formats, the tensors as they are in one of two files, and Onym's own folder."""
    named = [word for known in formats() if known.target is not None for word in (known.program or known.name, known.name)]
    return [*dict.fromkeys(named), *RESERVED]
