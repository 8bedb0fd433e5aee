"""What this machine is, and what it can do: facts alone, each measured by a function of its own.

What a system does not report is None, never a guess. Where a function reads files of the system it takes the folder that
stands for ``/``, so that the files of another machine can be given. Disks are in :mod:`onym.tools.doctor.disk`, what
``torch.compile`` does here in :mod:`onym.tools.doctor.trial`, and what follows from it all in
:mod:`onym.tools.doctor.diagnosis`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from onym.compile.cache_key import compiler_version
from onym.gpt.hardware import synchronize
from onym.train.metering import documented_peak, matmul_flops

SYSTEM = Path("/")
_EXTRAS = ("tensorboard", "wandb", "pyarrow", "s3fs")
_UNLIMITED = 2**60  # version 1 of cgroups has a number a little below 2^63 where there is no limit
_TURNS = 3
_EMULATED = 1e10  # operations a second; what is slower is not measured twice
_COPIED = 2**27  # bytes; more than any cache holds


@dataclass(frozen=True)
class Limits:
    """What the container, or the batch scheduler's job, may use: the tightest of its cgroups."""

    cores: float | None = None
    """Seconds of computing a second."""
    memory: int | None = None
    """Bytes."""


@dataclass(frozen=True)
class Cores:
    """What computes, without a GPU."""

    processor: str
    logical: int
    """Of the machine."""
    allowed: int
    """Of those, which this process may run on."""
    physical: int
    """Of those again, each counted once however many threads it runs at a time: a product gains nothing by the second."""
    quota: float | None
    threads: int
    """That torch computes with."""

    @property
    def usable(self) -> int:
        """How many threads should compute."""
        return min(self.physical, max(1, int(self.quota))) if self.quota is not None else self.physical

    @property
    def most(self) -> int:
        """From how many threads on they are in each other's way."""
        return min(self.allowed, max(1, round(self.quota))) if self.quota is not None else self.allowed

    @property
    def well_used(self) -> bool:
        """Whether torch computes with neither too few nor too many threads."""
        return self.usable <= self.threads <= self.most


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not report it."""

    total: int | None
    available: int | None
    limit: int | None
    """Of the cgroup, where it is below the machine's memory."""

    @property
    def usable(self) -> int | None:
        """What a training could take."""
        return min((count for count in (self.available, self.limit) if count is not None), default=self.total)


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch computes on."""

    name: str
    memory: int
    capability: str
    documented_flops: float | None
    """Dense bf16 operations a second in the vendor's data sheet, where it is known here."""


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler that ``torch.compile`` takes, and needs on a CPU."""

    command: str | None
    """None where there is none."""
    version: str = ""
    asked_for: str | None = None
    """The environment's CXX."""


@dataclass(frozen=True)
class Versions:
    """What runs here."""

    system: str
    python: str
    torch: str
    cuda: str | None
    """That torch was built for."""
    extras: dict[str, str | None]
    """The optional packages, None for those that are not installed."""


def find_versions() -> Versions:
    """Of Python, torch, and the optional packages."""
    extras: dict[str, str | None] = dict.fromkeys(_EXTRAS)
    for name in _EXTRAS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            extras[name] = importlib.metadata.version(name)
    system = f"{platform.system()} {platform.machine()}"
    return Versions(system, platform.python_version(), torch.__version__, torch.version.cuda, extras)


def find_cores(limits: Limits, system: Path = SYSTEM) -> Cores:
    """How many cores there are, how many may be used, and how many torch uses."""
    logical = os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(logical))
    siblings = {_text(system / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in allowed}
    physical = len(siblings) if None not in siblings else len(allowed)
    named = re.search(r"^model name\s*:\s*(.+)$", _text(system / "proc/cpuinfo") or "", re.MULTILINE)
    processor = named[1] if named else platform.processor() or platform.machine()
    return Cores(processor, logical, len(allowed), physical, limits.cores, torch.get_num_threads())


def find_memory(limits: Limits, system: Path = SYSTEM) -> Memory:
    """The machine's memory, and what of it is free."""
    reported = dict(re.findall(r"^(\w+):\s*(\d+) kB$", _text(system / "proc/meminfo") or "", re.MULTILINE))
    total = int(reported["MemTotal"]) * 1024 if "MemTotal" in reported else None
    available = int(reported["MemAvailable"]) * 1024 if "MemAvailable" in reported else None
    if total is None and sys.platform != "win32":
        with contextlib.suppress(ValueError, OSError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limited = limits.memory is not None and (total is None or limits.memory < total)
    return Memory(total, available, limits.memory if limited else None)


def cgroup_limits(system: Path = SYSTEM) -> Limits:
    """What the cgroups of this process allow, version 1 or 2; each of those above it binds too."""
    cores, memory = [], []
    for folder in _cgroups(system, "cpu"):
        quota, period = [*(_text(folder / "cpu.max") or "").split(), "", ""][:2]
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max", or -1 of version 1, is no limit
            cores.append(int(quota) / int(period))
    for folder in _cgroups(system, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or ""
        if limit.isdecimal() and int(limit) < _UNLIMITED:
            memory.append(int(limit))
    return Limits(min(cores, default=None), min(memory, default=None))


def _cgroups(system: Path, controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, for one controller, each after those in it."""
    mounted = system / "sys/fs/cgroup"
    for line in (_text(system / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2; beside version 1 it is mounted further down
            bases = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            bases = [mounted / controller, mounted / controllers]
        else:
            continue
        # Inside a container the path may be that on the host, and its own cgroup is what is mounted.
        parts = [] if ".." in path else [part for part in path.split("/") if part]
        for base in bases:
            yield from (base.joinpath(*parts[:length]) for length in range(len(parts), -1, -1))


def find_gpus() -> tuple[Gpu, ...]:
    """Those that torch computes on."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        peak = documented_peak(about.name)
        flops = peak.flops if peak is not None else None
        found.append(Gpu(about.name, about.total_memory, f"{about.major}.{about.minor}", flops))
    return tuple(found)


def nvidia_driver(system: Path = SYSTEM) -> str | None:
    """The version of NVIDIA's driver, "unknown" where there is a device alone, None where there is no such GPU."""
    text = _text(system / "proc/driver/nvidia/version")
    if text is None:
        return "unknown" if (system / "dev/nvidia0").exists() else None
    version = re.search(r"\b\d{3,}\.\d[\d.]*", text)
    return version[0] if version else "unknown"


def find_compiler() -> Compiler:
    """Asks torch, so that the answer is what ``torch.compile`` will take."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second, which only this question has to pay

    asked_for = os.environ.get("CXX")
    try:
        command = get_cpp_compiler()
    except (RuntimeError, OSError):  # torch's InvalidCxxCompiler; a CXX that is a folder, or not executable
        return Compiler(None, asked_for=asked_for)
    return Compiler(command, compiler_version(command) or "", asked_for)


def matmul_rates(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Operations a second of matrix products, by dtype; those that the device cannot compute are skipped.

    Args:
        quick: skip fp16 on a CPU: where it is emulated, one product takes seconds.
    """
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if quick and device.type == "cpu":
        del kinds["fp16"]
    rates: dict[str, float] = {}
    for turn in range(_TURNS):  # in turn, so that what else the machine does weighs on each alike
        for name, dtype in kinds.items():
            if turn and rates.get(name, 0.0) < _EMULATED:
                continue
            with contextlib.suppress(RuntimeError, TypeError):
                rates[name] = max(rates.get(name, 0.0), matmul_flops(device, dtype, 0.15))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            rates["tf32"] = matmul_flops(device, torch.float32)
        finally:
            torch.set_float32_matmul_precision(before)
    return rates


def rate_with_threads(threads: int) -> float:
    """Operations a second of fp32 products on the CPU, computed by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return matmul_flops(torch.device("cpu"), torch.float32)
    finally:
        torch.set_num_threads(before)


def copy_speed(device: torch.device) -> float:
    """Bytes a second that are copied within the device's memory: the best of three times."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(4):  # at the first, the pages are made
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return _COPIED / best


def _text(path: Path) -> str | None:
    """The content of a file of the system; None where it is not there."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
