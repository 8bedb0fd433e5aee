"""``onym tools doctor``: this machine, the settings for it, and what is wrong with it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from onym.cli.arguments import DoctorArguments
from onym.cli.report import print_facts, print_heading, print_json
from onym.gpt.hardware import computes_in_bf16
from onym.tools.doctor import machine as find
from onym.tools.doctor.diagnosis import Diagnosis, Machine, choose_precision, diagnose
from onym.tools.doctor.disk import Disk, look_at
from onym.tools.doctor.trial import Trial, try_compiling
from onym.train.display import Display
from onym.train.precision import choose_compute
from onym.units import format_size, plural


def run(given: DoctorArguments) -> int:
    """``onym tools doctor``."""
    # With --json, standard output is for the object alone; a terminal shows progress on the other stream.
    display = Display(Console(stderr=True, quiet=not sys.stderr.isatty()) if given.json else None)
    machine = examine(given.runs_dir, given.cache_dir, given.device, display, quick=given.quick)
    diagnosis = diagnose(machine)
    if given.json:
        print_json({"machine": asdict(machine), "quick": given.quick, "healthy": diagnosis.healthy, **asdict(diagnosis)})
    else:
        _print(machine, diagnosis)
    return 0 if diagnosis.healthy else 1


def examine(runs_dir: Path, cache_dir: Path, device: str, display: Display, *, quick: bool) -> Machine:
    """Measure everything.

    Raises:
        ConfigError: there is no such device, or a folder is a file.
    """
    compute = choose_compute(device, "auto")
    with display.activity("Disks") as activity:
        runs, cache = (look_at(folder, quick=quick) for folder in (runs_dir, cache_dir))
        activity.result = _speed(runs)
    limits = find.cgroup_limits()
    cores = find.find_cores(limits)
    with display.activity("Matrix products") as activity:
        rates = find.matmul_rates(compute.device, quick=quick)
        on_cpu = compute.device.type == "cpu"
        faster = None if cores.well_used or not on_cpu else find.rate_with_threads(cores.usable)
        copied = find.copy_speed(compute.device)
        activity.result = _rates(rates)
    compiler = find.find_compiler()
    trial = None
    if not quick:
        precision, _ = choose_precision(rates)
        if compiler.command is None and on_cpu:
            trial = Trial(precision, False, "there is no C++ compiler")
        else:
            with display.activity("torch.compile") as activity:
                trial = try_compiling(str(compute.device), precision)
                activity.result = _tried(trial)
    return Machine(
        device=str(compute.device),
        versions=find.find_versions(),
        cores=cores,
        memory=find.find_memory(limits),
        gpus=find.find_gpus(),
        driver=find.nvidia_driver(),
        compiler=compiler,
        bf16_in_hardware=computes_in_bf16(compute.device),
        rates=rates,
        rate_with_all_cores=faster,
        copied_per_second=copied,
        runs=runs,
        cache=cache,
        trial=trial,
    )


def _print(machine: Machine, diagnosis: Diagnosis) -> None:
    versions, cores, memory = machine.versions, machine.cores, machine.memory
    may = f", {cores.quota:g} of them allowed" if cores.quota is not None else ""
    limited = f", {format_size(memory.limit)} allowed" if memory.limit is not None else ""
    held = "unknown" if memory.total is None else format_size(memory.total)
    free = f", {format_size(memory.available)} available" if memory.available is not None else ""
    copied = f"; copies {format_size(machine.copied_per_second)} a second" if machine.copied_per_second else ""
    extras = [f"{name} {version or '-'}" for name, version in versions.extras.items()]
    print_heading("This machine")
    print_facts(
        {
            "system": f"{versions.system}, Python {versions.python}, torch {versions.torch}",
            "processor": f"{cores.processor}, {plural(cores.allowed, 'core')} of {cores.logical}{may}; torch computes with "
            + plural(cores.threads, "thread"),
            "memory": f"{held}{free}{limited}{copied if machine.device == 'cpu' else ''}",
            "GPU": _gpus(machine) + (copied if machine.device != "cpu" else ""),
            "products": f"{_rates(machine.rates)} (on {machine.device})",
            "bf16": "in hardware" if machine.bf16_in_hardware else "not in hardware",
            "C++ compiler": machine.compiler.version or machine.compiler.command or "none",
            "torch.compile": "not tried" if machine.trial is None else _tried(machine.trial),
            "runs": f"{machine.runs.folder}: {_speed(machine.runs)}",
            "cache": f"{machine.cache.folder}: {_speed(machine.cache)}",
            "extras": ", ".join(extras),
        }
    )
    print_heading("Settings, and what they are worth")
    print_facts({advice.subject: f"{advice.setting}: {advice.worth}" for advice in diagnosis.advice})
    print_heading("Problems" if diagnosis.problems else "No problems.")
    for problem in diagnosis.problems:
        print_facts({"problem" if problem.matters else "good to know": problem.what, "remedy": problem.remedy})
    print_heading(diagnosis.command)


def _gpus(machine: Machine) -> str:
    if not machine.gpus:
        return "none" if machine.driver is None else f"one that torch cannot use (driver {machine.driver})"
    described = []
    for gpu in machine.gpus:
        flops = f", {gpu.documented_flops / 1e12:.0f} TFLOP/s documented" if gpu.documented_flops else ""
        described.append(f"{gpu.name} ({format_size(gpu.memory)}, {gpu.capability}{flops})")
    return f"{', '.join(described)}; driver {machine.driver or 'unknown'}, torch for CUDA {machine.versions.cuda}"


def _rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in rates.items()) + " GFLOP/s"


def _speed(disk: Disk) -> str:
    if disk.bytes_per_second is None:
        return disk.trouble or "no room to try"
    return f"{disk.kind}, {format_size(disk.free)} free, {format_size(disk.bytes_per_second)} a second"


def _tried(trial: Trial) -> str:
    if not trial.works:
        return f"does not work: {trial.reason}"
    if trial.compile_seconds is None or trial.factor is None:
        return f"works; {trial.reason}"
    return f"works: {trial.compile_seconds:.0f} s for the nano preset, then {trial.factor:.2f} times as fast"
