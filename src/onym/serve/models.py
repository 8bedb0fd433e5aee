"""The models that are served: by name, opened when they are needed, replaced when a run has a newer step.

A name is one that was given at the start, or a run of the folder of runs; ``RUN@STEP`` is a step of it. Names come from
clients, so they are looked up among those that are there, and no path is ever made of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onym.checkpoint.steps import CHECKPOINTS, step_folder, steps
from onym.data.chat_template import ChatTemplate
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, ConfigError, OnymError, StorageError, is_out_of_memory, nearest
from onym.generation.chat import template_of_model
from onym.generation.engine import Engine
from onym.generation.opening import find_model
from onym.generation.ways import Compile, Dtype
from onym.generation.write import Writer
from onym.serve.errors import ApiError
from onym.serve.run_folders import ServedRuns
from onym.serve.threads import in_own_thread
from onym.serve.worker import Worker
from onym.storage.paths import as_path, is_local
from onym.train.run_folder import DESCRIPTION

MOST_OPENED = 4
"""Models that were opened on demand and stay in memory, besides those that were given at the start."""
FOLLOWED_EVERY = 1.0
"""Seconds between two looks for a newer step."""
_STEPS = 5_000  # that a server is expected to compute for a model: compiling pays where a step takes 11 ms or more
_LOG = logging.getLogger("onym.serve")


@dataclass(frozen=True)
class Source:
    """Where a model is."""

    path: Path
    step: int | str = "latest"
    run: str | None = None
    """The run's name, where it is one."""


@dataclass(frozen=True)
class Opening:
    """How models are opened."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    slots: int = 8
    dtype: Dtype = "auto"
    compile: Compile = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: Callable[[str], None] = lambda _: None
    """Called with what the user should know: from any thread."""


@dataclass(eq=False)
class ServedModel:
    """A model in memory. One that was replaced ends its texts, and is freed with the last of them."""

    name: str
    source: Source
    writer: Writer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    step: int | None
    parameters: int
    created: int
    """When it was written, in seconds since 1970."""
    used: float = 0.0

    @property
    def context(self) -> int:
        """Tokens that it sees at once."""
        context: int = self.writer.engine.context
        return context


class Models:
    """Those of a server.

    Args:
        worker: the thread that computes.
        sources: models by name, which are opened by :meth:`open_all`.
        runs: of a folder, which are opened when they are asked for.
        opening: how.
    """

    def __init__(self, worker: Worker, sources: Mapping[str, Source], runs: ServedRuns | None, opening: Opening) -> None:
        self._worker, self._sources, self._runs, self._opening = worker, dict(sources), runs, opening
        self._opened: dict[str, ServedModel] = {}
        self._lock = asyncio.Lock()  # one is opened at a time, so that only so many are in memory
        self.ready = False
        """Whether those that were given at the start are in memory."""

    @property
    def any(self) -> bool:
        """Whether there is anything that could write a text."""
        return bool(self._sources or self._runs)

    @property
    def opened(self) -> list[ServedModel]:
        """Those in memory."""
        return list(self._opened.values())

    async def open_all(self, *, wait_for_steps: bool) -> None:
        """Open the models that were given at the start.

        Args:
            wait_for_steps: a run without a checkpoint is no mistake: :meth:`follow` opens it when there is one.

        Raises:
            OnymError: one cannot be opened.
        """
        for name, source in self._sources.items():
            if wait_for_steps and source.run is not None and not await asyncio.to_thread(_steps_of, source.path):
                self._opening.note(f"'{name}' has no checkpoint yet: it is served when there is one.")
                continue
            await self._open(name, source, expected_tokens=_STEPS)
        self.ready = True

    async def get(self, name: str | None) -> ServedModel:
        """The model of a name; without one, the first.

        Raises:
            ApiError: there is none, or it cannot be opened.
        """
        if name is None:
            if not self._sources:
                raise ApiError(400, "model is missing: GET /v1/models lists the models of this server.", param="model")
            name = next(iter(self._sources))
        if (opened := self._opened.get(name)) is None:
            if not self.ready and name in self._sources:
                raise ApiError(503, "The model is being loaded. Try again in a few seconds.", headers={"Retry-After": "2"})
            source = await asyncio.to_thread(self._find, name)
            async with self._lock:
                opened = self._opened.get(name) or await self._open_on_demand(name, source)
        opened.used = time.monotonic()
        return opened

    async def listed(self) -> list[dict[str, Any]]:
        """What ``/v1/models`` answers."""
        runs = await asyncio.to_thread(_runs_in, self._runs) if self._runs is not None else {}
        shown = {name: _shown(name, self._opened.get(name), source) for name, source in self._sources.items()}
        for name, path in runs.items():
            shown.setdefault(name, _shown(name, self._opened.get(name), Source(path, run=name)))
        return list(shown.values())

    async def follow(self) -> None:
        """Replace models of runs when a newer step is there, for as long as this runs."""
        tried: dict[str, int] = {}
        while True:
            await asyncio.sleep(FOLLOWED_EVERY)
            for name, source in {**{each.name: each.source for each in self.opened}, **self._sources}.items():
                if source.run is None or source.step != "latest":
                    continue
                try:
                    await self._renew(name, source, tried)
                except Exception as error:  # being deleted, damaged, or too large beside the one in memory, which stays
                    _LOG.warning("'%s' stays as it is: %s", name, error)

    async def _renew(self, name: str, source: Source, tried: dict[str, int]) -> None:
        newest = (await asyncio.to_thread(_steps_of, source.path) or [-1])[-1]
        if newest <= tried.get(name, -1):
            return
        tried[name] = newest  # one that is damaged is not tried again: an older one would be found each time
        async with self._lock:
            before = self._opened.get(name)
            if (before is None and name not in self._sources) or (before and before.step is not None and before.step >= newest):
                return
            opened = await self._open(name, source, expected_tokens=_STEPS if name in self._sources else 0)
            if before is not None:
                opened.used = before.used
            if before is None or opened.step != before.step:
                self._opening.note(f"'{name}' is now step {opened.step}.")

    async def _open_on_demand(self, name: str, source: Source) -> ServedModel:
        is_run = source.run is not None and source.step == "latest" and source.path.is_dir()  # else it was deleted just now
        if is_run and not await asyncio.to_thread(_steps_of, source.path):
            raise ApiError(503, f"{name!r} has no checkpoint yet. Try again later.", headers={"Retry-After": "10"})
        on_demand = [each for key, each in self._opened.items() if key not in self._sources]
        for each in sorted(on_demand, key=lambda model: model.used)[: max(0, len(on_demand) + 1 - MOST_OPENED)]:
            del self._opened[each.name]
        try:
            return await self._open(name, source)
        except Exception as error:
            if is_out_of_memory(error):
                _LOG.warning("%r cannot be opened: %s", name, error)
                raise ApiError(
                    503, f"There is no memory for {name!r} now. Try again later.", param="model", headers={"Retry-After": "5"}
                ) from error
            if not isinstance(error, OnymError):
                raise
            # It names paths of this machine.
            _LOG.warning("%r cannot be served: %s", name, error)
            status, code = (404, "model_not_found") if isinstance(error, CheckpointError) else (500, None)
            raise ApiError(
                status, f"{name!r} cannot be opened; the server's log says why. Choose another model.", param="model", code=code
            ) from error

    def _find(self, name: str) -> Source:
        if (source := self._known(name)) is not None:
            return source
        base, at, step = name.rpartition("@")
        source = self._known(base) if at else None
        if source is not None and source.run is not None and step in map(str, _steps_of(source.path)):
            return Source(source.path, int(step), source.run)
        known = [*self._sources, *(self._runs.all() if self._runs is not None else ())]
        raise ApiError(
            404,
            f"There is no model {name!r}{nearest(name, known)}: GET /v1/models lists those of this server.",
            param="model",
            code="model_not_found",
        )

    def _known(self, name: str) -> Source | None:
        """What a name without a step is; None where there is nothing of it."""
        if name in self._sources or self._runs is None:
            return self._sources.get(name)
        run = self._runs.all().get(name)
        if run is None:
            return None
        inside = self._runs.leads_out(run) is None
        if not inside or not all(self._runs.is_inside(step_folder(run.checkpoints, step)) for step in _steps_of(run.path)):
            raise ApiError(403, f"{name!r} is not served: a link in it leads out of the folder that is served.", param="model")
        return Source(run.path, run=name)

    async def _open(self, name: str, source: Source, expected_tokens: int = 0) -> ServedModel:
        how = self._opening

        def read() -> tuple[Any, ...]:
            found = find_model(
                source.path, step=source.step, settings=how.settings, tokenizer=how.tokenizer, only_missing=True, note=how.note
            )
            opened = found.load(how.device)
            template = (
                template_of_model(found.checkpoint, found.tokenizer)
                if how.chat_template is None
                else ChatTemplate.named(how.chat_template, found.tokenizer)
            )
            return opened.model, found.tokenizer, template, found.checkpoint

        model, tokenizer, template, checkpoint = await in_own_thread(read)
        parameters = sum(weight.numel() for weight in model.parameters())
        arranged: dict[str, Any] = {
            "slots": how.slots,
            "dtype": how.dtype,
            "compile": how.compile,
            "expected_tokens": expected_tokens,
        }
        engine = await self._worker.call(lambda: Engine(model, **arranged, note=how.note))
        path = as_path(checkpoint.path)
        created = int(path.stat().st_mtime) if is_local(path) else 0
        step = checkpoint.manifest.step if checkpoint.manifest is not None and source.run is not None else None
        served = ServedModel(
            name, source, Writer(engine, tokenizer), tokenizer, template, step, parameters, created, time.monotonic()
        )
        self._opened[name] = served
        return served


def named(given: str) -> tuple[str | None, str]:
    """``NAME=PATH`` in its parts; of a path alone, no name.

    >>> named("small=runs/first"), named("runs/first")
    (('small', 'runs/first'), (None, 'runs/first'))
    """
    name, equals, path = given.partition("=")
    return (name, path) if equals and re.fullmatch(r"[\w.-]+", name) else (None, given)


def source_of(path: str) -> Source:
    """What a path names, ``PATH@STEP`` a step of a run.

    Raises:
        ConfigError: there is nothing at the path.
    """
    where, at, step = path.rpartition("@")
    base = as_path(path)
    if at and step.isdecimal() and not base.exists():
        base = as_path(where)
        return Source(base, int(step), base.name)
    if is_local(base) and not base.exists():
        raise ConfigError(f"There is nothing at '{path}': name a run, a checkpoint, a model's folder or file.")
    is_run = (base / CHECKPOINTS).is_dir() or (base / DESCRIPTION).is_file()
    return Source(base, "latest", base.name if is_run else None)


def _shown(name: str, opened: ServedModel | None, source: Source) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": opened.created if opened else 0,
        "owned_by": "onym",
        "max_model_len": opened.context if opened else None,
        "step": opened.step if opened else None,
        "chat": opened.template is not None if opened else None,
        "parameters": opened.parameters if opened else None,
        "loaded": opened is not None,
        "run": source.run,
    }


def _steps_of(run: Path) -> list[int]:
    return steps(run / CHECKPOINTS) if (run / CHECKPOINTS).is_dir() else []


def _runs_in(served: ServedRuns) -> dict[str, Path]:
    """The runs that have a step, by name, the newest first."""
    found = {name: run.checkpoints for name, run in served.all().items() if served.leads_out(run) is None}
    ages: dict[str, float] = {}
    for name, folder in found.items():
        with contextlib.suppress(OSError, StorageError):  # deleted just now
            if folder.is_dir() and steps(folder):
                ages[name] = folder.stat().st_mtime
    return {name: found[name].parent for name in sorted(ages, key=lambda name: -ages[name])}
