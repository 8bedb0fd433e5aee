"""Two machines and the cable between them: what a run does when the other one falls silent, for a while or for good.

A machine is a network namespace here, with a host name of its own; the disk is shared. What is torchrun's is not judged: its
agents tell of their workers in their own words, and where the cable stays cut, the one that has not the rendezvous waits on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from onym.checkpoint.steps import steps
from onym.storage.local import TEMPORARY_PREFIX
from tests.cli.test_train import assert_equal_bits, checkpoint, metrics
from tests.conftest import Run, write_book
from tests.train.test_ranks import RUN

STEPS = 240
LENGTH = ("--steps", STEPS, "--save-every", 20)
PEER_TIMEOUT = 12  # seconds
TO_END = 10  # more seconds, in which whoever has given the other up is to end
AN_AGENT = "torch/distributed/elastic/"  # in what torchrun itself says


def ip(*arguments: object) -> str:
    return subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def _why_not() -> str:
    """Why there can be no machines here, if so."""
    if getattr(os, "geteuid", lambda: 1)() != 0:
        return "only root may make network namespaces"
    if not os.environ.get("ONYM_PROVE"):
        return ""  # nothing of this is run
    try:
        ip("netns", "add", f"onym-try-{os.getpid()}")
        ip("netns", "delete", f"onym-try-{os.getpid()}")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"
    return ""


pytestmark = [pytest.mark.prove, pytest.mark.skipif(bool(why := _why_not()), reason=why)]


class Machines:
    """Two machines, the cable that joins them, and the torchrun of each."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.names = [f"onym-{side}-{os.getpid()}" for side in "ab"]
        self.said = [folder / f"said-{side}" for side in "ab"]
        self._folder = folder
        # One thread each, as two processes on one machine with two cores have: the order of sums is theirs.
        self._environment = {**environment, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        self._launchers: list[subprocess.Popen[bytes]] = []

    def join(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.names
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
        for number, name in enumerate(self.names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def pull_the_plug(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def lose_every_packet(self) -> None:
        """As a switch that has failed does: both see a cable in order, and send to an address that nobody has."""
        for number, name in enumerate(self.names, 1):
            nobody = ("lladdr", "02:00:00:00:00:00", "nud", "permanent", "dev", "cable")
            ip("-n", name, "neighbour", "replace", f"10.77.0.{3 - number}", *nobody)

    def plug_in(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def train(self, *arguments: object, max_restarts: int = 0) -> None:
        """``onym train`` by a torchrun on each, as docs/scale.md has it."""
        for number, name in enumerate(self.names, 1):
            machine = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")
            torchrun = (
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=book"),
                *("--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500", f"--rdzv-conf=is_host={2 - number}"),
                *(f"--local-addr=10.77.0.{number}", f"--max-restarts={max_restarts}"),
            )
            train = ("-m", "onym", "train", *map(str, arguments), "--peer-timeout", str(PEER_TIMEOUT))
            out, error = (self.said[number - 1].with_suffix(suffix).open("wb") for suffix in (".out", ".err"))
            with out, error:
                launcher = subprocess.Popen(
                    [*machine, *torchrun, *train], cwd=self._folder, env=self._environment, stdout=out, stderr=error
                )
            self._launchers.append(launcher)

    def workers(self) -> list[int]:
        """The training process of each."""
        found = []
        for name in self.names:
            for pid in map(int, ip("netns", "pids", name).split()):
                with suppress(OSError):
                    if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                        found.append(pid)
        return found

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        limit = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < limit, self.all_said()
            time.sleep(0.005)

    def wait_for(self, until: Callable[[], bool]) -> None:
        """What is to happen while they train."""
        self.wait(lambda: until() or any(each.poll() is not None for each in self._launchers), 120)
        assert all(each.poll() is None for each in self._launchers), self.all_said()

    def end(self, seconds: float) -> list[int]:
        """The exit codes of both torchruns."""
        self.wait(lambda: all(each.poll() is not None for each in self._launchers), seconds)
        return [each.returncode for each in self._launchers]

    def out(self, machine: int) -> str:
        return self.said[machine].with_suffix(".out").read_text(encoding="utf-8")

    def of_onym(self, machine: int) -> list[str]:
        """What a machine says on standard error, up to where its torchrun begins to; without torch's warnings in C++."""
        lines = self.said[machine].with_suffix(".err").read_text(encoding="utf-8").splitlines()
        agent = next((number for number, line in enumerate(lines) if AN_AGENT in line), len(lines))
        return [line for line in lines[:agent] if not line.startswith("[W")]

    def all_said(self) -> str:
        return "\n".join(path.with_suffix(end).read_text()[-3000:] for path in self.said for end in (".out", ".err"))

    def remove(self) -> None:
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                for pid in map(int, ip("netns", "pids", name).split()):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for each in self._launchers:
            with suppress(ProcessLookupError):
                each.kill()
            each.wait()
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.fixture
def machines(tmp_path: Path, environment: dict[str, str]) -> Iterator[Machines]:
    machines = Machines(tmp_path, environment)
    try:
        machines.join()
        yield machines
    finally:
        machines.remove()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing has disturbed, of two processes on one machine."""
    folder = tmp_path_factory.mktemp("straight")
    command = ("train", "--data", write_book(folder), *RUN, *LENGTH, "--processes", 2, "--name", "straight")
    environment = {**os.environ, "ONYM_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    called = [sys.executable, "-m", "onym", *map(str, command)]
    done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs/straight"


def assert_as_undisturbed(run: Path, straight: Path) -> None:
    assert_equal_bits(checkpoint(straight, STEPS), checkpoint(run, STEPS))
    mine, theirs = ([(row["step"], row.get("train_loss")) for row in metrics(each)] for each in (run, straight))
    assert mine == theirs


def assert_whole(run: Path, onym_process: Run) -> None:
    """All that is kept is whole, nothing is there by halves, and nobody is taken to be writing still."""
    verified = onym_process("verify", run)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert not [path for path in run.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]
    assert all((folder / "manifest.json").exists() for folder in (run / "checkpoints").iterdir())


def test_two_machines_train_what_two_processes_of_one_do(
    machines: Machines, book: Path, straight: Path, tmp_path: Path
) -> None:
    machines.train("--data", book, *RUN, *LENGTH, "--name", "x")
    assert machines.end(120) == [0, 0], machines.all_said()
    assert machines.out(0).count("proof ") == 1
    assert machines.out(1) == "", "one of them talks"
    assert [machines.of_onym(machine) for machine in (0, 1)] == [[], []]
    assert_as_undisturbed(tmp_path / "runs/x", straight)


@pytest.mark.parametrize("cut", [Machines.pull_the_plug, Machines.lose_every_packet])
def test_cut_for_good_both_end_and_each_says_why_once(
    machines: Machines, book: Path, straight: Path, tmp_path: Path, onym_process: Run, cut: Callable[[Machines], None]
) -> None:
    run = tmp_path / "runs/x"
    machines.train("--data", book, *RUN, *LENGTH, "--name", "x")
    machines.wait_for(lambda: (run / "checkpoints/step-000000060/manifest.json").exists())
    workers = machines.workers()
    assert len(workers) == 2
    cut(machines)
    machines.wait(lambda: not machines.workers(), PEER_TIMEOUT + TO_END)
    newest = steps(run / "checkpoints")[-1]
    for number in (0, 1):
        (said,) = machines.of_onym(number)
        assert re.fullmatch(
            rf"onym: Process {number} lost its connection to another one, which has died, or did not answer within "
            rf"--peer-timeout {PEER_TIMEOUT} \(Timed out waiting [^()]+\)\. The same command continues from step {newest}\.",
            said,
        ), said
    # The one whose torchrun has ended; the other one's cannot ask who is there, and has not taken note of its worker's end.
    assert re.search(r"exitcode *: 2 ", machines.said[0].with_suffix(".err").read_text())
    assert _exit_code(workers[1]) == 2
    assert_whole(run, onym_process)
    done = onym_process("train", "--data", book, *RUN, *LENGTH, "--processes", 2, "--name", "x", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert f"Continuing after step {newest} of {STEPS}" in done.stdout
    assert_as_undisturbed(run, straight)


def _exit_code(pid: int) -> int:
    """Of a process that has ended, and whose parent has not asked for it yet."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[0] == "Z"
    return os.waitstatus_to_exitcode(int(fields[-1]))


def test_cut_for_too_long_while_it_saves_torchrun_goes_on_when_it_is_mended(
    machines: Machines, book: Path, straight: Path, tmp_path: Path, onym_process: Run
) -> None:
    run = tmp_path / "runs/x"
    machines.train("--data", book, *RUN, *LENGTH, "--save-every", 1, "--name", "x", max_restarts=3)
    machines.wait_for(lambda: (run / "checkpoints/step-000000060/manifest.json").exists())
    machines.wait_for(lambda: any((run / "checkpoints").glob(f"{TEMPORARY_PREFIX}*")))
    machines.pull_the_plug()
    began = time.monotonic()
    machines.wait(lambda: not machines.workers(), PEER_TIMEOUT + TO_END)
    newest = steps(run / "checkpoints")[-1]
    machines.wait(lambda: time.monotonic() > began + PEER_TIMEOUT + 4, PEER_TIMEOUT)
    machines.plug_in()
    assert machines.end(180) == [0, 0], machines.all_said()
    assert re.findall(r"Continuing after step (\d+) of", machines.out(0)) == [str(newest)]
    assert [len(machines.of_onym(machine)) for machine in (0, 1)] == [1, 1]
    assert_as_undisturbed(run, straight)
    assert_whole(run, onym_process)


def test_cut_for_less_it_is_as_if_nothing_had_been(machines: Machines, book: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/x"
    machines.train("--data", book, *RUN, *LENGTH, "--name", "x")
    machines.wait_for(lambda: (run / "checkpoints/step-000000060/manifest.json").exists())
    machines.pull_the_plug()
    began = time.monotonic()
    machines.wait(lambda: time.monotonic() > began + 1, PEER_TIMEOUT)
    then = steps(run / "checkpoints")
    machines.wait(lambda: time.monotonic() > began + PEER_TIMEOUT / 3, PEER_TIMEOUT)
    assert steps(run / "checkpoints") == then, "it waits"
    machines.plug_in()
    assert machines.end(120) == [0, 0], machines.all_said()
    assert [machines.of_onym(machine) for machine in (0, 1)] == [[], []]
    assert_as_undisturbed(run, straight)


@pytest.mark.parametrize("machine", [0, 1])
def test_one_that_is_killed_on_either_machine_is_started_again_with_the_other(
    machines: Machines, book: Path, straight: Path, tmp_path: Path, machine: int
) -> None:
    """The torchrun of the other machine may not count it as a restart: its own process need not have failed yet."""
    run = tmp_path / "runs/x"
    machines.train("--data", book, *RUN, *LENGTH, "--name", "x", max_restarts=1)
    machines.wait_for(lambda: (run / "checkpoints/step-000000060/manifest.json").exists())
    os.kill(machines.workers()[machine], signal.SIGKILL)
    assert machines.end(120) == [0, 0], machines.all_said()
    assert machines.out(0).count("Continuing after step ") == 1
    assert_as_undisturbed(run, straight)
