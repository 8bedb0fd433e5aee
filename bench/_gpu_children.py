"""What bench/gpu.py's child processes do: each has one program ready, and computes only while it is asked to.

The parent's request is an argument; then it writes a line of JSON for each turn, and every answer is a line of JSON:

    {"ready": …}     once it is built, compiled and warm
    {…}              of a turn
    {"failed": why}  and the process ends

It ends when its standard input does, so no process remains however the parent ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _generating_peers
import _training_peers as peers
from _measure import begin_peak, peak_mib
from _training_peers import Setting, Trainee
from onym.errors import is_out_of_memory
from onym.train.fresh_process import answering

OUT_OF_MEMORY = "out of memory"
WARM_UP = 2  # steps after the first one, which compiles and allocates

GPT2: dict[str, Callable[[Setting], Trainee]] = {
    "onym": peers.onym,
    "onym, by default": lambda setting: peers.onym(setting, optimizer="auto"),
    "nanoGPT's recipe": peers.nanogpt,
    "transformers": peers.transformers,
    "the book, optimised": peers.book_optimised,
}
DECODERS: dict[str, Callable[[Setting], Trainee]] = {
    "onym, llama": lambda setting: peers.onym(setting, arch="llama"),
    "onym, qwen3": lambda setting: peers.onym(setting, arch="qwen3"),
    "transformers, Llama": lambda setting: peers.transformers_decoder(setting, "Llama"),
    "transformers, Qwen3": lambda setting: peers.transformers_decoder(setting, "Qwen3"),
}
TABLES = {"gpt2": GPT2, "decoder": DECODERS}


@dataclasses.dataclass(frozen=True)
class Common:
    """What all children are told."""

    device: str
    dtype: str
    """That products are computed in: bfloat16 or float32."""
    tiny: bool
    eager: bool
    """Nothing is compiled."""
    batch: int
    """Sequences in a training step."""

    def setting(self) -> Setting:
        """What trains."""
        shape = {"vocab_size": 50304, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
        gated = {"hidden_dim": 2304, "n_kv_groups": 6}  # of onym's preset small: 124M too
        if self.tiny:
            shape = {"vocab_size": 512, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
            gated = {"hidden_dim": 64, "n_kv_groups": 1}
        dtype = getattr(torch, self.dtype)
        return Setting(shape, gated, self.batch, torch.device(self.device), dtype, not self.eager, compiles_loss=True)


class Device:
    """Where it computes, with the memory that it takes there: of the whole process on a CPU."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        if self.torch.index is not None and self.is_cuda:
            torch.cuda.set_device(self.torch)

    def wait(self) -> None:
        """Until all is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def begin_peaks(self) -> None:
        """Count the most memory anew."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)
        else:
            begin_peak()

    def peaks(self) -> dict[str, float]:
        """The most memory since then, in MiB."""
        if not self.is_cuda:
            return {"peak_mib": peak_mib(), "reserved_mib": peak_mib()}
        return {
            "peak_mib": torch.cuda.max_memory_allocated(self.torch) / 2**20,
            "reserved_mib": torch.cuda.max_memory_reserved(self.torch) / 2**20,
        }

    def leave_room(self) -> None:
        """Give memory that is not in use to the other processes."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def milliseconds(self, run: Callable[[], object], times: int) -> float | None:
        """Of one of several runs, by the GPU's own clock; None where there is none."""
        if not self.is_cuda:
            return None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        for _ in range(times):
            run()
        end.record()
        self.wait()
        return float(begin.elapsed_time(end)) / times


class Training:
    """One who trains. All get the same tokens, in pinned memory and ahead of the step, through Onym's prefetcher.

    Args:
        table, name: of :data:`TABLES`.
    """

    def __init__(self, common: Common, table: str, name: str) -> None:
        from onym.data.prefetch import Prefetcher

        torch.manual_seed(0)
        self._device, self._setting = Device(common.device), common.setting()
        self._trainee = TABLES[table][name](self._setting)
        self._batches, self._taken = Prefetcher(self._read, self._device.torch), 0
        began = time.perf_counter()
        self._first_loss = self._steps(1)
        self._compile_s = time.perf_counter() - began
        self._steps(WARM_UP)
        self._device.begin_peaks()

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        shape = self._setting.shape
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(shape["vocab_size"], (self._setting.batch, shape["context_length"] + 1), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _steps(self, count: int) -> float:
        """Take steps, none of which is waited for but the last; its loss."""
        for _ in range(count):
            loss = self._trainee.step(*self._batches.take(self._taken, self._taken + 1))
            self._taken += 1
        self._device.wait()
        return float(loss)

    @property
    def ready(self) -> dict[str, Any]:
        return {"compile_s": self._compile_s, "first_loss": self._first_loss, "note": self._trainee.note()}

    def turn(self, steps: int, number: int) -> dict[str, Any]:
        """Seconds a step. One before them is not counted: it finds cold caches, and memory that it has to allocate."""
        self._steps(1)
        began = time.perf_counter()
        loss = self._steps(steps)
        seconds = (time.perf_counter() - began) / steps
        answer = {"seconds": seconds, "loss": loss, "steps": self._taken, **self._device.peaks()}
        self._device.leave_room()
        return answer


class Saving:
    """Onym's Checkpointer in the background, and a copy of the same tensors into buffers that are there already.

    Args:
        folder: on the disk to write to.
    """

    def __init__(self, common: Common, folder: str) -> None:
        from onym.checkpoint.checkpointer import Checkpointer
        from onym.gpt.models import make_model
        from onym.train.options import OptimizationOptions
        from onym.train.precision import choose_compute
        from onym.train.step import Stepper

        torch.manual_seed(0)
        self._device, setting = Device(common.device), common.setting()
        model = make_model(peers.config_of(setting, "gpt2")).to(self._device.torch)
        options = OptimizationOptions(optimizer="adamw", learning_rate=peers.LEARNING_RATE)
        self._stepper = Stepper(model, options, choose_compute(common.device, "auto"))
        self._stepper.micro_batch = 1
        self._ids = torch.randint(setting.shape["vocab_size"], (1, setting.shape["context_length"]), device=self._device.torch)
        self._taken = self._saved = 0
        self._step()
        self._checkpointer = Checkpointer(Path(folder), keep_last=1)
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._copy()

    def _step(self) -> None:
        self._stepper((self._ids, self._ids), peers.LEARNING_RATE, self._taken)
        self._taken += 1

    def _tensors(self) -> dict[tuple[str, str], Tensor]:
        """All that a save copies, tied ones once."""
        from onym.checkpoint.snapshot import capture
        from onym.format.stored import gather

        content = capture(self._stepper.state, {}).content.tensors
        return {(file, name): each for file, tensors in content.items() for name, each in gather(tensors).tensors.items()}

    def _copy(self) -> float:
        tensors = self._tensors()
        for key, tensor in tensors.items():
            if key not in self._buffers:
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.is_cuda).zero_()
        self._device.wait()
        began = time.perf_counter()
        with torch.no_grad():
            for key, tensor in tensors.items():
                self._buffers[key].copy_(tensor, non_blocking=True)
        self._device.wait()
        return time.perf_counter() - began

    def _save(self) -> float:
        self._device.wait()
        self._saved += 1
        began = time.perf_counter()
        self._checkpointer.save(self._saved, self._stepper.state)
        return time.perf_counter() - began

    @property
    def ready(self) -> dict[str, Any]:
        held = self._buffers.values()
        return {"bytes": sum(each.nbytes for each in held), "tensors": len(held)}

    def turn(self, what: str, number: int) -> dict[str, Any]:
        """Seconds of a ``save`` until it returns, or of a ``copy``; or ``check`` what a save wrote."""
        if what == "copy":
            return {"seconds": self._copy()}
        if what == "check":
            return self._check()
        seconds = self._save()
        self._step()
        began = time.perf_counter()
        self._checkpointer.wait()
        return {"seconds": seconds, "written_after_s": time.perf_counter() - began}

    def _check(self) -> dict[str, Any]:
        """Whether what is on the disk is the state at the call, bit by bit, although steps were taken meanwhile."""
        self._copy()
        self._save()
        for _ in range(3):
            self._step()
        self._checkpointer.wait()
        written = self._checkpointer.open(self._saved)
        equal = {key: _same(written.tensors(key[0]).tensor(key[1]), buffer) for key, buffer in self._buffers.items()}
        before = {key: buffer.clone() for key, buffer in self._buffers.items()}
        self._copy()
        changed = sum(not _same(before[key], buffer) for key, buffer in self._buffers.items())
        different = [f"{file}: {name}" for (file, name), same in equal.items() if not same]
        return {"equal": not different, "different": different[:5], "compared": len(equal), "changed_since": changed}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


DECODING_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"preset": "gpt2-small"},
    "gpt2-medium": {"preset": "gpt2-medium"},
    "gpt2-xl": {"preset": "gpt2-xl"},
}
_TINY = {"vocab_size": 512, "context_length": 64, "emb_dim": 32, "n_heads": 2}


@dataclasses.dataclass
class _Decoder:
    decode: Callable[[list[list[int]], int], _generating_peers.Decoded]
    slots: int
    note: str
    bytes_read: Callable[[], int]
    """By the last decoding."""
    step: Callable[[], object] | None = None
    """One step alone, where it is a CUDA graph."""


class Decoding:
    """Rows of one shape that are decoded by one program.

    Args:
        shape: of :data:`DECODING_SHAPES`.
        rows: by name, each ``{"program": "onym", "way": "off" | "auto" | "on", "dtype": …, "slots": …}`` or
            ``{"program": "transformers", "cache": "dynamic" | "static", "slots": …}``.
        prompt, tokens: lengths.
    """

    def __init__(self, common: Common, shape: str, rows: dict[str, dict[str, Any]], prompt: int, tokens: int) -> None:
        self._common, self._device = common, Device(common.device)
        self._prompt, self._tokens = prompt, tokens
        more: dict[str, Any] = {**_TINY, "n_layers": 1 + list(DECODING_SHAPES).index(shape)} if common.tiny else {}
        from onym.gpt.kinds import config_of

        self._config = config_of("gpt2", **DECODING_SHAPES[shape], **more)
        self._decoders: dict[str, _Decoder] = {}
        self._failed: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        makers: dict[str, Callable[..., _Decoder]] = {"onym": self._onym, "transformers": self._transformers}
        for name, row in rows.items():
            began = time.perf_counter()
            try:
                torch.manual_seed(0)
                options = {key: value for key, value in row.items() if key != "program"}
                self._decoders[name] = makers[row["program"]](**options)
                for number in range(3 if row.get("cache") == "static" else 1):  # which compiles, records, and then replays
                    self.turn(name, number=number)
            except Exception as error:  # one row alone is lost
                traceback.print_exc()
                self._decoders.pop(name, None)
                self._failed[name] = reason_of(error)
            self._seconds[name] = time.perf_counter() - began
            self._device.leave_room()
        if not self._decoders and set(self._failed.values()) == {OUT_OF_MEMORY}:
            raise MemoryError(OUT_OF_MEMORY)

    @contextlib.contextmanager
    def _narrow_and_there(self) -> Iterator[None]:
        """Models made in here have their weights in the dtype and on the device at once."""
        torch.set_default_dtype(getattr(torch, self._common.dtype))
        try:
            with self._device.torch:
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    @cached_property
    def _model(self) -> Any:
        from onym.gpt.models import make_model

        with self._narrow_and_there():
            return make_model(self._config).eval()

    def _onym(self, way: Any, dtype: Any, slots: int) -> _Decoder:
        from onym.generation.engine import Engine

        notes: list[str] = []
        capacity = self._prompt + self._tokens
        engine = Engine(self._model, slots=slots, dtype=dtype, compile=way, capacity=capacity, note=notes.append)
        if way == "on" and not engine.compiled:
            notes.append("not compiled")
        if self._device.is_cuda and way != "off" and not engine.captured:
            notes.append("no CUDA graph")
        step = getattr(engine, "_step_function", None)  # no part of its interface: where it is called otherwise, not timed
        places = torch.zeros(slots, dtype=torch.long)
        replay = (lambda: step(places, places + self._prompt, capacity)) if engine.captured and step is not None else None
        return _Decoder(
            lambda prompts, count: _generating_peers.decode_with_engine(engine, prompts, count),
            slots,
            "; ".join(dict.fromkeys(notes)),
            lambda: engine.bytes_read,
            replay,
        )

    def _transformers(self, cache: str, slots: int) -> _Decoder:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = self._config
        sizes: dict[str, Any] = {"n_embd": config.emb_dim, "n_layer": config.n_layers, "n_head": config.n_heads}
        sizes |= {"vocab_size": config.vocab_size, "n_positions": config.context_length, "bos_token_id": 0, "eos_token_id": 0}
        with self._narrow_and_there():
            model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
        width, middle = model.dtype.itemsize, self._prompt + self._tokens / 2
        held = 2 * config.n_layers * config.emb_dim * width * middle * slots
        mode = None if cache == "dynamic" or self._common.eager else "reduce-overhead" if self._device.is_cuda else "default"
        return _Decoder(
            _generating_peers.transformers_decode(model, cache, mode),
            slots,
            "",
            lambda: round((self._tokens - 1) * (config.multiplied_weights * width + held)),
        )

    @property
    def ready(self) -> dict[str, Any]:
        rows = {name: {"note": each.note, "compile_s": self._seconds[name]} for name, each in self._decoders.items()}
        return {"rows": rows, "failed": self._failed}

    def turn(self, row: str, number: int) -> dict[str, Any]:
        """Decode new prompts, side by side."""
        decoder = self._decoders[row]
        generator = torch.Generator().manual_seed(number)
        prompts = torch.randint(self._config.vocab_size, (decoder.slots, self._prompt), generator=generator).tolist()
        self._device.wait()
        decoded = decoder.decode(prompts, self._tokens)
        self._device.wait()
        gpu_ms = None
        if decoder.step is not None:
            with torch.inference_mode():
                gpu_ms = self._device.milliseconds(decoder.step, 20)
        return {
            "tokens_per_second": decoded.tokens / decoded.decode_s,
            "step_ms": 1e3 * decoded.decode_s * decoder.slots / decoded.tokens,
            "bytes_per_second": decoder.bytes_read() / decoded.decode_s,
            "gpu_ms": gpu_ms,
        }


KINDS: dict[str, Callable[..., Training | Saving | Decoding]] = {"training": Training, "saving": Saving, "decoding": Decoding}


def reason_of(error: BaseException) -> str:
    """In a few words."""
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None and cause is not error:
        error = cause
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"not installed: {error.name}"
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def serve(request: Mapping[str, Any]) -> None:
    """What a child does, to its end."""
    answer = answering()
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the parent has gone; a step or a compilation may be under way

    threading.Thread(target=listen, daemon=True).start()
    try:
        child = KINDS[request["kind"]](Common(**request["common"]), **request["given"])
        answer(ready=child.ready)
        while True:
            answer(**child.turn(**json.loads(lines.get())))
    except Exception as error:  # whatever a program can raise costs its own rows
        traceback.print_exc()
        answer(failed=reason_of(error))
        sys.stderr.flush()
        os._exit(0)
