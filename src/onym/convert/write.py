"""One checkpoint into another layout, tensor by tensor, and then read back and compared.

Whatever is written is a new file or folder: nothing is replaced. A tensor is made when its turn comes to be written, so that a
conversion needs little more memory than its largest tensor. What a target cannot hold is refused, or dropped where that is
asked for by its name.
"""

from __future__ import annotations

import mmap
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from onym.convert.mapping import KEPT, Recipe, View, counts, nbytes, to_theirs, zeros
from onym.convert.opening import ARCHITECTURE, HEAD_SIZE, cropped, open_any
from onym.convert.registry import Format
from onym.convert.sources import as_json
from onym.convert.translation import biases, mask
from onym.errors import CheckpointError, ConfigError, StorageError, nearest, storage_error
from onym.format.manifest import CONFIG, MODEL, OPTIMIZER, TOKENIZER
from onym.format.reader import Checkpoint
from onym.format.safetensors import as_bytes, dtype_called, from_bytes
from onym.format.tensors import PickledFile, SafetensorsFile, TensorFile
from onym.format.writer import LazyTensor, Progress, write_files, write_folder, write_pickle, write_safetensors
from onym.gpt.config import GPTConfig
from onym.gpt.formats import huggingface, nanogpt
from onym.gpt.formats.book import BOOK, MASK
from onym.gpt.formats.book_fast import BOOK_FAST
from onym.gpt.formats.huggingface import HUGGINGFACE
from onym.gpt.formats.nanogpt import NANOGPT
from onym.gpt.gpt2 import GPT
from onym.storage import object_store

_LAYOUTS: dict[str, Format] = {format.name: format for format in (HUGGINGFACE, BOOK, BOOK_FAST, NANOGPT)}
TARGETS = (*_LAYOUTS, "safetensors", "pth", "onym")
"""What can be written: a GPT in one of four layouts, the tensors as they are in one of two files, and Onym's own."""

_TRIED = 16  # tokens whose logits are compared
_FAR = 1e-5


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
    """Tensors that were read back from the result and are equal to the source's, bit for bit."""
    logits: float | None = None
    """The largest difference between the logits of both, where they are GPTs."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    part: str | None = None,
    n_heads: int | None = None,
    vocab_size: int | None = None,
    shard_bytes: int | None = None,
    tokenizer: str | None = None,
    drop: Collection[str] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
    step: int | str = "latest",
) -> Report:
    """Write a checkpoint in another layout, read it back, and compare.

    Args:
        source: anything that :func:`onym.load` takes.
        destination: a file or folder that is not there yet.
        to: one of :data:`TARGETS`; by default the one that the destination's ending tells.
        part, n_heads, step: see :func:`onym.convert.opening.open_any`.
        vocab_size: leave out the rows of the vocabulary from here on, which padded it.
        shard_bytes: several .safetensors files of at most this size, with an index (``huggingface`` and ``safetensors``).
        tokenizer: the text of a ``tokenizer.json`` to put beside the weights, where the source has none.
        drop: what to do without that the target cannot hold, by the words that the refusal says.
        dry_run: find out all that can be, and write nothing.
        progress: called with the bytes written since the last call.

    Raises:
        CheckpointError: the source cannot be read, or the target cannot hold it.
        ConfigError: the options do not fit together.
        StorageError: something is at the destination already, or the disk refused.
    """
    path = object_store.as_path(destination)
    if object_store.is_remote(path):
        raise ConfigError(f"'{destination}' is remote: convert to this machine, and copy the result.")
    found = open_any(source, step, part=part, n_heads=n_heads)
    checkpoint = found.checkpoint
    target, why = _target(to, path, checkpoint)
    report = Report(str(source), str(path), target, why, checkpoint.origin.told() if checkpoint.origin else None)
    if path.exists() or path.is_symlink():
        raise StorageError(f"There is something at '{path}' already: give another name, or remove it.")
    for number, (skipped, reason) in enumerate(found.skipped):
        report.notes.insert(number, f"Passed over '{skipped}': {reason}")
    _require_used(target, path, shard_bytes, tokenizer)
    report.unused = _unused(checkpoint, target, path)
    if target in ("safetensors", "pth"):
        if drop or vocab_size is not None:
            raise ConfigError(
                f"{target} keeps every tensor as it is: leave --drop and --vocab-size out, or choose a layout (--to)."
            )
        job: _Plain | _Translated = _Plain(checkpoint, path, report, shard_bytes, progress)
    else:
        _require_gpt(checkpoint, target)
        if vocab_size is not None:
            rows = checkpoint.config["vocab_size"] if checkpoint.config is not None else 0
            checkpoint = cropped(checkpoint, vocab_size)
            report.dropped += [f"{rows - vocab_size} rows of the vocabulary"] if rows > vocab_size else []
        if tokenizer is not None:
            checkpoint._texts[TOKENIZER] = tokenizer
        job = _Translated(checkpoint, path, report, shard_bytes, progress, frozenset(drop))
        job.keeps_texts = tokenizer is None
    job.prepare()
    if not dry_run:
        job.write()
        try:
            job.compare()
        except BaseException:  # what was written is not known to be what was meant, and nobody else has it yet
            _remove(path)
            raise
    return report


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _target(to: str | None, path: Path, checkpoint: Checkpoint) -> tuple[str, str]:
    if to is not None:
        if to not in TARGETS:
            raise ConfigError(f"There is no layout {to!r}{nearest(to, TARGETS)}; there are {', '.join(TARGETS)}.")
        if to in ("book", "book-fast", "pth", "nanogpt") and path.suffix not in (".pth", ".pt", ".bin", ".ckpt"):
            raise ConfigError(f"{to} is a file of torch.save: end '{path}' in .pth or .pt.")
        if to == "huggingface" and path.suffix in (".pth", ".pt", ".safetensors", ".bin"):
            raise ConfigError(f"{to} is a folder: leave the ending of '{path}' away.")
        if to == "safetensors" and path.suffix in (".pth", ".pt", ".bin"):
            raise ConfigError(f"'{path}' would be a .safetensors file of another name: end it in .safetensors.")
        return to, ""
    if path.suffix == ".safetensors":
        return "safetensors", "it ends in .safetensors"
    if path.suffix in (".pth", ".pt"):
        return "pth", f"it ends in {path.suffix}"
    if path.suffix in (".bin", ".ckpt", ".onnx", ".gguf", ".h5", ".npz", ".pkl"):
        raise ConfigError(f"'{path.suffix}' does not say which layout is wanted: give --to, one of {', '.join(TARGETS)}.")
    if checkpoint.architecture == ARCHITECTURE:
        return "onym", "it is a folder, and the model is a GPT"
    return "safetensors", "it is a folder"


def _require_used(target: str, path: Path, shard_bytes: int | None, tokenizer: str | None) -> None:
    """Refuse what would be passed over."""
    if shard_bytes is not None and target not in ("huggingface", "safetensors"):
        raise ConfigError(f"{target} is one file: leave --shard-size out, or choose --to huggingface or safetensors.")
    if shard_bytes is not None and path.suffix == ".safetensors":
        raise ConfigError(f"Shards are files in a folder: leave the ending of '{path}' away, or --shard-size out.")
    if tokenizer is not None and (target not in ("huggingface", "onym") or path.suffix == ".safetensors"):
        raise ConfigError(
            f"{target} has no place for a tokenizer: leave --tokenizer out, or write a folder of huggingface or onym."
        )


def _require_gpt(checkpoint: Checkpoint, target: str) -> None:
    if checkpoint.architecture == ARCHITECTURE and checkpoint.config is not None:
        return
    if checkpoint.origin is not None and checkpoint.origin.problem is not None:
        raise CheckpointError(checkpoint.origin.problem)
    if checkpoint.origin is not None and checkpoint.origin.not_ours is not None:
        raise CheckpointError(
            f"'{checkpoint.path}' is {checkpoint.origin.kind}, which cannot be written as {target}: "
            f"{checkpoint.origin.not_ours}. --to safetensors and --to pth write its tensors as they are."
        )
    raise CheckpointError(
        f"'{checkpoint.path}' is no GPT that is known here, so it cannot be written as {target}: --to safetensors and --to pth "
        "write its tensors as they are, under clean names."
    )


def _unused(checkpoint: Checkpoint, target: str, path: Path) -> list[str]:
    """What a source has besides what the result will have."""
    plain = target in ("safetensors", "pth")
    used = {MODEL}
    if not plain or (target == "safetensors" and path.suffix and checkpoint.origin is None):
        used.add(CONFIG)
    if target in ("huggingface", "onym") and path.suffix != ".safetensors":
        used |= {TOKENIZER, "vocab.json", "merges.txt"}
    if checkpoint.manifest is not None:
        return [file for file in checkpoint.holds if file not in used]
    if checkpoint.origin is None:
        return []
    contents = checkpoint.origin.contents
    if target == "huggingface" and checkpoint.origin.format is HUGGINGFACE:
        used |= contents.texts.keys()
    texts = [name for name in contents.texts if name not in used] if contents.path.is_dir() else []
    values = [key for key in contents.values if key not in contents.further]
    return [*contents.further, *values, *checkpoint.origin.unused, *texts]


class _Plain:
    """The tensors as they are, under clean names."""

    def __init__(
        self, checkpoint: Checkpoint, path: Path, report: Report, shard_bytes: int | None, progress: Progress | None
    ) -> None:
        self.path, self.report, self.shard_bytes, self.progress = path, report, shard_bytes, progress
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
        self.stored._require_right(self.stored.shapes)

    def write(self) -> None:
        """The file or folder."""
        if self.report.to == "pth":
            with _on_disk(self.tensors, self.path, self.progress) as values:
                write_pickle(self.path, values, self.report.bytes)
        elif self.shard_bytes is not None or not self.path.suffix:
            files, texts = _sharded(self.tensors, self.shard_bytes)
            write_files(self.path, files, texts, self.progress)
        else:
            write_safetensors(self.path, lazily(self.tensors), self.architecture, self.config, self.progress)

    def compare(self) -> None:
        """Read back what was written."""
        result = open_any(self.path).checkpoint
        written = result.origin.contents.tensors if result.origin is not None else result.model
        self.report.compared = compare(self.tensors, written, self.path)


class _Translated:
    """A GPT in a layout that has names of its own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        path: Path,
        report: Report,
        shard_bytes: int | None,
        progress: Progress | None,
        drop: frozenset[str],
    ) -> None:
        assert checkpoint.config is not None
        self.checkpoint, self.path, self.report = checkpoint, path, report
        self.shard_bytes, self.progress = shard_bytes, progress
        self.config = GPTConfig.from_dict(checkpoint.config)
        self.keeps_texts = True
        """Whether what transformers' folder says besides, is kept in another one of transformers."""
        self.format = _LAYOUTS.get(report.to)
        self.tensors = checkpoint.model
        if self.format in (BOOK, BOOK_FAST) and self.config.n_heads * HEAD_SIZE != self.config.emb_dim:
            report.notes.append(
                f"The book's files do not say how many heads a model has: give n_heads={self.config.n_heads} where it is "
                f"loaded (here --n-heads {self.config.n_heads})."
            )
        if checkpoint.origin is not None:
            report.notes += checkpoint.origin.notes
            report.dropped += [f"{name} (nothing learned)" for name in checkpoint.origin.dropped]
        self._require_held(drop)
        self.theirs = self._theirs()

    def _require_held(self, drop: frozenset[str]) -> None:
        """Refuse what the target cannot hold, unless it is named to be dropped."""
        lacks = self.format.lacks(self.config) if self.format is not None else {}
        if unknown := sorted(drop - lacks.keys()):
            known = f"it could drop {', '.join(lacks)}" if lacks else "nothing has to be dropped"
            raise ConfigError(f"--drop {unknown[0]} names nothing that {self.report.to} cannot hold of this model: {known}.")
        for word, reason in lacks.items():
            if word not in drop:
                raise CheckpointError(
                    f"'{self.checkpoint.path}' cannot be written as {self.report.to} as it is: {reason}. To do without that, "
                    f"which makes it another model, give --drop {word}."
                )
            self.report.dropped.append(reason)
        before = self.tensors, self.config
        if "head" in lacks:
            recipes = {name: Recipe((name,)) for name in self.tensors.names if name != "out_head.weight"}
            self.tensors = View(self.tensors, {**recipes, "out_head.weight": Recipe(("tok_emb.weight",))})
            self.config = GPTConfig.from_dict({**self.config.to_dict(), "tie_embeddings": True})
        if "gelu" in lacks:
            self.config = GPTConfig.from_dict(
                {**self.config.to_dict(), "gelu": "erf" if self.config.gelu == "tanh" else "tanh"}
            )
        if lacks:
            apart = _logits_apart(*before, self.tensors, self.config)
            self.report.notes.append(
                f"It is another model without {' and '.join(lacks)}: its logits are up to {apart:.2g} from the source's. What "
                "was written is compared with that other model."
            )

    def _theirs(self) -> TensorFile:
        """The tensors in the target's layout."""
        if self.format is None:
            if self.checkpoint.origin is not None:
                self.report.rules = self.checkpoint.origin.rules
            return self.tensors
        recipes, left = to_theirs(self.format.rules, self.tensors.names, self.config.n_layers)
        assert not left, left
        dtype = self.tensors.dtypes["tok_emb.weight"]
        for name, shape in biases(self.config, self.format, wanted=self.format.biases(self.config)).items():
            recipes[name] = Recipe((), zeros(shape, dtype), dtype)
        if self.format is BOOK:
            one = mask(self.config.context_length)
            recipes |= {MASK.replace("{n}", str(layer)): one for layer in range(self.config.n_layers)}
        if self.format is HUGGINGFACE and self.config.tie_embeddings:
            del recipes["lm_head.weight"]
        self.report.rules = counts(_from_stored(recipes, self.tensors))
        return View(self.tensors, recipes)

    def prepare(self) -> None:
        """Count, and check every byte of the source that can be."""
        _count(self.report, self.theirs)
        self.tensors._require_right(self.tensors.shapes)

    def compare(self) -> None:
        """Read back what was written, through the tables the other way."""
        again = open_any(self.path, n_heads=self.config.n_heads if self.format in (BOOK, BOOK_FAST) else None).checkpoint
        assert again.config is not None
        self.report.compared = compare(self.tensors, again.model, self.path)
        self.report.logits = _logits_apart(self.tensors, self.config, again.model, GPTConfig.from_dict(again.config))
        if self.report.logits > _FAR:
            raise CheckpointError(
                f"'{self.path}' was written and removed again: its logits differ from the source's by {self.report.logits:.2g}"
            )

    def write(self) -> None:
        """The file or folder."""
        texts = {TOKENIZER: text} if (text := self.checkpoint.text(TOKENIZER)) is not None else {}
        if self.format is None:
            config = self.config.to_dict()
            if self.path.suffix == ".safetensors":
                write_safetensors(self.path, lazily(self.theirs), ARCHITECTURE, config, self.progress)
            else:
                texts[CONFIG] = self.config.to_json()
                write_folder(self.path, {MODEL: lazily(self.theirs)}, texts, architecture=ARCHITECTURE, progress=self.progress)
        elif self.format is HUGGINGFACE:
            files, index = _sharded(self.theirs, self.shard_bytes)
            dtype = self.tensors.dtypes["tok_emb.weight"]
            origin = self.checkpoint.origin
            same = origin is not None and origin.format is HUGGINGFACE and self.keeps_texts
            theirs = origin.contents.texts if origin is not None and same else {}
            written = {**index, **huggingface.texts(self.config, texts.get(TOKENIZER), dtype, theirs)}
            write_files(self.path, files, written, self.progress)
        elif self.format is NANOGPT:
            self._write_nanogpt()
        else:
            with _on_disk(self.theirs, self.path, self.progress) as values:
                write_pickle(self.path, values, self.report.bytes)

    def _write_nanogpt(self) -> None:
        every = self.config.bias or self.config.qkv_bias  # nanoGPT has all biases or none
        model = GPT.without_values(GPTConfig.from_dict({**self.config.to_dict(), "bias": every, "qkv_bias": every}))
        names = [name for name, _ in model.named_parameters()]
        kept = _moments(self.checkpoint, names)
        with _on_disk(self.theirs, self.path, self.progress) as values:
            optimizer: dict[int, dict[str, Tensor]] = {}
            if kept is not None:
                ordered = [name for group in nanogpt.parameter_order(names) for name in group]
                optimizer = {
                    number: {slot: kept[0][f"{slot}.{name}"] for slot in ("step", "exp_avg", "exp_avg_sq")}
                    for number, name in enumerate(ordered)
                }
                for state in optimizer.values():
                    state["step"] = state["step"].to(torch.float32)
                self.report.unused = [name for name in self.report.unused if name not in (OPTIMIZER, "optimizer")]
                self.report.notes.append("The optimizer's moments are in it.")
            else:
                self.report.notes.append("Its optimizer starts afresh: the source has no moments of AdamW.")
            values_of = self.checkpoint.origin.contents.values if self.checkpoint.origin is not None else {}
            manifest = self.checkpoint.manifest
            step = manifest.step if manifest is not None else values_of.get("iter_num")
            best = values_of.get("best_val_loss", 1e9)
            content = {
                "model": values,
                "optimizer": {"state": optimizer, "param_groups": nanogpt.groups(names, kept[1] if kept else None)},
                "model_args": nanogpt.arguments(self.config),
                "iter_num": int(step or 0),
                "best_val_loss": best if isinstance(best, Tensor | float | int) else 1e9,
                "config": {},
            }
            write_pickle(self.path, content, 3 * self.report.bytes)
        self.report.unused = [name for name in self.report.unused if name not in ("iter_num", "best_val_loss", "model_args")]


def _moments(checkpoint: Checkpoint, names: list[str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """AdamW's moments of every parameter under our names, and its groups' settings; from nanoGPT's file or an Onym run's."""
    if checkpoint.origin is not None:
        if checkpoint.origin.format is not NANOGPT:
            return None
        found = nanogpt.moments(checkpoint.origin.contents.values, names)
    elif OPTIMIZER in checkpoint.holds:
        stored = checkpoint.tensors(OPTIMIZER)
        found = {name.removeprefix("state."): stored.tensor(name) for name in stored.names}, []
    else:
        return None
    if found is None:
        return None
    whole = all(f"{slot}.{name}" in found[0] for slot in ("step", "exp_avg", "exp_avg_sq") for name in names)
    fitting = whole and all(found[0][f"exp_avg.{name}"].shape == checkpoint.model.shapes.get(name) for name in names)
    return found if fitting else None


def _from_stored(recipes: Mapping[str, Recipe], ours: TensorFile) -> dict[str, Recipe]:
    """Recipes from our names, as recipes from the names that the source has, for counting: what was undone is not told."""
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


def lazily(tensors: TensorFile) -> dict[str, Any]:
    """Tensors to be written, each made when its turn comes; tied ones are views of one memory, and are stored once."""
    state: dict[str, Any] = {}
    for name in tensors.shapes:
        kind = dtype_called(tensors.dtypes[name])
        if kind is None:
            raise CheckpointError(
                f"{name} in '{tensors.path}' has the dtype {tensors.dtypes[name]}, which torch does not have."
            )
        state[name] = LazyTensor(kind, tuple(tensors.shapes[name]), _maker(tensors, name), _further(tensors, name))
    return state


def _further(tensors: TensorFile, name: str) -> tuple[str, ...]:
    return tuple(alias for alias, stored in tensors.aliases.items() if stored == name)


def _maker(tensors: TensorFile, name: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        value = tensors.tensor(name, verify=False)
        assert isinstance(value, Tensor)
        return value

    return make


@contextmanager
def _on_disk(tensors: TensorFile, path: Path, progress: Progress | None) -> Iterator[OrderedDict[str, Tensor]]:
    """Tensors in memory that is a file's: ``torch.save`` wants all of them at once. The file goes afterwards."""
    if _is_mapped(tensors):
        yield OrderedDict((name, tensors.tensor(name, verify=False)) for name in tensors.names)
        return
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.safetensors")
    try:
        write_safetensors(scratch, lazily(tensors), progress=progress)
        opened = SafetensorsFile(scratch)
        try:
            descriptor = os.open(scratch, os.O_RDONLY)
            try:
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("read", scratch, error) from error
        values: OrderedDict[str, Tensor] = OrderedDict()
        for name in tensors.names:
            stored = tensors.aliases.get(name, name)
            if stored in values:
                values[name] = values[stored]
                continue
            placed = opened.placed[stored]
            count = placed.end - placed.start
            data = (
                torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=opened.data_start + placed.start)
                if count
                else torch.empty(0, dtype=torch.uint8, device="cpu")
            )
            kind = dtype_called(tensors.dtypes[stored])
            assert kind is not None
            values[name] = from_bytes(data, kind, tuple(tensors.shapes[stored]))
        yield values
    finally:
        scratch.unlink(missing_ok=True)


def _is_mapped(tensors: TensorFile) -> bool:
    """Whether every tensor is one of a mapped file of ``torch.save``'s, as it is, and all of its storage."""
    if isinstance(tensors, View):
        return all(recipe.change is KEPT for recipe in tensors.recipes.values()) and _is_mapped(tensors.source)
    if not isinstance(tensors, PickledFile) or not tensors.is_mapped:
        return False
    values = [tensors.tensor(name, verify=False) for name in tensors.names]
    return all(value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in values)


def _sharded(tensors: TensorFile, shard_bytes: int | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The files that tensors go to, and the index where there are several."""
    state = lazily(tensors)
    total = sum(value.nbytes for value in state.values())
    if shard_bytes is None or total <= shard_bytes:
        return {MODEL: state}, {}
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}
    placed = {name: file for file, shard in files.items() for name in shard}
    placed |= {alias: placed[stored] for alias, stored in tensors.aliases.items()}
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    return files, {f"{MODEL}.index.json": as_json(index)}


def _count(report: Report, tensors: TensorFile) -> None:
    report.tensors = len(tensors.shapes)
    report.bytes = sum(nbytes(tensors, name) for name in tensors.shapes)


def compare(source: TensorFile, written: TensorFile, path: Path) -> int:
    """Hold every tensor of the source against what can be read from the result; one of each is in memory at a time."""
    names = set(written.names)
    for name in source.names:
        if name not in names:
            raise CheckpointError(f"'{path}' was written and removed again: it does not hold {name}")
        if name in source.aliases:
            continue
        one, other = source.tensor(name, verify=False), written.tensor(name)
        if one.dtype != other.dtype or one.shape != other.shape or not _equal_bytes(one, other):
            raise CheckpointError(f"'{path}' was written and removed again: its {name} is not the source's")
    further = names - set(source.names)
    if unequal := [name for name in further if bool(written.tensor(name).any())]:
        raise CheckpointError(f"'{path}' was written and removed again: it holds {unequal[0]}, which the source has not")
    return len(source.shapes)


def _equal_bytes(one: Tensor, other: Tensor, rows: int = 1 << 20) -> bool:
    """Whether two tensors are equal bit for bit, in pieces, so that no copy of either is made."""
    if one.dim() == 0 or one.numel() <= rows:
        return torch.equal(as_bytes(one.contiguous()), as_bytes(other.contiguous()))
    step = max(1, rows // max(1, one[0].numel()))
    return all(
        _equal_bytes(left.contiguous(), right.contiguous(), max(rows, left.numel()))
        for left, right in zip(one.split(step), other.split(step), strict=True)
    )


@torch.no_grad()
def _logits_apart(one: TensorFile, config: GPTConfig, other: TensorFile, other_config: GPTConfig) -> float:
    """The largest difference of two GPTs' logits for the same tokens; a layer of each is in memory at a time."""
    pair = [_logits(one, config), _logits(other, other_config)]
    return float((pair[0] - pair[1]).abs().max())


def _logits(tensors: TensorFile, config: GPTConfig) -> Tensor:
    model = GPT.without_values(config).eval()
    tokens = torch.arange(min(_TRIED, config.context_length), device="cpu") * 7919 % config.vocab_size

    def weights(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: tensors.tensor(f"{prefix}.{name}", verify=False).float() for name in module.state_dict()}

    x = _rows(tensors, "tok_emb.weight", tokens) + _rows(tensors, "pos_emb.weight", torch.arange(len(tokens), device="cpu"))
    x = x[None]
    for number, block in enumerate(model.trf_blocks):
        x = functional_call(block, weights(f"trf_blocks.{number}", block), (x,))
    x = functional_call(model.final_norm, weights("final_norm", model.final_norm), (x,))
    head = tensors.tensor("out_head.weight", verify=False)
    return torch.cat([x @ rows.float().t() for rows in head.split(4096)], dim=-1)


def _rows(tensors: TensorFile, name: str, numbers: Tensor) -> Tensor:
    rows: Tensor = tensors.tensor(name, verify=False)[numbers]
    return rows.float()


__all__ = ["TARGETS", "Report", "compare", "convert", "lazily"]
