"""What follows from the facts about a machine: the settings for it, what each is worth here, what is wrong, and the remedies.

Nothing is measured in this file. A figure that it gives was measured on this machine by :mod:`onym.tools.doctor.machine`,
``disk`` or ``trial``, or computed from such figures; where there is none, it says so.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch

from onym.gpt.config import ModelConfig
from onym.gpt.kinds import arch_of, config_of, presets
from onym.gpt.models import without_values
from onym.tools.doctor.disk import IN_CONTAINER, IN_MEMORY, Disk
from onym.tools.doctor.machine import Compiler, Cores, Gpu, Memory, Versions
from onym.tools.doctor.trial import PRESET, Trial
from onym.train.metering import training_flops_per_token
from onym.train.options import DEFAULT_STEPS, DataOptions, ModelOptions, OptimizationOptions, RunOptions
from onym.units import format_clock, format_size, plural

_OLDEST_TORCH = (2, 6)
_WORTH_IT = 1.05  # times as fast; less is within what a shared machine varies by
_STATE_BYTES = 16  # a parameter: the weight, its gradient and AdamW's two moments, fp32 each
_SAVED_BYTES = 12  # of those, what a checkpoint holds
_LONGEST_RUN = 3600  # seconds; the preset that is recommended is done by then
_LONGEST_LOST = 600  # seconds of training that a power cut may cost
_SAVING_SHARE = 0.02  # of the time, at most
_LITTLE_ROOM = 10**9  # bytes
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Machine:
    """All facts."""

    device: str
    """Where torch would compute: cpu, cuda, mps."""
    versions: Versions
    cores: Cores
    memory: Memory
    gpus: tuple[Gpu, ...]
    driver: str | None
    """NVIDIA's, where there is such a GPU, whether torch can use it or not."""
    compiler: Compiler
    bf16_in_hardware: bool
    rates: dict[str, float]
    """Operations a second in matrix products on the device, by dtype."""
    rate_with_all_cores: float | None
    """The same on the CPU in fp32, with as many threads as there are cores; None where torch computes with those already."""
    copied_per_second: float | None
    """Bytes."""
    runs: Disk
    cache: Disk
    trial: Trial | None
    """None where it was skipped."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong."""

    what: str
    remedy: str
    matters: bool = True
    """Whether training fails, is far slower, or may be lost because of it; the others are good to know."""


@dataclass(frozen=True)
class Advice:
    """A setting."""

    subject: str
    setting: str
    worth: str
    """With a figure that was measured here, or that there is none."""


@dataclass(frozen=True)
class Diagnosis:
    """What follows."""

    advice: tuple[Advice, ...]
    problems: tuple[Problem, ...]
    command: str
    """That trains with these settings."""

    @property
    def healthy(self) -> bool:
        """Whether no problem matters."""
        return not any(problem.matters for problem in self.problems)


def diagnose(machine: Machine) -> Diagnosis:
    """Settings and problems of a machine."""
    precision, precision_worth = choose_precision(machine.rates)
    compiling, compile_worth = _compiling(machine)
    fitting = _fitting(machine, precision)
    preset, preset_worth = _preset(machine, precision, fitting)
    interval, interval_worth = _interval(machine, preset, precision)
    largest = fitting[-1] if fitting else None
    advice = [
        Advice("precision", precision, precision_worth),
        Advice("compile", compiling, compile_worth),
        *([Advice("threads", str(machine.cores.usable), _threads_worth(machine))] if machine.device == "cpu" else []),
        Advice("preset", preset, preset_worth),
        Advice("largest", largest or "none", _largest_worth(machine, precision, largest)),
        Advice("save every", f"{interval} steps", interval_worth),
        Advice("runs", machine.runs.folder, _place(machine.runs)),
        Advice("cache", machine.cache.folder, _place(machine.cache)),
    ]
    defaults = RunOptions()
    # option, value here, value that the command has without it
    options = [
        ("--preset", preset, ModelOptions().preset),
        ("--precision", precision, "bf16" if machine.bf16_in_hardware else "fp32"),
        ("--compile", compiling, "auto"),
        ("--save-every", str(interval), str(defaults.save_every)),
        ("--device", machine.device, "cuda" if machine.gpus else "cpu"),
        ("--runs-dir", machine.runs.folder, str(defaults.runs_dir)),
        ("--cache-dir", machine.cache.folder, str(DataOptions().cache_dir)),
    ]
    command = [] if machine.cores.well_used else [f"OMP_NUM_THREADS={machine.cores.usable}"]
    command += ["onym", "train", *(word for option, value, default in options if value != default for word in (option, value))]
    on_disks = [_disk_problems(name, disk, preset) for name, disk in (("runs", machine.runs), ("cache", machine.cache))]
    problems = sorted(chain(_machine_problems(machine), *on_disks), key=lambda each: not each.matters)
    return Diagnosis(tuple(advice), tuple(problems), shlex.join(command))


def choose_precision(rates: Mapping[str, float]) -> tuple[str, str]:
    """The faster of bf16 and fp32, by the products that were measured; fp32 where it makes no difference."""
    bf16, fp32 = rates.get("bf16"), rates.get("fp32")
    if bf16 is None or fp32 is None:
        return "fp32", f"bf16 is {_UNMEASURED}: this device does not compute products in it"
    if bf16 > _WORTH_IT * fp32:
        return "bf16", f"products {bf16 / fp32:.1f} times as fast as in fp32, measured"
    return "fp32", f"products {fp32 / bf16:.1f} times as fast as in bf16, measured"


def _compiling(machine: Machine) -> tuple[str, str]:
    """auto or off, and why."""
    trial = machine.trial
    if machine.compiler.command is None and machine.device == "cpu":
        return "off", "it cannot work here: see below"
    if trial is None:
        return "auto", f"{_UNMEASURED}: skipped by --quick"
    if not trial.works:
        return "off", "it does not work here: see below"
    if not (trial.factor and trial.compile_seconds and trial.eager_seconds and trial.compiled_seconds):
        return "auto", f"{_UNMEASURED}: {trial.reason}"
    worth = f"a step of {PRESET} is {trial.factor:.2f} times as fast, measured; it takes {trial.compile_seconds:.0f} s once"
    if trial.factor * _WORTH_IT < 1:
        return "off", worth
    if trial.factor < _WORTH_IT:  # larger models gain more
        return "auto", f"{worth}: no difference beyond noise"
    paid_back = math.ceil(trial.compile_seconds / (trial.eager_seconds - trial.compiled_seconds))
    return "auto", f"{worth}, back after {paid_back:,} such steps"


def _threads_worth(machine: Machine) -> str:
    cores, faster = machine.cores, machine.rate_with_all_cores
    if cores.well_used:
        return "as torch has it: nothing to set"
    if faster is None or "fp32" not in machine.rates:
        return f"torch has {cores.threads}; {_UNMEASURED}"
    return f"torch has {cores.threads}; fp32 products {faster / machine.rates['fp32']:.1f} times as fast, measured"


def _config(preset: str) -> ModelConfig:
    """With the vocabulary that a run without options has, where the preset names none."""
    config = config_of(arch_of(preset), preset)
    if "vocab_size" in type(config).presets[preset]:
        return config
    return config_of(arch_of(preset), preset, vocab_size=DataOptions().vocab_size)


@functools.cache
def parameters_of(preset: str) -> int:
    """Number of weights, without making any."""
    return sum(parameter.numel() for parameter in without_values(_config(preset)).parameters())


def memory_of(preset: str, precision: str) -> int:
    """Bytes that training takes, estimated, with one sequence at a time.

    The state; 34 bytes a layer, channel and token in 16 bits (Korthikanti et al., 2022, without the attention's square, which
    is never stored), twice as many in fp32; and for each token its logits as computed and, with their gradient, in fp32.
    """
    width = 4 if precision == "fp32" else 2
    config = _config(preset)
    token = 17 * width * config.n_layers * config.emb_dim + (8 + width) * config.vocab_size
    return _STATE_BYTES * parameters_of(preset) + token * config.context_length


def _fitting(machine: Machine, precision: str) -> list[str]:
    """The presets whose training fits into memory, the smallest first."""
    device = torch.device(machine.device)
    usable = machine.gpus[device.index or 0].memory if device.type == "cuda" else machine.memory.usable
    if usable is None:
        return presets()
    return [preset for preset in presets() if memory_of(preset, precision) < 0.9 * usable]  # torch and Python need some too


def _largest_worth(machine: Machine, precision: str, largest: str | None) -> str:
    if largest is None:
        return "no preset's training fits into the memory"
    known = machine.memory.usable is not None or bool(machine.gpus)
    unknown = "" if known else "; this system does not report how much there is"
    return f"its training takes about {format_size(memory_of(largest, precision))}, estimated{unknown}"


def _step_seconds(machine: Machine, preset: str, precision: str) -> float | None:
    """Of a step at the default batch size, at the part of the matmul rate that the trial's steps reached."""
    rate, trial = machine.rates.get(precision), machine.trial
    reached = None if trial is None else min((s for s in (trial.eager_seconds, trial.compiled_seconds) if s), default=None)
    if rate is None or reached is None:
        return None

    def products(name: str) -> float:
        config = _config(name)
        return training_flops_per_token(config) * config.context_length * OptimizationOptions().batch_size / rate

    return reached * products(preset) / products(PRESET)


def _preset(machine: Machine, precision: str, fitting: list[str]) -> tuple[str, str]:
    """The largest that fits and is trained within an hour."""
    times = {preset: _step_seconds(machine, preset, precision) for preset in fitting}
    known = {preset: seconds * DEFAULT_STEPS for preset, seconds in times.items() if seconds is not None}
    if not known:
        return ModelOptions().preset, f"the default; how long it takes here is {_UNMEASURED}"
    quick = [preset for preset, seconds in known.items() if seconds <= _LONGEST_RUN]
    best = quick[-1] if quick else min(known, key=lambda preset: known[preset])
    which = "the largest done within the hour" if quick else "the fastest"
    return best, f"{which}: {DEFAULT_STEPS:,} steps in about {format_clock(known[best])}, from steps measured here"


def _interval(machine: Machine, preset: str, precision: str) -> tuple[int, str]:
    """Steps between two checkpoints: as few as the time to save them allows, and no more than the default."""
    default = RunOptions().save_every
    step, speed = _step_seconds(machine, preset, precision), machine.runs.bytes_per_second
    if step is None or not speed:
        return default, f"the default; what it costs is {_UNMEASURED}"
    saving = _SAVED_BYTES * parameters_of(preset) / speed
    interval = max(math.ceil(saving / _SAVING_SHARE / step), min(default, math.ceil(_LONGEST_LOST / step)))
    if interval != default:
        digits = 10 ** max(0, len(str(interval)) - 2)
        interval = math.ceil(interval / digits) * digits
    share = saving / (interval * step)
    cost = "under 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
    lost = format_clock(interval * step)
    return interval, f"{saving:.2g} s of writing each, {cost} of the time; a power cut costs {lost} at most"


def _place(disk: Disk) -> str:
    if disk.bytes_per_second is None:
        return f"{_UNMEASURED}: {disk.trouble or 'there is no room to try'}"
    return f"{disk.kind}, {format_size(disk.free)} free, writes {format_size(disk.bytes_per_second)} a second, measured"


def _machine_problems(machine: Machine) -> Iterator[Problem]:
    versions, cores, memory, compiler, trial = machine.versions, machine.cores, machine.memory, machine.compiler, machine.trial
    on_cpu = machine.device == "cpu"
    numbers = re.match(r"(\d+)\.(\d+)", versions.torch)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        yield Problem(f"torch {versions.torch} is older than {oldest}.", "pip install --upgrade torch")
    if machine.driver is not None and not machine.gpus:
        unused = f"There is an NVIDIA GPU (driver {machine.driver}), and torch "
        if versions.cuda is None:
            yield Problem(
                f"{unused}{versions.torch} is built without CUDA.",
                "Install the torch for your driver's CUDA: https://pytorch.org/get-started/locally shows the command.",
            )
        else:
            yield Problem(
                f"{unused}cannot use it with CUDA {versions.cuda}.",
                "Update the driver, or install a torch for an older CUDA; start a container with --gpus all; see that "
                "CUDA_VISIBLE_DEVICES is not empty.",
            )
    if not machine.bf16_in_hardware:
        what = "This device does not compute bf16 in hardware."
        yield Problem(what, "Nothing to do: --precision auto takes fp32.", matters=False)
    if compiler.command is None and on_cpu:
        wrong = f"CXX is set to {compiler.asked_for!r}, which cannot be run: unset it, or name a compiler. "
        yield Problem(
            "There is no C++ compiler, so torch.compile cannot work, and steps run without.",
            f"{wrong if compiler.asked_for else ''}To install one: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ "
            "(Fedora, RHEL), xcode-select --install (macOS), Visual Studio's Build Tools with C++ (Windows).",
        )
    elif trial is not None and not trial.works:
        yield Problem(
            f"torch.compile does not work here: {trial.reason}",
            "onym train runs without it, or give --compile off. To repair it, look at what the reason names: the compiler and "
            "its headers (apt install g++ python3-dev), or a folder that programs may be run from (TORCHINDUCTOR_CACHE_DIR).",
        )
    if cores.threads < cores.usable:
        what = f"torch computes with {plural(cores.threads, 'thread')}, and there are {cores.usable} cores."
        remedy = f"export OMP_NUM_THREADS={cores.usable}, or unset it; see MKL_NUM_THREADS too."
        yield Problem(what, remedy, matters=on_cpu)
    if cores.threads > cores.most:
        what = f"torch computes with {cores.threads} threads, and may use {cores.most} cores: they are in each other's way."
        yield Problem(what, f"export OMP_NUM_THREADS={cores.usable}", matters=on_cpu)
    if cores.quota is not None and cores.quota < cores.allowed:
        what = f"The container or job may use {cores.quota:g} of {cores.allowed} cores."
        remedy = "Ask for more of them where it is started (docker run --cpus, srun --cpus-per-task), if you can."
        yield Problem(what, remedy, matters=False)
    if memory.limit is not None and memory.total is not None:
        sizes = f"{format_size(memory.limit)} of the machine's {format_size(memory.total)} of memory"
        remedy = "Ask for more where it is started (docker run --memory, srun --mem), if a model does not fit."
        yield Problem(f"The container or job may use {sizes}.", remedy, matters=False)


def _disk_problems(name: str, disk: Disk, preset: str) -> Iterator[Problem]:
    """Of the folder for ``runs`` or for the ``cache``."""
    where, option = f"The {name} folder '{disk.folder}'", f"--{name}-dir"
    if disk.trouble:
        yield Problem(f"{where} cannot be written: {disk.trouble}", f"Choose another with {option}.")
        return
    if disk.kind in IN_MEMORY:
        lost = "checkpoints are" if name == "runs" else "what is in it is"
        what = f"{where} is in memory ({disk.kind}): {lost} gone at the next reboot."
        yield Problem(what, f"Choose one on a disk with {option}.", matters=name == "runs")
    if disk.kind in IN_CONTAINER:
        what = f"{where} is inside a container ({disk.kind}): it is gone when the container is removed."
        yield Problem(what, f"Mount a folder of the host (docker run -v), and choose it with {option}.", matters=False)
    if disk.on_network:
        what = f"{where} is on a network ({disk.kind}): slower, and locks may not reach other hosts."
        yield Problem(what, f"Choose one on a local disk with {option}, and copy it afterwards.", matters=False)
    saved = _SAVED_BYTES * parameters_of(preset) * (RunOptions().keep_last + 1) if name == "runs" else 0
    needed = max(_LITTLE_ROOM, saved)
    if disk.free < needed:
        yield Problem(
            f"{where} has {format_size(disk.free)} free; {preset} needs {format_size(needed)} with some to spare.",
            f"Delete something (onym prune, for checkpoints), or choose another disk with {option}.",
        )
