"""Any checkpoint, Onym's or another program's -> named tensors, and where the architecture is registered, a configuration.

The format is recognised by names and shapes. What was understood, and by which rules, is recorded as an
:class:`~onym.convert.registry.Origin`, so that it can be reported. Everything is lazy: opening reads headers alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from onym.checkpoint.steps import GoodCheckpoint, find_checkpoint, is_ours
from onym.convert.clean_names import clean_names
from onym.convert.folders import open_contents, open_part, open_state
from onym.convert.mapping import Recipe, View, to_ours
from onym.convert.registry import Config, Format, NamedShapes, Origin, completed, family_of, formats
from onym.convert.sources import TEMPLATE_TEXTS, Contents
from onym.convert.understand import by_rules, shape_of
from onym.errors import CheckpointError, ConfigError, OnymError
from onym.format.manifest import TOKENIZER
from onym.format.nested import is_state
from onym.format.reader import Checkpoint, require_path
from onym.format.tensors import TensorFile
from onym.names.wrappers import AVERAGE_COUNTER
from onym.storage.paths import as_path, is_local

_HEADS = ("lm_head.", "score.")


def open_any(
    path: str | Path,
    step: int | str = "latest",
    *,
    verify: bool = True,
    part: str | None = None,
    settings: Config | None = None,
    complete: bool = True,
) -> GoodCheckpoint:
    """Open a run, checkpoint, folder or file of Onym's, or of any program whose format is registered.

    Args:
        path: any of these.
        step, verify: of a run; see :func:`onym.checkpoint.retention.find_checkpoint`.
        part: of a file with several models, which.
        settings: fields of the configuration that the file does not state, as ``{"n_heads": 12}``.
        complete: of adapters alone, open their base too, and merge them; otherwise the adapters as they are.

    Raises:
        CheckpointError: it is none of these, or damaged.
        ConfigError: the file states another value than ``settings``.
    """
    found = _open(path, step, verify, part, settings)
    return GoodCheckpoint(completed(found.checkpoint), found.skipped) if complete else found


def _open(path: str | Path, step: int | str, verify: bool, part: str | None, settings: Config | None) -> GoodCheckpoint:
    path = as_path(path)
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    require_path(path)
    if is_ours(path) or not path.exists():
        found = find_checkpoint(path, step, verify=verify)
        checkpoint = found.checkpoint
        index = checkpoint.chunk_index
        if part is not None and index is not None and index.paths and f"{part}." != index.prefix:
            return GoodCheckpoint(understood(open_part(path, checkpoint, part), settings), found.skipped)
        nested = is_state(checkpoint)
        if not nested and (checkpoint.architecture is not None or not is_local(path)):
            _require_unsaid(checkpoint, part, settings)
            return found
        contents = Contents(path, "a file that Onym wrote", checkpoint.model)
        if nested:
            contents = open_state(path, checkpoint, part)
        result = understood(contents, settings)
        if result.origin.format is None and not nested:
            return found
        result.provenance = checkpoint.provenance
        return GoodCheckpoint(result, found.skipped)
    if step != "latest":
        raise CheckpointError(f"'{path}' is no run, so there is no step {step} to choose in it.")
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"'{path}' is neither a file nor a folder.")
    return GoodCheckpoint(understood(open_contents(path, part), settings), [])


def _require_unsaid(checkpoint: Checkpoint, part: str | None, settings: Config) -> None:
    """Refuse what a checkpoint of Onym's states itself."""
    if part is not None:
        raise ConfigError(f"'{checkpoint.path}' is Onym's own and holds one model: leave part {part!r} out.")
    for name, value in settings.items():
        stated = (checkpoint.config or {}).get(name, value)
        if stated != value:
            raise ConfigError(f"'{checkpoint.path}' says {name}={stated}, and {value} was given: leave it out.")


def understood(contents: Contents, settings: Config) -> Checkpoint:
    """Another program's tensors as a checkpoint: its format recognised, its names those of the architecture."""
    origin = Origin(contents, contents.tensors, given=settings)
    origin.clean, named = _recognised(origin)
    model = origin.clean if named is None else _ours(origin, named, settings)
    checkpoint = Checkpoint(contents.path, model=model, texts=_own_texts(contents))
    checkpoint.origin = origin
    if origin.format is not None and origin.config is not None and origin.problem is None:
        checkpoint.architecture, checkpoint.config = origin.format.architecture, origin.config
    return checkpoint


def _ours(origin: Origin, named: NamedShapes, settings: Config) -> TensorFile:
    """The architecture's tensors; the file's own where it cannot be such a model, for the reason in the origin."""
    assert origin.format is not None
    stated = origin.format.stated(named)
    origin.not_ours = origin.format.not_ours or stated.not_ours
    if origin.not_ours is not None:
        return origin.clean
    try:
        result = (origin.format.understand or by_rules)(origin, origin.clean, stated, settings)
    except OnymError as error:  # its tensors can still be read, one by one
        if settings and isinstance(error, ConfigError):
            raise
        origin.problem = str(error)
        return origin.clean
    if result is None:
        return origin.clean
    ours, origin.config = result
    return ours


def _recognised(origin: Origin) -> tuple[TensorFile, NamedShapes | None]:
    """The tensors without what wrappers added to their names, and their format, recorded in the origin."""
    contents = origin.contents
    stored = contents.tensors
    names = [name for name in stored.names if name != AVERAGE_COUNTER and not name.endswith(f".{AVERAGE_COUNTER}")]
    origin.dropped = [name for name in stored.names if name not in set(names)]
    best: tuple[int, Format, str, dict[str, int], dict[str, str]] | None = None
    for thorough in (False, True):
        try:
            cleaned, wrappers = clean_names(names, thorough=thorough)
        except CheckpointError:
            if not thorough:
                raise
            break
        for format in formats():
            fitted = _with_prefix(cleaned, format.prefix)
            named = _named(contents, fitted)
            if (why := format.recognise(named)) is not None:
                unknown = len(to_ours(format.rules, named.names)[1]) if format.rules else 0
                if best is None or unknown < best[0]:
                    best = unknown, format, why, wrappers, fitted
                break
    if best is None:
        cleaned, origin.wrappers = clean_names(names)
        return _renamed(stored, cleaned), None
    _, origin.format, origin.why, origin.wrappers, fitted = best
    own = origin.format.prefix  # which is no wrapper's
    if own in origin.wrappers and (more := origin.wrappers.pop(own) - len(fitted)) > 0:
        origin.wrappers[own] = more
    return _renamed(stored, fitted), _named(contents, fitted)


def _named(contents: Contents, names: Mapping[str, str]) -> NamedShapes:
    return NamedShapes(contents, {clean: shape_of(contents.tensors, name) for name, clean in names.items()})


def _with_prefix(cleaned: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Names with a segment before them that some programs write and others do not. The head stands outside."""
    if not prefix or any(clean.startswith(f"{prefix}.") for clean in cleaned.values()):
        return dict(cleaned)
    return {name: clean if clean.startswith(_HEADS) else f"{prefix}.{clean}" for name, clean in cleaned.items()}


def _renamed(stored: TensorFile, names: Mapping[str, str]) -> TensorFile:
    if all(name == clean for name, clean in names.items()) and len(names) == len(stored.names):
        return stored
    view = View(stored, {clean: Recipe((name,)) for name, clean in names.items()})
    if stored.versions is not None:
        modules = {name.rpartition(".")[0]: clean.rpartition(".")[0] for name, clean in names.items()}
        view.versions = {modules[path]: version for path, version in stored.versions.items() if path in modules}
    return view


def cropped(checkpoint: Checkpoint, vocab_size: int) -> Checkpoint:
    """The model with fewer rows in its vocabulary: the padding that some programs train with, removed.

    Raises:
        ConfigError: it has fewer rows than that, or its architecture has no vocabulary that is known here.
    """
    assert checkpoint.config is not None
    family = family_of(checkpoint.architecture)
    if family is None or family.crop_vocabulary is None:
        raise ConfigError(f"No vocabulary is known of the architecture {checkpoint.architecture!r}: leave --vocab-size out.")
    rows = checkpoint.config["vocab_size"]
    if rows == vocab_size:
        return checkpoint
    if rows < vocab_size:
        raise ConfigError(f"'{checkpoint.path}' has a vocabulary of {rows}, which cannot be cropped to {vocab_size}.")
    tensors, config = family.crop_vocabulary(checkpoint.model, checkpoint.config, vocab_size)
    shorter = Checkpoint(checkpoint.path, model=tensors, texts=checkpoint._texts)
    shorter.config, shorter.architecture = config, checkpoint.architecture
    shorter.origin, shorter.provenance = checkpoint.origin, checkpoint.provenance
    return shorter


def warn_of(checkpoint: Checkpoint) -> None:
    """Warn of what had to be assumed."""
    if checkpoint.origin is not None:
        for note in checkpoint.origin.notes:
            warnings.warn(f"'{checkpoint.path}': {note}", stacklevel=3)


def _own_texts(contents: Contents) -> dict[str, str]:
    """The tokenizer beside the weights, and its chat template."""
    texts = {name: contents.texts[name] for name in (TOKENIZER, *TEMPLATE_TEXTS) if name in contents.texts}
    if TOKENIZER in texts:
        return texts
    if {"vocab.json", "merges.txt"} <= contents.texts.keys():
        try:
            return {**texts, TOKENIZER: _from_vocabulary(contents.texts["vocab.json"], contents.texts["merges.txt"])}
        except (ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"The vocabulary beside '{contents.path}' is damaged: {error}.") from error
    return texts


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
