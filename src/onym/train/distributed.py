"""The processes of one training: the share of each, and what they agree upon.

Each has the whole model and its own sequences of a batch. Nothing is wrapped around the model: a gradient is averaged over the
processes as soon as the backward pass has made it, by a hook of its parameter, while the pass goes on. With the same batch on
all of them, what is done with loss, gradient and weights is the same everywhere, bit for bit, so only what comes from outside
has to be agreed upon: a signal, the clock, what the disk said.

They meet through what ``torchrun`` puts into the environment; ``onym train --processes`` does so too (:mod:`.launch`).
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

from onym.errors import ConfigError, OnymError, RunError
from onym.state.collectives import raise_on_all_ranks

T = TypeVar("T")

LAUNCHER = "ONYM_LAUNCHER"
"""In the environment of a process that ``--processes`` started: the launcher's process id. It tells of a process that died."""
_ERRORS = "onym/errors"
_LINGERING_SECONDS = 2.0
_ASKING_SECONDS = 5.0
_PATIENCE_FOR_OTHERS = 20.0
_SMALL = 1 << 16  # numbers; smaller gradients are sent together


@dataclass(frozen=True)
class DistContext:
    """This process among those of its training."""

    number: int = 0
    count: int = 1
    on_this_machine: int = 0
    """Its number among those of this machine."""
    store: Any = field(default=None, compare=False)
    came: dict[str, int] = field(default_factory=dict, compare=False)
    """How often this process came to a place."""

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and talks."""
        return self.number == 0

    def largest(self, value: int) -> int:
        """Of what all have; each has to call this."""
        if self.count == 1:
            return value
        values = torch.tensor([value], dtype=torch.int64, device="cpu")
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def mean(self, value: Tensor) -> Tensor:
        """Over all of them, of a 0-d tensor; each has to call this. Nobody waits for a GPU."""
        if self.count == 1:
            return value
        value = value.detach().float().clone()
        dist.all_reduce(value)
        return value / self.count

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Do the same in all of them; where one fails, all do.

        Raises:
            OnymError: its own, or another one's.
        """
        result, failure = _tried(work)
        raise_on_all_ranks(failure, error=RunError)
        return result[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """The first process of each machine does it, then the others: what it left in a cache is there then.

        Raises:
            OnymError: as :meth:`all_or_none`.
        """
        if self.count == 1:
            return work()
        result: list[T] = []
        failure: OnymError | None = None
        if self.on_this_machine == 0:
            result, failure = _tried(work)
        raise_on_all_ranks(failure, error=RunError)
        return result[0] if result else work()

    def all_come(self, where: str) -> bool:
        """Whether the others come to the same place within some seconds: where they may wait for something that never comes."""
        self.came[where] = self.came.get(where, 0) + 1
        key, wanted = f"onym/{where}", self.came[where] * self.count
        self.store.add(key, 1)
        until = time.monotonic() + _PATIENCE_FOR_OTHERS
        while int(self.store.add(key, 0)) < wanted:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def tells(self, on_each_machine: bool = False) -> bool:
        """Whether this process is to tell of an error: the first one that asks.

        Args:
            on_each_machine: the first one of its machine. What is told on another one does not reach whoever looks at this one.
        """
        if self.store is None:
            return self.first
        answer: list[bool] = []

        def ask() -> None:
            with suppress(Exception):
                asked = [int(self.store.add(key, 1)) for key in (_ERRORS, f"{_ERRORS}/{self.number - self.on_this_machine}")]
                answer.append(asked[on_each_machine] == 1)

        # The store may be another machine's, and would be waited for without an end where nothing comes from there.
        asking = threading.Thread(target=ask, name="onym-tells", daemon=True)
        asking.start()
        asking.join(_ASKING_SECONDS)
        if not answer:  # it was another process's, which has gone (that one has told, on its machine), or cannot be reached
            return self.on_this_machine == 0 and LAUNCHER not in os.environ
        with suppress(Exception):
            until = time.monotonic() + _LINGERING_SECONDS
            while self.first and int(self.store.add(_ERRORS, 0)) < self.count and time.monotonic() < until:
                time.sleep(0.01)  # the store is in this process: the others are to find it
        return answer[0]

    def leave(self) -> None:
        """Part in peace."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _tried(work: Callable[[], T]) -> tuple[list[T], OnymError | None]:
    try:
        return [work()], None
    except OnymError as error:
        return [], error


def launched() -> bool:
    """Whether something started this process as one of several; many a container says that it is one of one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join(device: str, patience_seconds: float) -> tuple[DistContext, str]:
    """Meet the other processes, if there are any.

    Args:
        device: as it was asked for.
        patience_seconds: after which a process that does not answer is given up.

    Returns:
        This process among them, and the device that it computes on.

    Raises:
        ConfigError, RunError: the environment says nothing of where to meet, or they do not come.
    """
    if not launched():
        return DistContext(), device
    try:
        number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_RANK", "0"))
        where = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT'])}"
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, so this is one of several processes, but {error} is missing or no number: "
            "start it with torchrun or --processes, or unset them."
        ) from error
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if cuda:
        if here >= torch.cuda.device_count():
            raise ConfigError(f"Process {here} of this machine has no GPU of its own: there are {torch.cuda.device_count()}.")
        torch.cuda.set_device(here)
        device = f"cuda:{here}"
    patience = timedelta(seconds=patience_seconds)
    try:
        store, _, _ = next(rendezvous("env://", timeout=patience))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store = PrefixStore(f"onym-{_name_of_meeting(store, number, count, patience_seconds)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"Process {number} of {count} did not meet the others at {where}: {str(error).splitlines()[0][:160]}."
        ) from error
    return DistContext(number, count, here, store), device


def _name_of_meeting(store: Any, number: int, count: int, patience_seconds: float) -> str:
    """One that all of them have, and that no earlier meeting had.

    torchrun keeps its store from one start to the next, with what those that are dead by now have left in it. Its count of
    restarts does not tell them apart: each machine counts by itself, and only what has failed on it.
    """
    mine = secrets.token_hex(8)
    if number:
        store.set(f"onym/here/{number}", mine)
        name: str = store.get(f"onym/meeting/{mine}").decode()  # only somebody who lives can answer to this
        store.set(f"onym/{name}/{number}", "")
        return name
    missing, until = set(range(1, count)), time.monotonic() + patience_seconds
    while missing:
        for each in sorted(missing):
            if store.check([f"onym/{mine}/{each}"]):
                missing.remove(each)
            elif store.check([f"onym/here/{each}"]):  # or it was there in an earlier meeting
                store.set(f"onym/meeting/{store.get(f'onym/here/{each}').decode()}", mine)
        if time.monotonic() > until:
            raise RuntimeError(f"process {min(missing)} is not there")
        time.sleep(0.01)
    return mine


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process has gone, or does not answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    words = (
        "connection closed by peer",
        "connection reset by peer",
        "timed out waiting",
        "gloo",
        "broken pipe",
        "socket timeout",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def reason_of(error: BaseException) -> str:
    """What torch says of a lost connection, without the place in its source."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).split(". ")[0][:120].rstrip(".")


class GradientAllReduce:
    """Averages gradients over the processes while the backward pass makes them.

    Args:
        model: of the same weights in all of them.
        ranks: with one process, nothing is done.
    """

    def __init__(self, model: nn.Module, ranks: DistContext) -> None:
        self._count = ranks.count
        self._on = False
        self._large: list[tuple[Any, Tensor]] = []
        self._small: list[nn.Parameter] = []
        if ranks.count > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
                parameter.register_post_accumulate_grad_hook(self._made)

    def begin(self) -> None:
        """The next backward pass is the last one of the step."""
        self._on = self._count > 1

    def finish(self) -> None:
        """Return when all of them are averages (on a GPU: when what follows will see them)."""
        if not self._on:
            return
        self._on = False
        gradients = []
        if self._small:
            parts = [parameter.grad for parameter in self._small]
            together = torch.cat([part.flatten() for part in parts if part is not None])
            dist.all_reduce(together)
            at = 0
            for part in parts:
                assert part is not None
                part.copy_(together[at : at + part.numel()].view_as(part))
                at += part.numel()
                gradients.append(part)
        for work, gradient in self._large:
            work.wait()
            gradients.append(gradient)
        torch._foreach_div_(gradients, float(self._count))
        self._small.clear()
        self._large.clear()

    def _made(self, parameter: Tensor) -> None:
        if not self._on or parameter.grad is None:
            return
        if parameter.numel() < _SMALL:
            assert isinstance(parameter, nn.Parameter)
            self._small.append(parameter)
        else:
            self._large.append((dist.all_reduce(parameter.grad, async_op=True), parameter.grad))
