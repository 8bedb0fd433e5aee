"""The processes of one training: how they meet, what they exchange, and how gradients are all-reduced.

Each process has the model and its own sequences of a batch. No wrapper goes around the model: a hook of each parameter
all-reduces its gradient as soon as the backward pass has made it, while the pass continues. With the same batch on all ranks,
loss, gradient and weights are bitwise identical everywhere, so only what comes from outside has to be exchanged: a signal, the
clock, what the disk answered.

They meet through the environment that ``torchrun`` sets; ``onym train --processes`` sets the same (:mod:`.launch`).
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from onym.errors import ConfigError, RunError
from onym.state.collectives import run_on_all_ranks

T = TypeVar("T")

LAUNCHER = "ONYM_LAUNCHER"
"""In the environment of a process that ``--processes`` started: the launcher's process id. It reports a rank that died."""
_ERRORS = "onym/errors"
_LINGERING_SECONDS = 2.0
_ASKING_SECONDS = 5.0
_ARRIVAL_SECONDS = 20.0
_SMALL = 1 << 16  # elements; smaller gradients are all-reduced together


@dataclass(frozen=True)
class DistContext:
    """This process among those of its training."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its rank among the processes of this machine."""
    store: Any = field(default=None, compare=False)
    """The rendezvous store."""
    arrivals: dict[str, int] = field(default_factory=dict, compare=False)
    """How often this process called :meth:`all_arrive`, by place."""

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """All-reduce with MAX; a collective."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.int64, device="cpu")
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def mean(self, value: Tensor) -> Tensor:
        """All-reduce the mean of a 0-d tensor; a collective that does not wait for a GPU."""
        if self.world_size == 1:
            return value
        value = value.detach().float().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """Do the same on all ranks; where one fails, all of them raise: its own error, or a RunError. A collective."""
        return run_on_all_ranks(work, error=RunError)

    def local_rank0_first(self, work: Callable[[], T]) -> T:
        """Local rank 0 of each machine does it, then the others, which find its result in a cache. A collective."""
        if self.local_rank == 0:
            return self.on_all_ranks(work)
        self.on_all_ranks(lambda: None)
        return work()

    def all_arrive(self, place: str) -> bool:
        """Whether all ranks call this for ``place`` within some seconds: a barrier for where one may never come.

        Uses the rendezvous store, because the other ranks may be waiting inside a collective.
        """
        self.arrivals[place] = self.arrivals.get(place, 0) + 1
        key, wanted = f"onym/{place}", self.arrivals[place] * self.world_size
        self.store.add(key, 1)
        until = time.monotonic() + _ARRIVAL_SECONDS
        while int(self.store.add(key, 0)) < wanted:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def reports_error(self, on_each_machine: bool = False) -> bool:
        """Whether this process prints an error that several may have: the first one that asks.

        Args:
            on_each_machine: the first one of its machine. A user at one machine does not see what another one prints.
        """
        if self.store is None:
            return self.is_rank0
        answer: list[bool] = []

        def ask() -> None:
            with suppress(Exception):
                asked = [int(self.store.add(key, 1)) for key in (_ERRORS, f"{_ERRORS}/{self.rank - self.local_rank}")]
                answer.append(asked[on_each_machine] == 1)

        # A thread: the store may be on another machine, and a call to it would block forever where that one is gone.
        asking = threading.Thread(target=ask, name="onym-reports-error", daemon=True)
        asking.start()
        asking.join(_ASKING_SECONDS)
        if not answer:  # the process with the store is gone (it has printed, on its machine), or cannot be reached
            return self.local_rank == 0 and LAUNCHER not in os.environ
        with suppress(Exception):
            until = time.monotonic() + _LINGERING_SECONDS
            while self.is_rank0 and int(self.store.add(_ERRORS, 0)) < self.world_size and time.monotonic() < until:
                time.sleep(0.01)  # the store is in this process: the others still have to ask it
        return answer[0]

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def launched() -> bool:
    """Whether something started this process as one of several; some containers set RANK for a single process."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join(device: str, timeout_seconds: float) -> tuple[DistContext, str]:
    """Meet the other processes, if there are any.

    Args:
        device: as the user asked for it.
        timeout_seconds: after which a rank that does not answer counts as lost.

    Returns:
        This process's context, and the device that it computes on.

    Raises:
        ConfigError, RunError: the environment does not say where to meet, or the others do not come.
    """
    if not launched():
        return DistContext(), device
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        where = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT'])}"
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, so this is one of several processes, but {error} is missing or no number: "
            "start it with torchrun or --processes, or unset them."
        ) from error
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store = PrefixStore(f"onym-{_rendezvous_id(store, rank, world_size, timeout_seconds)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"Process {rank} of {world_size} did not meet the others at {where}: {str(error).splitlines()[0][:160]}."
        ) from error
    return DistContext(rank, world_size, local_rank, store), device


def _rendezvous_id(store: Any, rank: int, world_size: int, timeout_seconds: float) -> str:
    """An id that all ranks have, and that no earlier start had.

    torchrun keeps its store from one start to the next, with what dead processes have left in it. Its count of restarts does
    not tell starts apart: each machine counts by itself, and only its own failures.
    """
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"onym/here/{rank}", mine)
        chosen: str = store.get(f"onym/meeting/{mine}").decode()  # only a rank 0 that is alive answers to this
        store.set(f"onym/{chosen}/{rank}", "")
        return chosen
    missing, until = set(range(1, world_size)), time.monotonic() + timeout_seconds
    while missing:
        for each in sorted(missing):
            if store.check([f"onym/{mine}/{each}"]):
                missing.remove(each)
            elif store.check([f"onym/here/{each}"]):  # from this start, or left by an earlier one
                store.set(f"onym/meeting/{store.get(f'onym/here/{each}').decode()}", mine)
        if time.monotonic() > until:
            raise RuntimeError(f"process {min(missing)} is not there")
        time.sleep(0.01)
    return mine


_LOST = ("connection closed by peer", "connection reset by peer", "timed out waiting", "gloo", "broken pipe", "socket timeout")


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error means that another process is gone, or does not answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)


def reason_of(error: BaseException) -> str:
    """torch's message about a lost connection, without the place in its source."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).split(". ")[0][:120].rstrip(".")


class GradientAllReduce:
    """All-reduces the mean of gradients while the backward pass makes them; large ones each, small ones together.

    Args:
        model: rank 0's parameters are broadcast to all ranks.
        ranks: with a world size of 1, nothing is done.
    """

    def __init__(self, model: nn.Module, ranks: DistContext) -> None:
        self._world_size = ranks.world_size
        self._active = False
        self._large: list[tuple[Any, Tensor]] = []
        self._small: list[Tensor] = []
        if ranks.world_size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
                if not parameter.requires_grad:
                    continue
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def begin(self) -> None:
        """The next backward pass is the last one of the step."""
        self._active = self._world_size > 1

    def finish(self) -> None:
        """Return when all gradients are means (on a GPU: when later kernels will see them)."""
        if not self._active:
            return
        self._active = False
        gradients = list(self._small)
        if self._small:
            flat = torch.cat([gradient.flatten() for gradient in self._small])
            dist.all_reduce(flat)
            for gradient, part in zip(self._small, flat.split([each.numel() for each in self._small]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for work, gradient in self._large:
            work.wait()
            gradients.append(gradient)
        torch._foreach_div_(gradients, float(self._world_size))
        self._small.clear()
        self._large.clear()

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._active or parameter.grad is None:
            return
        if parameter.numel() < _SMALL:
            self._small.append(parameter.grad)
        else:
            self._large.append((dist.all_reduce(parameter.grad, async_op=True), parameter.grad))
