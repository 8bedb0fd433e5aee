"""``onym convert`` of adapters: merged into their base, beside it, or alone in another layout. Written, read back, compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onym.adapters.exporting import linear_layers, linear_of, write_book, write_peft
from onym.adapters.layer import A, B
from onym.adapters.merging import MergedCheckpoint, base_for
from onym.adapters.opening import stored_adapter
from onym.adapters.stored import StoredAdapter, fitted, weights_of
from onym.convert.lazy import compare
from onym.convert.mapping import nbytes
from onym.convert.opening import open_any
from onym.convert.registry import Config
from onym.convert.sources import template_texts
from onym.convert.targets import format_named
from onym.convert.write import Report, convert
from onym.errors import CheckpointError, ConfigError, StorageError
from onym.format.pth import PICKLES
from onym.format.reader import Checkpoint
from onym.format.tensor_writing import Progress
from onym.storage.paths import as_path, ending, is_local

PEFT, BOOK = "peft", "book-lora"
TARGETS = (PEFT, BOOK)
"""What ``--to`` may be of adapters, besides the formats of models."""
BESIDE = "adapter"
"""The folder of the adapters in a folder with their base."""
_FAR = 1e-5  # of a product, relative to its largest value


@dataclass(frozen=True)
class AdapterSource:
    """Adapters that are converted, and the base that they are converted for."""

    adapter: StoredAdapter
    base: Checkpoint | None

    @classmethod
    def open(
        cls,
        path: str | Path,
        base: str | Path | None = None,
        *,
        step: int | str = "latest",
        alpha: float | None = None,
        part: str | None = None,
        settings: Config | None = None,
        need_base: bool = True,
    ) -> AdapterSource:
        """Open adapters.

        Args:
            path: a run, checkpoint, folder or file that holds adapters.
            base: the model that they belong to; by default the one that they record, or that is in the same file.
            step: of a run, which.
            alpha: of the book's file, what its class multiplies by.
            part, settings: of the base; see :func:`onym.convert.opening.open_any`.
            need_base: open the base also where nobody gave one.

        Raises:
            CheckpointError: there are no adapters, or the base is missing, has changed, or is another model.
        """
        own = None if base is not None else settings  # the book's file holds the base itself
        adapter = stored_adapter(open_any(path, step, settings=own, complete=False).checkpoint, alpha)
        if adapter is None:
            raise CheckpointError(
                f"'{path}' holds no adapters alone: --merge, --unmerged, --alpha and --to {' and '.join(TARGETS)} are for what "
                "onym.save(lora, …), onym train, peft or the book's appendix E wrote."
            )
        opened = open_any(base, part=part, settings=settings).checkpoint if base is not None else None
        if opened is None and not need_base and adapter.base is None:
            return cls(adapter, None)
        return cls(adapter, base_for(adapter, opened))

    def merged(self) -> Checkpoint:
        """The model."""
        assert self.base is not None
        return MergedCheckpoint(self.adapter, self.base)

    def fitted(self) -> StoredAdapter:
        """The adapters under the names of their base."""
        if self.base is None:
            record = self.adapter.config.base or {}
            recorded = linear_of(record.get("architecture"), record.get("config"))
            if not recorded:
                return self.adapter
            weights = {f"{layer}.weight": shape for layer, shape in recorded.items()}
            return fitted(self.adapter, weights, f"'{record.get('path')}'", record.get("architecture"))
        return fitted(self.adapter, weights_of(self.base), f"'{self.base.path}'", self.base.architecture)


def write_adapter(
    source: AdapterSource, destination: str | Path, to: str, *, dry_run: bool = False, progress: Progress | None = None
) -> Report:
    """Write adapters alone in peft's layout, or with their base in the book's.

    Args:
        source: what to write.
        destination: a folder (``peft``) or a ``.pth`` (``book-lora``) that is not there yet.
        to: one of :data:`TARGETS`.
        dry_run: find out all that can be, and write nothing.
        progress: called with the bytes written since the last call.

    Raises:
        CheckpointError: the target cannot hold it.
        StorageError: something is at the destination already, or the disk refused.
    """
    path = _new(destination)
    if (ending(path) in PICKLES) != (to == BOOK) or (to == PEFT and path.suffix == ".safetensors"):
        wanted = "a file of torch.save: end it in .pth" if to == BOOK else "a folder: leave the ending away"
        raise ConfigError(f"'{path}' cannot be written as {to}, which is {wanted}.")
    adapter = source.fitted()
    report = Report(str(source.adapter.path), str(path), to, "", _found(source))
    report.notes += source.adapter.notes
    report.rules = {"renamed": len(adapter.tensors.names), **({"transposed": len(adapter.tensors.names)} if to == BOOK else {})}
    report.tensors, report.bytes = len(adapter.tensors.shapes), nbytes(adapter.tensors)
    adapter.tensors.require_verified(adapter.tensors.shapes)
    if to == BOOK:
        assert source.base is not None
        source.base.model.require_verified(source.base.model.shapes)
        report.tensors += len(source.base.model.shapes)
        report.bytes += nbytes(source.base.model)
    if dry_run:
        return report
    if to == BOOK:
        assert source.base is not None
        report.notes += write_book(adapter, source.base, path, progress)
        _or_removed(path, lambda: _compare_book(adapter, source, path, report))
    else:
        write_peft(adapter, source.base, path, progress=progress)
        _or_removed(path, lambda: _compare_peft(adapter, source, path, report))
    return report


def write_beside(
    source: AdapterSource, destination: str | Path, *, dry_run: bool = False, progress: Progress | None = None, **how: Any
) -> Report:
    """Write the base in transformers' layout, and in its folder ``adapter`` the adapters in peft's.

    Args:
        source: what to write.
        destination: a folder that is not there yet.
        dry_run, progress: see :func:`write_adapter`.
        how: further arguments of :func:`onym.convert.write.convert`.
    """
    assert source.base is not None
    path = _new(destination)
    adapter = source.fitted()
    source.base._texts.update(template_texts(source.adapter.checkpoint))  # how the adapters were taught to converse
    report = convert(source.base, path, to="huggingface", dry_run=dry_run, progress=progress, **how)
    report.source, report.found = str(source.adapter.path), _found(source)
    report.notes += [*source.adapter.notes, f"The adapters are in '{path / BESIDE}', for peft: {source.adapter.said}."]
    if not dry_run:

        def beside() -> None:
            write_peft(adapter, source.base, path / BESIDE, base_name=str(destination), progress=progress)
            _compare_peft(adapter, source, path / BESIDE, report)

        _or_removed(path, beside)
    return report


def _new(destination: str | Path) -> Path:
    path = as_path(destination)
    if not is_local(path):
        raise ConfigError(f"'{destination}' is remote: convert to this machine, and copy the result.")
    if path.exists() or path.is_symlink():
        raise StorageError(f"There is something at '{path}' already: give another name, or remove it.")
    return path


def _found(source: AdapterSource) -> dict[str, Any]:
    """How the source was understood, as of any conversion."""
    whole = f", for '{source.base.path}'" if source.base is not None and source.adapter.base is None else ""
    said = {"kind": f"{source.adapter.said}, {source.adapter.kind}{whole}", "why": ""}
    return {**said, "format": None, "wrappers": {}, "further": [], "foreign": {}, "rules": {}, "notes": source.adapter.notes}


def _or_removed(path: Path, check: Callable[[], object]) -> None:
    """Remove what was written where it cannot be shown to be right."""
    try:
        check()
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _compare_peft(adapter: StoredAdapter, source: AdapterSource, path: Path, report: Report) -> None:
    again = stored_adapter(open_any(path, complete=False).checkpoint)
    assert again is not None
    if source.base is not None:
        again = fitted(again, weights_of(source.base), f"'{source.base.path}'", source.base.architecture)
        report.compared += compare(adapter.tensors, again.tensors, path)
        return
    values = {name: again.tensors.tensor(name) for name in again.tensors.names}
    report.compared += len(values)


def _compare_book(adapter: StoredAdapter, source: AdapterSource, path: Path, report: Report) -> None:
    """The base is bitwise identical; of the adapters, which may be split otherwise, the products are equal."""
    base = source.base
    assert base is not None
    assert base.config is not None
    known = format_named("book", base)
    needed = known.target.settings if known is not None and known.target is not None else ()
    opened = open_any(
        path, settings={name: base.config[name] for name in needed if name in base.config}, complete=False
    ).checkpoint
    again = stored_adapter(opened, adapter.config.scaling_of(adapter.layers[0]))
    assert again is not None
    assert again.base is not None
    report.compared += compare(base.model, again.base.model, path)
    again = fitted(again, weights_of(base), f"'{base.path}'", base.architecture)
    for layer in linear_layers(base):
        one, other = (_product(each, layer) for each in (adapter, again))
        if float((one - other).abs().max()) > _FAR * max(1.0, float(one.abs().max())):
            raise CheckpointError(f"'{path}' was written and removed again: its adapter of {layer} is not the source's.")
        report.compared += 1
        if bool((one != other).any()):
            report.rounded = "the base bitwise identical, each adapter's product equal"


def _product(adapter: StoredAdapter, layer: str) -> torch.Tensor:
    if layer not in adapter.layers:
        return torch.zeros((), dtype=torch.float64)
    a, b = (adapter.tensors.tensor(f"{layer}.{each}").double() for each in (A, B))
    product: torch.Tensor = b @ a
    return adapter.config.scaling_of(layer) * product
