"""Any checkpoint, Onym's or another program's -> named tensors, and where the architecture is ours, a configuration.

Whose layout it is, is told from names and shapes. What was understood, and by which rules, is kept as an :class:`Origin`, so
that it can be told. Everything stays lazy: opening reads headers alone.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onym.checkpoint.retention import CHECKPOINTS, GoodCheckpoint, find_checkpoint, steps
from onym.convert.clean_names import clean_names
from onym.convert.mapping import Recipe, View, counts, first_rows, to_ours
from onym.convert.registry import Format, NamedShapes, Stated
from onym.convert.sources import Contents, open_contents
from onym.errors import CheckpointError, ConfigError, OnymError
from onym.format.manifest import CONFIG, MANIFEST, TOKENIZER
from onym.format.reader import Checkpoint, require_path
from onym.format.tensors import TensorFile
from onym.gpt.config import GPTConfig
from onym.gpt.formats.book import BOOK
from onym.gpt.formats.book_fast import BOOK_FAST
from onym.gpt.formats.huggingface import HUGGINGFACE, OURS
from onym.gpt.formats.litgpt import LITGPT
from onym.gpt.formats.llama import LLAMA
from onym.gpt.formats.nanochat import NANOCHAT
from onym.gpt.formats.nanogpt import NANOGPT
from onym.gpt.gpt2 import GPT
from onym.names.wrappers import AVERAGE_COUNTER
from onym.storage import object_store

FORMATS: tuple[Format, ...] = (BOOK, BOOK_FAST, NANOGPT, HUGGINGFACE, LITGPT, NANOCHAT, LLAMA)
"""All layouts that are known, in the order in which they are tried."""

ARCHITECTURE = "gpt"
HEAD_SIZE = 64
"""Of every GPT-2 that OpenAI and the book have."""
_OTHER_HEADS = ("score.", "classifier.", "qa_outputs.")  # of transformers' GPT2For…Classification and …QuestionAnswering
_EMBEDDING, _POSITIONS, _HEAD = "tok_emb.weight", "pos_emb.weight", "out_head.weight"


@dataclass
class Origin:
    """How somebody else's checkpoint was understood."""

    contents: Contents
    clean: TensorFile
    """Its tensors, as they are, under names without wrappers."""
    format: Format | None = None
    """Whose layout; None where it is none that is known."""
    why: str = ""
    """By what it is known."""
    wrappers: dict[str, int] = field(default_factory=dict)
    """Segments that wrappers had put into names, and into how many."""
    rules: dict[str, int] = field(default_factory=dict)
    """What was done to tensors to make them ours: renamed, transposed, joined …"""
    dropped: list[str] = field(default_factory=list)
    """Tensors without anything learned: masks, counters."""
    unused: list[str] = field(default_factory=list)
    """Tensors that the layout has no place for."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, in sentences."""
    not_ours: str | None = None
    """Which part of another architecture our GPT has not."""
    problem: str | None = None
    """Why it cannot be taken for the GPT that it seems to be: something is missing, or does not fit together."""
    shape: GPTConfig | None = None
    """Of a GPT that is whole, its configuration; the number of heads may not be known."""

    @property
    def kind(self) -> str:
        """In words, whose it is and how it is kept."""
        return f"{self.format.title}, {self.contents.kind}" if self.format else self.contents.kind

    def renamed(self) -> dict[str, str]:
        """Stored names that wrappers had changed -> names without wrappers."""
        recipes = self.clean.recipes if isinstance(self.clean, View) and self.clean is not self.contents.tensors else {}
        return {recipe.sources[0]: name for name, recipe in recipes.items() if recipe.sources != (name,)}

    def told(self) -> dict[str, Any]:
        """For ``--json`` and reports."""
        return {
            "format": self.format.name if self.format else None,
            "kind": self.kind,
            "why": self.why,
            "wrappers": self.wrappers,
            "rules": self.rules,
            "dropped": len(self.dropped),
            "unused": self.unused,
            "further": self.contents.further,
            "notes": self.notes,
            "not_ours": self.not_ours,
            "problem": self.problem,
        }


def open_any(
    path: str | Path,
    step: int | str = "latest",
    *,
    verify: bool = True,
    part: str | None = None,
    n_heads: int | None = None,
) -> GoodCheckpoint:
    """Open a run, checkpoint, folder or file of Onym's, or of any program that is known.

    Args:
        path: any of these.
        step, verify: of a run; see :func:`onym.checkpoint.retention.find_checkpoint`.
        part: of a file with several models, which.
        n_heads: attention heads, where the file does not say; otherwise as many as give heads of size 64.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    path = object_store.as_path(path)
    require_path(path)
    if is_ours(path) or not path.exists():
        found = find_checkpoint(path, step, verify=verify)
        checkpoint = found.checkpoint
        if checkpoint.architecture is not None or object_store.is_remote(path):
            _require_unsaid(checkpoint, part, n_heads)
            return found
        contents = Contents(path, "a file that Onym wrote", checkpoint.model)
        understood = _understood(contents, n_heads)
        if understood.origin.format is None:
            return found
        understood.provenance = checkpoint.provenance
        return GoodCheckpoint(understood, found.skipped)
    if step != "latest":
        raise CheckpointError(f"'{path}' is no run, so there is no step {step} to choose in it.")
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"'{path}' is neither a file nor a folder.")
    return GoodCheckpoint(_understood(open_contents(path, part), n_heads), [])


def _require_unsaid(checkpoint: Checkpoint, part: str | None, n_heads: int | None) -> None:
    """Refuse what a checkpoint of Onym's says itself."""
    if part is not None:
        raise ConfigError(f"'{checkpoint.path}' is Onym's own and holds one model: leave part {part!r} out.")
    heads = (checkpoint.config or {}).get("n_heads", n_heads)
    if n_heads is not None and heads != n_heads:
        raise ConfigError(f"'{checkpoint.path}' says {heads} heads, and {n_heads} were given: leave them out.")


def is_ours(path: Path) -> bool:
    """Whether Onym wrote it; what is in an object store, it did."""
    if object_store.is_remote(path):
        return True
    if path.is_dir():
        return (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir() or bool(steps(path))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] != b"{":
            return False
        length = int.from_bytes(start[:8], "little")
        return b'"onym":' in b"{" + file.read(min(length, 64 << 20))


def _understood(contents: Contents, n_heads: int | None) -> Checkpoint:
    origin = Origin(contents, contents.tensors)
    tensors, found = _recognised(origin)
    origin.clean = tensors
    checkpoint = Checkpoint(contents.path, model=tensors, texts=_own_texts(contents))
    checkpoint.origin = origin
    if origin.format is None or found is None:
        return checkpoint
    stated = origin.format.stated(found)
    origin.not_ours = origin.format.not_ours or stated.not_ours
    if origin.not_ours is not None:
        return checkpoint
    try:
        ours, config = _as_ours(origin, tensors, stated, n_heads)
    except OnymError as error:  # its tensors can still be had, one by one
        if n_heads is not None and isinstance(error, ConfigError):
            raise
        origin.problem = str(error)
        return checkpoint
    if ours is None or config is None:
        return checkpoint
    checkpoint = Checkpoint(contents.path, model=ours, texts=_own_texts(contents))
    checkpoint.origin, origin.shape = origin, config
    if origin.problem is None:
        checkpoint.architecture, checkpoint.config = ARCHITECTURE, config.to_dict()
    return checkpoint


def _recognised(origin: Origin) -> tuple[TensorFile, NamedShapes | None]:
    """The tensors without what wrappers put into their names, and whose they are."""
    contents = origin.contents
    stored = contents.tensors
    names = [name for name in stored.names if name != AVERAGE_COUNTER and not name.endswith(f".{AVERAGE_COUNTER}")]
    counters = [name for name in stored.names if name not in set(names)]
    best: tuple[int, Format, str, dict[str, int], dict[str, str]] | None = None
    for thorough in (False, True):
        try:
            cleaned, wrappers = clean_names(names, thorough=thorough)
        except CheckpointError:
            if not thorough:
                raise
            break
        for format in FORMATS:
            fitted = _with_prefix(cleaned, format.prefix)
            found = _found(stored, contents, fitted)
            if (why := format.recognise(found)) is not None:
                unknown = len(to_ours(format.rules, found.names)[1]) if format.rules else 0
                if best is None or unknown < best[0]:
                    best = unknown, format, why, wrappers, fitted
                break
    origin.dropped = counters
    if best is None:
        cleaned, origin.wrappers = clean_names(names)
        return _renamed(stored, cleaned), None
    _, origin.format, origin.why, origin.wrappers, fitted = best
    return _renamed(stored, fitted), _found(stored, contents, fitted)


def _found(stored: TensorFile, contents: Contents, names: Mapping[str, str]) -> NamedShapes:
    return NamedShapes(contents, {clean: _shape(stored, name) for name, clean in names.items()})


def _with_prefix(cleaned: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Names with a segment before them that some programs write and others do not. The head stands outside."""
    if not prefix or any(clean.startswith(f"{prefix}.") for clean in cleaned.values()):
        return dict(cleaned)
    return {name: clean if clean.startswith("lm_head.") else f"{prefix}.{clean}" for name, clean in cleaned.items()}


def _renamed(stored: TensorFile, names: Mapping[str, str]) -> TensorFile:
    if all(name == clean for name, clean in names.items()) and len(names) == len(stored.names):
        return stored
    view = View(stored, {clean: Recipe((name,)) for name, clean in names.items()})
    if stored.versions is not None:
        modules = {name.rpartition(".")[0]: clean.rpartition(".")[0] for name, clean in names.items()}
        view.versions = {modules[path]: version for path, version in stored.versions.items() if path in modules}
    return view


def _shape(file: TensorFile, name: str) -> tuple[int, ...]:
    return file.shapes[file.aliases.get(name, name)]


def _as_ours(
    origin: Origin, tensors: TensorFile, stated: Stated, n_heads: int | None
) -> tuple[TensorFile | None, GPTConfig | None]:
    format = origin.format
    assert format is not None
    recipes, left = to_ours(format.rules, tensors.names)
    ignored = [name for name in left if any(re.fullmatch(pattern, name) for pattern in format.ignored)]
    origin.dropped += ignored
    origin.unused = [name for name in left if name not in set(ignored)]
    view = View(tensors, recipes)
    if (reason := _other_head(view, origin)) is not None:
        origin.not_ours = reason
        return None, None
    if lora := [name for name in origin.unused if ".lora" in name]:
        origin.not_ours = f"it has LoRA's matrices ({lora[0]}), which have to be merged into the others first"
        return None, None
    config = _configured(origin, view, stated, n_heads)
    view, recipes = _head_as_it_is(origin, tensors, view, recipes, config, stated)
    config = GPTConfig.from_dict({**config.to_dict(), "tie_embeddings": _HEAD in view.aliases})
    view, config = _as_written_by_us(origin, tensors, view, recipes, config)
    _require_whole(origin, view, config)
    if counts(recipes).keys() - {"renamed"} or any(recipe.sources != (name,) for name, recipe in recipes.items()):
        origin.rules = counts(recipes)
    return view, config


def _other_head(view: View, origin: Origin) -> str | None:
    if _EMBEDDING not in view.shapes:
        return None
    if _HEAD not in view.names:
        others = [name for name in origin.unused if name.startswith(_OTHER_HEADS)]
        return f"it has {others[0]} in the place of a head: it classifies" if others else None
    head = _shape(view, _HEAD)
    vocabulary = view.shapes[_EMBEDDING][0]
    has_bias = "out_head.bias" in origin.unused
    if head[0] != vocabulary or has_bias:
        return f"its head has {head[0]} rows{' and a bias' if has_bias else ''} for a vocabulary of {vocabulary}: it classifies"
    return None


def _configured(origin: Origin, view: View, stated: Stated, n_heads: int | None) -> GPTConfig:
    """The configuration, from what shapes and settings say; they have to agree."""
    path = origin.contents.path
    for name in (_EMBEDDING, _POSITIONS):
        if name not in view.shapes or len(view.shapes[name]) != 2:
            raise CheckpointError(f"'{path}' is incomplete: it has no {_their_name(origin, name)}.")
    layers = {int(found.group(1)) for name in view.names if (found := re.match(r"trf_blocks\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        absent = sorted(set(range(max(layers) + 1)) - layers)
        raise CheckpointError(f"'{path}' is incomplete: of its {max(layers) + 1} layers, {_few(absent)} missing.")
    vocabulary, width = view.shapes[_EMBEDDING]
    shaped: dict[str, Any] = {
        "vocab_size": vocabulary,
        "context_length": view.shapes[_POSITIONS][0],
        "emb_dim": width,
        "n_layers": len(layers),
        "qkv_bias": "trf_blocks.0.att.qkv.bias" in view.names,
        "bias": "trf_blocks.0.att.proj.bias" in view.names,
    }
    for key, value in shaped.items():
        if key in stated.config and stated.config[key] != value and key in stated.names:
            raise CheckpointError(
                f"'{path}' does not fit together: {stated.source} says {stated.names[key]}={stated.config[key]}, and the "
                f"tensors have {value}. Take the settings that belong to the weights."
            )
    config = {**{key: value for key, value in stated.config.items() if key != "tie_embeddings"}, **shaped}
    if n_heads is not None:
        if config.setdefault("n_heads", n_heads) != n_heads:
            raise ConfigError(f"{stated.source} says {config['n_heads']} heads, and {n_heads} were given: leave them out.")
    elif "n_heads" not in config:
        config["n_heads"] = max(1, width // HEAD_SIZE)
        if width % HEAD_SIZE:
            config["n_heads"] = 1
            origin.problem = (
                f"'{path}' does not say how many attention heads its model has, and its width of {width} is no multiple of "
                f"{HEAD_SIZE}: say it (n_heads= or --n-heads)."
            )
        else:
            origin.notes.append(
                f"{config['n_heads']} attention heads were assumed, of size {HEAD_SIZE}, as GPT-2 has: the file does not say. "
                "If it was another number, give it (n_heads= or --n-heads)."
            )
    try:
        return GPTConfig.from_dict({key: value for key, value in config.items() if value is not None})
    except ConfigError as error:
        if n_heads is not None:
            raise
        raise CheckpointError(f"The settings in '{path}' cannot be a GPT's: {error}") from error


def _head_as_it_is(
    origin: Origin, tensors: TensorFile, view: View, recipes: dict[str, Recipe], config: GPTConfig, stated: Stated
) -> tuple[View, dict[str, Recipe]]:
    """With the head, which many files leave out, or hold twice, where it is the embedding."""
    format = origin.format
    assert format is not None
    says_tied = format.always_tied or stated.config.get("tie_embeddings", format is HUGGINGFACE) is True
    if _HEAD in view.names and _HEAD not in view.aliases and says_tied and format in (HUGGINGFACE, NANOGPT):
        if not torch.equal(view.tensor(_HEAD), view.tensor(_EMBEDDING)):
            if format is HUGGINGFACE and stated.source:
                origin.dropped.append("lm_head.weight")
                origin.notes.append(
                    "config.json ties the head to the embedding, and the file holds another head besides, which transformers "
                    "does not use either: it was left out."
                )
                return _tied_view(tensors, recipes)
            origin.notes.append("Its head differs from the embedding, so it was kept as one of its own.")
            return view, recipes
        return _tied_view(tensors, recipes)
    if _HEAD not in view.names:
        if not says_tied and format is not BOOK_FAST:
            raise CheckpointError(f"'{origin.contents.path}' is incomplete: it has no {_their_name(origin, _HEAD)}.")
        return _tied_view(tensors, recipes)
    return view, recipes


def _tied_view(tensors: TensorFile, recipes: dict[str, Recipe]) -> tuple[View, dict[str, Recipe]]:
    recipes = {**recipes, _HEAD: recipes[_EMBEDDING]}
    return View(tensors, recipes), recipes


def _as_written_by_us(
    origin: Origin, tensors: TensorFile, view: View, recipes: dict[str, Recipe], config: GPTConfig
) -> tuple[View, GPTConfig]:
    """Without the zeros that we gave a model which has no biases, where the file says that it was ours."""
    values = origin.contents.json("config.json")
    own = values.get(OURS) if values else None
    if origin.format is not HUGGINGFACE or not isinstance(own, dict):
        return view, config
    added = [
        name
        for name in view.shapes
        if (name.endswith("att.qkv.bias") and own.get("qkv_bias") is False)
        or (name.endswith(".bias") and not name.endswith("att.qkv.bias") and own.get("bias") is False)
    ]
    if not added or any(bool(view.tensor(name).any()) for name in added):
        return view, config
    without = set(added)
    fields = {key: own[key] for key in ("qkv_bias", "bias") if isinstance(own.get(key), bool)}
    origin.dropped += added
    kept = {name: recipe for name, recipe in recipes.items() if name not in without}
    return View(tensors, kept), GPTConfig.from_dict({**config.to_dict(), **fields})


def _require_whole(origin: Origin, view: View, config: GPTConfig) -> None:
    """Every tensor that a model of this configuration has, in its shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in GPT.without_values(config).state_dict().items()}
    have = set(view.names)
    if absent := [name for name in wanted if name not in have]:
        raise CheckpointError(
            f"'{origin.contents.path}' is incomplete: of {len(wanted)} tensors {len(absent)} are missing, "
            f"{_few([_their_name(origin, name) for name in absent], verb=False)}."
        )
    for name, shape in wanted.items():
        if _shape(view, name) != shape:
            raise CheckpointError(
                f"'{origin.contents.path}' does not fit together: {_their_name(origin, name)} is {list(_shape(view, name))} as "
                f"ours, and a model of this width needs {list(shape)}."
            )


def cropped(checkpoint: Checkpoint, vocab_size: int) -> Checkpoint:
    """One of our GPT with fewer rows in its vocabulary: the padding that some programs train with, left out.

    Raises:
        ConfigError: it has fewer rows than that.
    """
    assert checkpoint.config is not None
    rows = checkpoint.config["vocab_size"]
    if rows == vocab_size:
        return checkpoint
    if rows < vocab_size:
        raise ConfigError(f"'{checkpoint.path}' has a vocabulary of {rows}, which cannot be cropped to {vocab_size}.")
    names = checkpoint.model.names
    change = first_rows(vocab_size)
    recipes = {name: Recipe((name,), change) if name in (_EMBEDDING, _HEAD) else Recipe((name,)) for name in names}
    shorter = Checkpoint(checkpoint.path, model=View(checkpoint.model, recipes), texts=checkpoint._texts)
    shorter.config = {**checkpoint.config, "vocab_size": vocab_size}
    shorter.architecture, shorter.origin, shorter.provenance = checkpoint.architecture, checkpoint.origin, checkpoint.provenance
    return shorter


def warn_of(checkpoint: Checkpoint) -> None:
    """Say aloud what had to be assumed."""
    if checkpoint.origin is not None:
        for note in checkpoint.origin.notes:
            warnings.warn(f"'{checkpoint.path}': {note}", stacklevel=3)


def _own_texts(contents: Contents) -> dict[str, str]:
    """The tokenizer beside the weights."""
    if TOKENIZER in contents.texts:
        return {TOKENIZER: contents.texts[TOKENIZER]}
    if {"vocab.json", "merges.txt"} <= contents.texts.keys():
        try:
            return {TOKENIZER: _from_vocabulary(contents.texts["vocab.json"], contents.texts["merges.txt"])}
        except (ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"The vocabulary beside '{contents.path}' is damaged: {error}.") from error
    return {}


def _from_vocabulary(vocabulary: str, merges: str) -> str:
    """The text of a tokenizer.json for GPT-2's two older files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [
        (line.split(" ")[0], line.split(" ")[1]) for line in merges.splitlines() if line and not line.startswith("#version")
    ]
    inner = Tokenizer(models.BPE(vocab=json.loads(vocabulary), merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return str(inner.to_str())


def _their_name(origin: Origin, ours: str) -> str:
    """What the file would call a tensor of ours."""
    assert origin.format is not None
    general = re.sub(r"(?<=trf_blocks\.)\d+", "{n}", ours)
    number = re.search(r"trf_blocks\.(\d+)", ours)
    for rule in origin.format.rules:
        if rule.ours == general:
            return rule.theirs[0].replace("{n}", number.group(1) if number else "")
    return ours


def _few(items: Iterable[Any], verb: bool = True) -> str:
    items = list(items)
    said = ", ".join(map(str, items[:3])) + (" …" if len(items) > 3 else "")
    return f"{said} {'is' if len(items) == 1 else 'are'}" if verb else said


__all__ = ["ARCHITECTURE", "CONFIG", "FORMATS", "HEAD_SIZE", "Origin", "cropped", "open_any", "warn_of"]
