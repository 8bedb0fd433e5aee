"""A GGUF file of llama.cpp's: metadata, and tensors in the dtypes that its engine computes with.

The header is made by llama.cpp's own package ``gguf``; tensors follow one by one, some rows at a time, so that a file needs no
more memory than its largest tensor. Written durably, and read back with the package's reader. Knows no model: names, metadata
and which tensors are rounded are the adapter's.

Source: docs/gguf.md in ggml's repository, and ``convert_hf_to_gguf.py`` in llama.cpp's.
"""

from __future__ import annotations

import importlib
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onym.errors import CheckpointError, ConfigError, storage_error
from onym.format.safetensors import as_bytes
from onym.format.tensor_writing import Progress
from onym.format.tensors import TensorFile
from onym.format.writer import MARGIN_BYTES
from onym.storage.paths import storage_of

_CHUNK = 1 << 20  # elements that are rounded and written at a time
_BLOCK = 32  # elements that share a scale in the quantised dtypes
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LEVELS = {"Q8_0": 127, "Q5_0": 16, "Q4_0": 8, "Q5_1": 31, "Q4_1": 15}
"""Steps from zero to a block's largest value; in the last two, from its least to its largest."""
DTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What ``--dtype`` takes, the widest first."""


def package() -> Any:
    """The module ``gguf``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError("Writing a GGUF file needs llama.cpp's package gguf: pip install 'onym[gguf]'.") from error


def dtype_of(tensors: TensorFile) -> str:
    """The dtype for a file where nobody names one: what most of the source's values have, f32 where GGUF's engine lacks it."""
    sizes: Counter[str] = Counter()
    for name, kind in tensors.dtypes.items():
        sizes[kind] += math.prod(tensors.shapes[name])
    return {"float16": "f16", "bfloat16": "bf16"}.get(sizes.most_common(1)[0][0], "f32")


@dataclass(frozen=True)
class Plan:
    """In which dtype each tensor is stored."""

    kinds: Mapping[str, str]
    """By name: F32, F16, BF16, Q8_0 …"""
    notes: list[str]
    """What is not as ``--dtype`` says, in sentences."""


def plan(tensors: TensorFile, dtype: str, exact: Collection[str] = (), head: str = "") -> Plan:
    """Choose dtypes as llama.cpp's tools do.

    Vectors (norms, biases) stay F32, which the engine requires. A matrix whose rows are no multiple of a block stays F16.

    Args:
        tensors: to be written.
        dtype: one of :data:`DTYPES`.
        exact: matrices that stay F32 too.
        head: the matrix that logits are made with, which no dtype narrower than Q8_0 is chosen for: llama.cpp's own quantiser
            gives it a wider one (Q6_K) too.

    Raises:
        ConfigError: the dtype needs blocks, and no matrix has such rows.
    """
    wanted, kinds, unfit = dtype.upper(), dict[str, str](), list[str]()
    for name in tensors.names:
        shape = tensors.shapes[tensors.aliases.get(name, name)]
        if len(shape) < 2 or name in exact:
            kinds[name] = "F32"
        elif wanted in _LEVELS and shape[-1] % _BLOCK:
            kinds[name] = "F16"
            unfit.append(name)
        else:
            kinds[name] = "Q8_0" if name == head and wanted in _LEVELS else wanted
    notes = []
    if unfit:
        width = tensors.shapes[tensors.aliases.get(unfit[0], unfit[0])][-1]
        if wanted not in kinds.values():
            raise ConfigError(
                f"--dtype {dtype} stores blocks of {_BLOCK} numbers, and no matrix of this model has rows that they divide "
                f"({unfit[0]} has {width}): take f16, bf16 or f32."
            )
        notes.append(
            f"{len(unfit)} matrices stay F16, because blocks of {_BLOCK} do not divide their rows: {unfit[0]} has {width}."
        )
    if kinds.get(head, wanted) != wanted and head not in unfit:
        notes.append(f"{head} is stored as Q8_0: the head is what a narrower dtype harms most.")
    return Plan(kinds, notes)


class GGUFFile:
    """A file that is to be written at a path that is free.

    Args:
        tensors: under the names of the file.
        kinds: the dtype of each, as :func:`plan` gives them.
        architecture: ``general.architecture``.
        metadata: called with the package's ``GGUFWriter``, on which it sets the rest.
    """

    def __init__(
        self, tensors: TensorFile, kinds: Mapping[str, str], architecture: str, metadata: Callable[[Any], None]
    ) -> None:
        self._gguf = package()
        self.tensors, self.kinds = tensors, kinds
        writer = self._gguf.GGUFWriter(None, architecture)
        metadata(writer)
        self._sizes: dict[str, int] = {}
        for name, kind in kinds.items():
            shape = tensors.shapes[tensors.aliases.get(name, name)]
            block, nbytes = self._gguf.GGML_QUANT_SIZES[self._kind(kind)]
            self._sizes[name] = math.prod(shape) // block * nbytes
            writer.add_tensor_info(name, shape, "float32", self._sizes[name], raw_dtype=self._kind(kind))
        self._alignment: int = writer.data_alignment
        content = io.BytesIO()
        writer.fout, writer.state = [content], self._gguf.gguf_writer.WriterState.EMPTY  # not a file that it opens itself
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        self._header = self._padded(content.getvalue())

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self._header) + sum(size + self._gap(size) for size in self._sizes.values())

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """Write it, durably: it appears when it is complete.

        Raises:
            CheckpointError: a value does not fit the dtype.
            StorageError: the disk refused.
        """
        with storage_of(path).new_file(path, self.nbytes + MARGIN_BYTES) as file:
            file.write(self._header)
            for name, size in self._sizes.items():
                for values in _rows(self.tensors.tensor(name, verify=False)):
                    data = self._encoded(name, values)
                    file.write(data)
                    if progress is not None:
                        progress(len(data))
                if gap := self._gap(size):
                    file.write(bytes(gap))

    def compare(self, path: Path) -> str:
        """Read the file back, and compare it with what it was made from.

        Returns:
            How they compare, in words that follow "26 tensors read back, ".

        Raises:
            CheckpointError: something differs that rounding does not explain.
        """
        worst = ("", 0.0, 0.0)  # of the quantised ones: name, how far apart, largest value
        try:
            with path.open("rb") as file:
                if file.read(len(self._header)) != self._header:
                    raise CheckpointError(f"'{path}' was written and removed again: its metadata is not what was written")
                stored = {tensor.name: tensor for tensor in self._gguf.GGUFReader(path).tensors}
                for name, kind in self.kinds.items():
                    file.seek(int(stored[name].data_offset))
                    apart, largest = self._apart(name, kind, file, path)
                    if apart * worst[2] >= worst[1] * largest and kind in _LEVELS:
                        worst = (name, apart, largest)
        except OSError as error:
            raise storage_error("read", path, error) from error
        return self._said(*worst)

    def _apart(self, name: str, kind: str, file: io.BufferedReader, path: Path) -> tuple[float, float]:
        """How far the values of a tensor are from the source's where it is quantised, and the source's largest."""
        apart = largest = 0.0
        for values in _rows(self.tensors.tensor(name, verify=False)):
            if kind in _PLAIN:
                wanted = self._encoded(name, values)
                if file.read(len(wanted)) != wanted:
                    raise CheckpointError(f"'{path}' was written and removed again: its {name} is not the source's")
                continue
            block, nbytes = self._gguf.GGML_QUANT_SIZES[self._kind(kind)]
            data = torch.frombuffer(bytearray(file.read(values.numel() // block * nbytes)), dtype=torch.uint8)
            back = torch.from_numpy(self._gguf.quants.dequantize(data.view(len(values), -1).numpy(), self._kind(kind)))
            blocks = values.float().reshape(-1, block)
            distance = (back.view(-1, block) - blocks).abs()
            if not bool((distance <= _step(blocks, kind)).all()):
                raise CheckpointError(
                    f"'{path}' was written and removed again: values of {name} are further from the source's than a step of "
                    f"{kind}. Take a wider --dtype"
                )
            apart = max(apart, float(distance.max()))
            largest = max(largest, float(blocks.abs().max()))
        return apart, largest

    def _said(self, name: str, apart: float, largest: float) -> str:
        counted = Counter(self.kinds.values())
        exact = [f"{count} as {kind}" for kind, count in counted.items() if kind in _PLAIN]
        said = [f"{' and '.join(exact)}, bitwise identical to the source cast to that"] if exact else []
        said += [f"{count} within a step of {kind}" for kind, count in counted.items() if kind not in _PLAIN]
        if name:
            said.append(f"the furthest, {name}, by up to {apart:.2g} where its values reach {largest:.2g}")
        return "; ".join(said)

    def _encoded(self, name: str, values: Tensor) -> Any:
        """Rows of a tensor as the file has them: bytes, or a view of memory."""
        kind = self.kinds[name]
        if kind in _PLAIN:
            narrow = values.to(_PLAIN[kind]).contiguous()
            if narrow.dtype != values.dtype and not bool((narrow.isfinite() | ~values.isfinite()).all()):
                raise CheckpointError(
                    f"{name} in '{self.tensors.path}' has a value of {float(values.abs().max()):.3g}, which {kind} cannot "
                    "hold: take --dtype bf16 or f32."
                )
            return as_bytes(narrow).numpy().data
        wide = values.float().contiguous()
        if not bool(wide.isfinite().all()):
            raise CheckpointError(
                f"{name} in '{self.tensors.path}' has values that are not finite (NaN or inf), which {kind} cannot hold."
            )
        return self._gguf.quants.quantize(wide.numpy(), self._kind(kind)).tobytes()

    def _kind(self, kind: str) -> Any:
        return self._gguf.GGMLQuantizationType[kind]

    def _gap(self, size: int) -> int:
        return -size % self._alignment

    def _padded(self, data: bytes) -> bytes:
        return data + bytes(self._gap(len(data)))


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as matrices of some rows each."""
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
    yield from matrix.split(max(1, _CHUNK // max(1, matrix.shape[1])))


def _step(blocks: Tensor, kind: str) -> Tensor:
    """How far a quantised value may be from its own, for each block: a step of its scale, and what a scale in F16 loses."""
    levels = _LEVELS[kind]
    if kind.endswith("_0"):
        step = blocks.abs().amax(1, keepdim=True) / levels
        least = torch.zeros_like(step)
    else:
        least = blocks.amin(1, keepdim=True)
        step = (blocks.amax(1, keepdim=True) - least) / levels
    # F16 has 11 bits, and below 6e-5 steps of 6e-8
    return step * (1 + levels / 2048) + least.abs() / 2048 + (levels + 1) * 2.0**-24
