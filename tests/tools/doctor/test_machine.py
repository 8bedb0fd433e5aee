"""What is found out about a machine: this one's facts against the system's own, other ones' from their files."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onym.errors import ConfigError
from onym.tools.doctor import machine as find
from onym.tools.doctor.diagnosis import Machine, diagnose, memory_of, parameters_of
from onym.tools.doctor.disk import Disk, file_system, look_at, write_speed
from onym.tools.doctor.trial import Trial, try_compiling

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="these files are Linux's")

GOOD_DISK = Disk("runs", "ext4", 10**12, 1e9)
GOOD = Machine(
    device="cpu",
    versions=find.Versions("Linux x86_64", "3.11.7", "2.13.0+cpu", None, {}),
    cores=find.Cores("a processor", 8, 8, 8, None, 8),
    memory=find.Memory(64 * 10**9, 60 * 10**9, None),
    gpus=(),
    driver=None,
    compiler=find.Compiler("g++", "g++ 12"),
    bf16_in_hardware=True,
    rates={"fp32": 4e11, "bf16": 8e11},
    rate_with_all_cores=None,
    copied_per_second=1e10,
    runs=GOOD_DISK,
    cache=dataclasses.replace(GOOD_DISK, folder="cache"),
    trial=Trial("bf16", True, "", 1.0, 0.04, 0.02, 20.0),
)


# ---- facts of this machine


@linux
def test_cores_and_memory_are_those_of_the_system() -> None:
    cores = find.find_cores(find.Limits())
    assert 1 <= cores.physical <= cores.allowed == len(os.sched_getaffinity(0)) <= cores.logical == os.cpu_count()
    assert cores.threads == torch.get_num_threads()
    memory = find.find_memory(find.Limits())
    assert memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.available is not None
    assert memory.usable == memory.available < memory.total
    assert find.find_memory(find.Limits(memory=10**6)).usable == 10**6


def test_rates_are_measured_and_the_threads_stay() -> None:
    before = torch.get_num_threads()
    rates = find.matmul_rates(CPU, quick=True)
    assert set(rates) == {"fp32", "bf16"}
    assert all(1e8 < rate < 1e14 for rate in rates.values())
    assert 1e8 < find.rate_with_threads(1) < 1e14
    assert torch.get_num_threads() == before
    assert 1e8 < find.copy_speed(CPU) < 1e13


def test_the_compiler_is_the_one_that_torch_takes() -> None:
    compiler = find.find_compiler()
    assert compiler.command is not None
    assert any(figure.isdecimal() for figure in compiler.version)


# ---- facts of other machines


CGROUPS: dict[str, tuple[str, dict[str, str], find.Limits]] = {
    "version 2": ("0::/job\n", {"job/cpu.max": "150000 100000", "job/memory.max": "1000"}, find.Limits(1.5, 1000)),
    "no limit": ("0::/job\n", {"job/cpu.max": "max 100000", "job/memory.max": "max"}, find.Limits()),
    "the tighter one above": ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, find.Limits(2.0)),
    "a container": ("0::/../..\n", {"cpu.max": "50000 100000", "memory.max": "77"}, find.Limits(0.5, 77)),
    "the host's path": ("0::/docker/abc\n", {"memory.max": "77"}, find.Limits(None, 77)),
    "version 1": (
        "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
        {
            "cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "memory/job/memory.limit_in_bytes": "1000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
        find.Limits(3.0, 1000),
    ),
    "version 1 without a limit": (
        "1:cpu:/\n4:memory:/\n",
        {
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
        find.Limits(),
    ),
    "no sense": ("0::/\nnothing\n", {"cpu.max": "a b c", "memory.max": "-7"}, find.Limits()),
    "none": ("", {}, find.Limits()),
}


@pytest.mark.parametrize(("own", "files", "limits"), CGROUPS.values(), ids=CGROUPS)
def test_the_limits_of_a_container(tmp_path: Path, own: str, files: dict[str, str], limits: find.Limits) -> None:
    for name, text in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert find.cgroup_limits(tmp_path) == limits


@linux
def test_two_threads_of_a_core_are_one_core(tmp_path: Path) -> None:
    for core in range(os.cpu_count() or 1):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("0-63\n")
    cores = find.find_cores(find.Limits(), tmp_path)
    assert cores.usable == cores.physical == 1


def test_a_part_of_a_core_is_still_one_thread() -> None:
    assert dataclasses.replace(GOOD.cores, quota=0.5).usable == 1
    assert dataclasses.replace(GOOD.cores, quota=2.5).usable == 2


def test_a_driver_is_found_without_torch(tmp_path: Path) -> None:
    assert find.nvidia_driver(tmp_path) is None
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12.2.0\n"
    )
    assert find.nvidia_driver(tmp_path) == "535.104.05"


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    (tmp_path / "a b" / "c").mkdir(parents=True)
    blank = str(tmp_path / "a b").replace(" ", "\\040")
    mounts = f"""1 0 8:1 / / rw - ext4 /dev/a rw
2 1 0:2 / {tmp_path} rw,relatime shared:1 - nfs4 host:/x rw
3 1 0:3 / {blank} rw - xfs /dev/b rw
4 1 0:4 / {blank} rw - tmpfs tmpfs rw
broken"""
    assert file_system(tmp_path / "a b" / "c", mounts) == "tmpfs", "the later mount lies over the earlier"
    assert file_system(tmp_path, mounts) == "nfs4"
    assert file_system(Path("/"), mounts) == "ext4"
    assert file_system(tmp_path, "") == "unknown"


# ---- disks


def test_a_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    disk = look_at(tmp_path / "not" / "yet", quick=True)
    assert disk.trouble == ""
    assert disk.bytes_per_second is not None
    assert disk.bytes_per_second > 1e5
    assert disk.free > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])
def test_nothing_is_left_when_it_is_stopped_in_between(tmp_path: Path, stop: str) -> None:
    program = f"""
import os, signal
from pathlib import Path
from onym.tools.doctor import disk
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
flush = os.fsync
def flush_and_be_stopped(descriptor):
    flush(descriptor)
    os.kill(os.getpid(), signal.{stop})
os.fsync = flush_and_be_stopped
disk.write_speed(Path({str(tmp_path)!r}), 2**24)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode in (-getattr(signal, stop), 130, 1)
    assert stop == "SIGKILL" or "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_no_speed(tmp_path: Path) -> None:
    assert write_speed(tmp_path, 0) is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        look_at(tmp_path / "f" / "runs", quick=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this system does not let us mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_disk_in_memory_is_told(small_disk: Path) -> None:
    disk = look_at(small_disk, quick=False)
    assert disk.kind == "tmpfs"
    assert disk.bytes_per_second is not None, "less is written where there is little room"
    told = [problem.what for problem in diagnose(dataclasses.replace(GOOD, runs=disk)).problems]
    assert any("is in memory (tmpfs)" in what for what in told)
    assert any("has 8.4 MB free" in what for what in told)


@linux
def test_a_folder_that_refuses_is_trouble() -> None:
    disk = look_at(Path("/proc/runs"), quick=True)
    assert disk.bytes_per_second is None
    assert "Could not write at '/proc/runs'" in disk.trouble


# ---- compiling


@linux
def test_a_compiler_that_cannot_compile_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho "no headers here" >&2\nexit 1\n')
    broken.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "tmp"))
    trial = try_compiling("cpu", "fp32")
    assert trial.works is False
    assert "Error" in trial.reason
    assert trial.tiny_seconds is None, "it was found out before a large model had to be compiled"
    assert trial.eager_seconds is not None, "a step is timed in any case"
    assert trial.compiled_seconds is None
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_trial_that_takes_too_long_says_so() -> None:
    trial = try_compiling("cpu", "fp32", seconds=0.2)
    assert trial.works is False
    assert trial.reason == "not done after 0 s"


# ---- what follows


def test_a_good_machine_has_no_problem() -> None:
    diagnosis = diagnose(GOOD)
    assert diagnosis.problems == ()
    assert diagnosis.healthy
    assert {advice.subject: advice.setting for advice in diagnosis.advice}["compile"] == "auto"
    assert "--precision" not in diagnosis.command


def test_every_advice_has_a_figure_or_says_that_there_is_none() -> None:
    for machine in (GOOD, dataclasses.replace(GOOD, trial=None), dataclasses.replace(GOOD, rates={}, trial=None)):
        for advice in diagnose(machine).advice:
            assert (
                any(figure.isdecimal() for figure in advice.worth) or "measured" in advice.worth or "nothing to" in advice.worth
            )


def with_cores(**changes: object) -> dict[str, object]:
    return {"cores": dataclasses.replace(GOOD.cores, **changes)}  # type: ignore[arg-type]


def with_runs(**changes: object) -> dict[str, object]:
    return {"runs": dataclasses.replace(GOOD.runs, **changes)}  # type: ignore[arg-type]


# name: (what is otherwise, what is said, a part of the remedy, whether it matters)
PROBLEMS: dict[str, tuple[dict[str, object], str, str, bool]] = {
    "no compiler": ({"compiler": find.Compiler(None)}, "There is no C++ compiler", "apt install g++", True),
    "a wrong CXX": ({"compiler": find.Compiler(None, asked_for="/x")}, "There is no C++ compiler", "CXX is set to '/x'", True),
    "compiling fails": ({"trial": Trial("bf16", False, "no headers")}, "does not work here: no headers", "--compile off", True),
    "old torch": ({"versions": dataclasses.replace(GOOD.versions, torch="2.5.1")}, "older than 2.6", "--upgrade torch", True),
    "torch without CUDA": ({"driver": "535.1"}, "built without CUDA", "pytorch.org/get-started", True),
    "CUDA that fails": (
        {"driver": "535.1", "versions": dataclasses.replace(GOOD.versions, cuda="13.0")},
        "torch cannot use it with CUDA 13.0",
        "Update the driver",
        True,
    ),
    "one thread": (with_cores(threads=1), "torch computes with 1 thread, and there are 8", "export OMP_NUM_THREADS=8", True),
    "too many threads": (with_cores(allowed=2, physical=2), "and may use 2 cores", "export OMP_NUM_THREADS=2", True),
    "few cores": (with_cores(quota=2.0, threads=2), "may use 2 of 8 cores", "--cpus", False),
    "little memory": ({"memory": find.Memory(64 * 10**9, 60 * 10**9, 10**9)}, "may use 1.0 GB of", "--memory", False),
    "bf16 emulated": ({"bf16_in_hardware": False}, "does not compute bf16 in hardware", "takes fp32", False),
    "in memory": (with_runs(kind="tmpfs"), "gone at the next reboot", "--runs-dir", True),
    "in a container": (with_runs(kind="overlay"), "gone when the container is removed", "docker run -v", False),
    "on a network": (with_runs(kind="nfs4"), "on a network (nfs4)", "local disk", False),
    "through sshfs": (with_runs(kind="fuse.sshfs"), "on a network (fuse.sshfs)", "local disk", False),
    "little room": (with_runs(free=10**8), "has 100.0 MB free", "onym prune", True),
    "refused": (with_runs(bytes_per_second=None, trouble="permission denied"), "permission denied", "--runs-dir", True),
}


@pytest.mark.parametrize(("changes", "says", "remedy", "matters"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_is_told_with_its_remedy(changes: dict[str, object], says: str, remedy: str, matters: bool) -> None:
    diagnosis = diagnose(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    (problem,) = diagnosis.problems
    assert says in problem.what
    assert remedy in problem.remedy
    assert problem.matters is matters
    assert diagnosis.healthy is not matters


def test_the_settings_follow_what_was_measured() -> None:
    slow_bf16 = dataclasses.replace(GOOD, rates={"fp32": 4e11, "bf16": 1e11})
    assert diagnose(slow_bf16).advice[0].setting == "fp32"
    assert "products 4.0 times as fast as in bf16, measured" in diagnose(slow_bf16).advice[0].worth
    assert "--precision fp32" in diagnose(slow_bf16).command
    slower = dataclasses.replace(GOOD, trial=Trial("bf16", True, "", 1.0, 0.02, 0.03, 20.0))
    assert "--compile off" in diagnose(slower).command
    equal = dataclasses.replace(GOOD, trial=Trial("bf16", True, "", 1.0, 0.02, 0.02, 20.0))
    assert "--compile off" not in diagnose(equal).command, "noise is no reason to leave the default"
    slow_disk = dataclasses.replace(GOOD, runs=dataclasses.replace(GOOD_DISK, bytes_per_second=1e5))
    assert "--save-every" in diagnose(slow_disk).command
    one_thread = dataclasses.replace(GOOD, cores=dataclasses.replace(GOOD.cores, threads=1), rate_with_all_cores=2.4e12)
    assert diagnose(one_thread).command.startswith("OMP_NUM_THREADS=8 onym train")
    assert any("6.0 times as fast, measured" in advice.worth for advice in diagnose(one_thread).advice)
    little = dataclasses.replace(GOOD, memory=find.Memory(10**9, 10**8, None))
    assert {advice.subject: advice.setting for advice in diagnose(little).advice}["largest"] == "micro"


def test_the_memory_of_a_preset_is_its_state_and_more() -> None:
    assert parameters_of("gpt2-small") == 124_439_808
    assert 16 * 124_439_808 < memory_of("gpt2-small", "bf16") < memory_of("gpt2-small", "fp32") < 20 * 16 * 124_439_808
