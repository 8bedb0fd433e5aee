"""What follows from the facts about a machine: the settings for it, what each is worth here, what is wrong, and the remedies.

Nothing is measured in this file. A figure that it gives was measured on this machine by :mod:`onym.tools.doctor.machine`,
``disk`` or ``trial``, or computed from such figures; where there is none, it says so.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
from dataclasses import dataclass

import torch

from onym.gpt.config import PRESETS, GPTConfig
from onym.gpt.gpt2 import GPT
from onym.tools.doctor.disk import IN_CONTAINER, IN_MEMORY, Disk
from onym.tools.doctor.machine import Compiler, Cores, Gpu, Memory, Versions
from onym.tools.doctor.trial import PRESET, Trial
from onym.train.metering import training_flops_per_token
from onym.train.options import DEFAULT_STEPS, DataOptions, ModelOptions, OptimizationOptions, RunOptions
from onym.units import format_clock, format_size, plural

_OLDEST_TORCH = (2, 6)
_WORTH_IT = 1.05  # times as fast; less is within what a shared machine varies by
_STATE_BYTES = 16  # a parameter: the weight, its gradient and AdamW's two moments, fp32 each
_KEPT_BYTES = 12  # of those, what a checkpoint holds
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
    """None where it was left out."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong."""

    what: str
    remedy: str
    matters: bool
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
    """Put it all together."""
    precision, precision_worth = choose_precision(machine)
    compiled, compile_setting, compile_worth = _compiling(machine)
    fitting = _fitting(machine, precision)
    preset, preset_worth = _preset(machine, precision, fitting)
    interval, interval_worth = _interval(machine, preset, precision)
    threads, threads_worth = _threads(machine)
    largest = fitting[-1] if fitting else None
    advice = [
        Advice("precision", precision, precision_worth),
        Advice("compile", compile_setting, compile_worth),
        *([Advice("threads", str(machine.cores.usable), threads_worth)] if machine.device == "cpu" else []),
        Advice("preset", preset, preset_worth),
        Advice("largest", largest or "none", _largest_worth(machine, precision, largest)),
        Advice("save every", f"{interval} steps", interval_worth),
        Advice("runs", machine.runs.folder, _place(machine.runs)),
        Advice("cache", machine.cache.folder, _place(machine.cache)),
    ]
    automatic = "bf16" if machine.bf16_in_hardware else "fp32"
    defaults = RunOptions()
    parts = [f"OMP_NUM_THREADS={machine.cores.usable}"] if threads else []
    parts += ["onym", "train"]
    parts += ["--preset", preset] if preset != ModelOptions().preset else []
    parts += ["--precision", precision] if precision != automatic else []
    parts += [] if compiled else ["--compile", "off"]
    parts += ["--save-every", str(interval)] if interval != defaults.save_every else []
    parts += ["--device", machine.device] if machine.device != ("cuda" if machine.gpus else "cpu") else []
    parts += ["--runs-dir", machine.runs.folder] if machine.runs.folder != str(defaults.runs_dir) else []
    parts += ["--cache-dir", machine.cache.folder] if machine.cache.folder != str(DataOptions().cache_dir) else []
    return Diagnosis(tuple(advice), tuple(find_problems(machine, preset)), shlex.join(parts))


def choose_precision(machine: Machine) -> tuple[str, str]:
    """The faster of bf16 and fp32, by the products that were measured; fp32 where it makes no difference."""
    bf16, fp32 = machine.rates.get("bf16"), machine.rates.get("fp32")
    if bf16 is None or fp32 is None:
        return "fp32", f"bf16 is {_UNMEASURED}: this device does not compute products in it"
    if bf16 > _WORTH_IT * fp32:
        return "bf16", f"products {bf16 / fp32:.1f} times as fast as in fp32, measured"
    return "fp32", f"products {fp32 / bf16:.1f} times as fast as in bf16, measured"


def _compiling(machine: Machine) -> tuple[bool, str, str]:
    trial = machine.trial
    if machine.compiler.command is None and machine.device == "cpu":
        return False, "off", "it cannot work here: see below"
    if trial is None:
        return True, "auto", f"{_UNMEASURED}: left out by --quick"
    if not trial.works:
        return False, "off", "it does not work here: see below"
    if trial.factor is None or trial.compile_seconds is None:
        return True, "auto", f"{_UNMEASURED}: {trial.reason}"
    assert trial.eager_seconds is not None
    assert trial.compiled_seconds is not None
    told = f"a step of {PRESET} is {trial.factor:.2f} times as fast, measured; it takes {trial.compile_seconds:.0f} s once"
    if trial.factor * _WORTH_IT < 1:
        return False, "off", told
    if trial.factor < _WORTH_IT:  # larger models gain more
        return True, "auto", f"{told}: no difference that could be told from noise"
    paid_back = math.ceil(trial.compile_seconds / (trial.eager_seconds - trial.compiled_seconds))
    return True, "auto", f"{told}, back after {paid_back:,} such steps"


def _threads(machine: Machine) -> tuple[bool, str]:
    """Whether their number is to be set, and what that is worth."""
    cores, faster = machine.cores, machine.rate_with_all_cores
    if cores.usable <= cores.threads <= cores.most:
        return False, "as torch has it: nothing to set"
    if faster is None or "fp32" not in machine.rates or machine.device != "cpu":
        return True, f"torch has {cores.threads}; {_UNMEASURED}"
    return True, f"torch has {cores.threads}; fp32 products {faster / machine.rates['fp32']:.1f} times as fast, measured"


def _config(preset: str) -> GPTConfig:
    """With the vocabulary that a run without options has."""
    return GPTConfig.preset(preset, **{"vocab_size": DataOptions().vocab_size, **PRESETS[preset]})


@functools.cache
def parameters_of(preset: str) -> int:
    """Number of weights, without making any."""
    return sum(parameter.numel() for parameter in GPT.without_values(_config(preset)).parameters())


def memory_of(preset: str, precision: str) -> int:
    """Bytes that training takes, estimated, with one sequence at a time.

    The state; 34 bytes a layer, channel and token in 16 bits (Korthikanti et al., 2022, without the attention's square, which
    is never kept), twice as many in fp32; and for each token its logits as computed and, with their gradient, in fp32.
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
        return list(PRESETS)
    return [preset for preset in PRESETS if memory_of(preset, precision) < 0.9 * usable]  # torch and Python take a share too


def _largest_worth(machine: Machine, precision: str, largest: str | None) -> str:
    if largest is None:
        return "no preset's training fits into the memory"
    known = machine.memory.usable is not None or bool(machine.gpus)
    unknown = "" if known else "; this system does not tell how much there is"
    return f"its training takes about {format_size(memory_of(largest, precision))}, estimated{unknown}"


def _step_seconds(machine: Machine, preset: str, precision: str) -> float | None:
    """Of a step at the default batch size, at the share of the matmul rate that the trial's steps reached."""
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
    if not quick:
        smallest = min(known, key=lambda preset: known[preset])
        return (
            smallest,
            f"the fastest; {DEFAULT_STEPS:,} steps take about {format_clock(known[smallest])}, from the steps measured here",
        )
    best = quick[-1]
    needed = format_clock(known[best])
    return best, f"the largest done within the hour: {DEFAULT_STEPS:,} steps in about {needed}, from steps measured here"


def _interval(machine: Machine, preset: str, precision: str) -> tuple[int, str]:
    """Steps between two checkpoints: as few as the time to save them allows, and no more than the default."""
    default = RunOptions().save_every
    step, speed = _step_seconds(machine, preset, precision), machine.runs.bytes_per_second
    if step is None or not speed:
        return default, f"the default; what it costs is {_UNMEASURED}"
    saving = _KEPT_BYTES * parameters_of(preset) / speed
    interval = max(math.ceil(saving / _SAVING_SHARE / step), min(default, math.ceil(_LONGEST_LOST / step)))
    if interval != default:
        digits = 10 ** max(0, len(str(interval)) - 2)
        interval = math.ceil(interval / digits) * digits
    share = saving / (interval * step)
    told = "under 0.1 %" if share < 0.001 else f"{share:.1%}".replace("%", " %")
    return (
        interval,
        f"{saving:.2g} s of writing each, {told} of the time; a power cut costs {format_clock(interval * step)} at most",
    )


def _place(disk: Disk) -> str:
    if disk.bytes_per_second is None:
        return f"{_UNMEASURED}: {disk.trouble or 'there is no room to try'}"
    return f"{disk.kind}, {format_size(disk.free)} free, keeps {format_size(disk.bytes_per_second)} a second, measured"


def find_problems(machine: Machine, preset: str) -> list[Problem]:
    """What is wrong, what matters first."""
    found = [
        *_torch_problems(machine),
        *_compiler_problems(machine),
        *_core_problems(machine),
        *_disk_problems(machine, preset),
    ]
    return sorted(found, key=lambda problem: not problem.matters)


def _torch_problems(machine: Machine) -> list[Problem]:
    versions, found = machine.versions, []
    numbers = re.match(r"(\d+)\.(\d+)", versions.torch)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        found.append(Problem(f"torch {versions.torch} is older than {oldest}.", "pip install --upgrade torch", True))
    if machine.driver is not None and not machine.gpus:
        if versions.cuda is None:
            found.append(
                Problem(
                    f"There is an NVIDIA GPU (driver {machine.driver}), and torch {versions.torch} is built without CUDA.",
                    "Install the torch for your driver's CUDA: https://pytorch.org/get-started/locally says the command.",
                    True,
                )
            )
        else:
            found.append(
                Problem(
                    f"There is an NVIDIA GPU (driver {machine.driver}), and torch cannot use it with CUDA {versions.cuda}.",
                    "Update the driver, or install a torch for an older CUDA; start a container with --gpus all; see that "
                    "CUDA_VISIBLE_DEVICES is not empty.",
                    True,
                )
            )
    if not machine.bf16_in_hardware:
        found.append(
            Problem(
                "This device does not compute bf16 in hardware.",
                "Nothing to do: --precision auto takes fp32.",
                False,
            )
        )
    return found


def _compiler_problems(machine: Machine) -> list[Problem]:
    trial = machine.trial
    if machine.compiler.command is None and machine.device == "cpu":
        asked_for = machine.compiler.asked_for
        first = f"CXX is set to {asked_for!r}, which cannot be run: unset it, or name a compiler. " if asked_for else ""
        return [
            Problem(
                "There is no C++ compiler, so torch.compile cannot work, and steps run without.",
                f"{first}To install one: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora, RHEL), xcode-select "
                "--install (macOS), Visual Studio's Build Tools with C++ (Windows).",
                True,
            )
        ]
    if trial is None or trial.works:
        return []
    return [
        Problem(
            f"torch.compile does not work here: {trial.reason}",
            "onym train goes on without it, or give --compile off. To mend it, see to what the reason names: the compiler and "
            "its headers (apt install g++ python3-dev), or a folder that programs may be run from (TORCHINDUCTOR_CACHE_DIR).",
            True,
        )
    ]


def _core_problems(machine: Machine) -> list[Problem]:
    cores, memory, found = machine.cores, machine.memory, []
    if cores.threads < cores.usable:
        found.append(
            Problem(
                f"torch computes with {plural(cores.threads, 'thread')}, and there are {cores.usable} cores.",
                f"export OMP_NUM_THREADS={cores.usable}, or unset it; see MKL_NUM_THREADS too.",
                machine.device == "cpu",
            )
        )
    elif cores.threads > cores.most:
        found.append(
            Problem(
                f"torch computes with {cores.threads} threads, and may use {cores.most} cores: they are in each other's way.",
                f"export OMP_NUM_THREADS={cores.usable}",
                machine.device == "cpu",
            )
        )
    if cores.quota is not None and cores.quota < cores.allowed:
        found.append(
            Problem(
                f"The container or job may use {cores.quota:g} of {cores.allowed} cores.",
                "Ask for more of them where it is started (docker run --cpus, srun --cpus-per-task), if you can.",
                False,
            )
        )
    if memory.limit is not None and memory.total is not None:
        found.append(
            Problem(
                f"The container or job may use {format_size(memory.limit)} of the machine's {format_size(memory.total)} of "
                "memory.",
                "Ask for more where it is started (docker run --memory, srun --mem), if a model does not fit.",
                False,
            )
        )
    return found


def _disk_problems(machine: Machine, preset: str) -> list[Problem]:
    found = []
    for name, disk, option in (("runs", machine.runs, "--runs-dir"), ("cache", machine.cache, "--cache-dir")):
        where = f"the {name} folder '{disk.folder}'"
        if disk.trouble:
            found.append(
                Problem(f"Nothing can be written into {where}: {disk.trouble}", f"Choose another with {option}.", True)
            )
            continue
        if disk.kind in IN_MEMORY:
            keeps = "checkpoints are" if name == "runs" else "what is in it is"
            found.append(
                Problem(
                    f"{_capital(where)} is in memory ({disk.kind}): {keeps} gone at the next reboot.",
                    f"Choose one on a disk with {option}.",
                    name == "runs",
                )
            )
        if disk.kind in IN_CONTAINER:
            found.append(
                Problem(
                    f"{_capital(where)} is inside a container ({disk.kind}): it is gone when the container is removed.",
                    f"Mount a folder of the host (docker run -v), and choose it with {option}.",
                    False,
                )
            )
        if disk.on_network:
            found.append(
                Problem(
                    f"{_capital(where)} is on a network ({disk.kind}): slower, and locks may not reach other hosts.",
                    f"Choose one on a local disk with {option}, and copy it afterwards.",
                    False,
                )
            )
        kept = _KEPT_BYTES * parameters_of(preset) * (RunOptions().keep_last + 1)
        needed = max(_LITTLE_ROOM, kept) if name == "runs" else _LITTLE_ROOM
        if disk.free < needed:
            found.append(
                Problem(
                    f"{_capital(where)} has {format_size(disk.free)} free; {preset} wants {format_size(needed)} to be at ease.",
                    f"Delete something (onym prune, for checkpoints), or choose another disk with {option}.",
                    True,
                )
            )
    return found


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
