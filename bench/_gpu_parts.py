"""The parts of bench/gpu.py: their processes, what their turns give, their tables and targets."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch

import _training_peers
from _gpu_children import DECODING_SHAPES, TABLES, Common
from _gpu_processes import Ask, Job, Turns, take_turns
from onym.gpt.hardware import read_bandwidth
from onym.gpt.kinds import Arch
from onym.train.metering import Peak, training_flops_per_token
from onym.train.precision import choose_compute

LADDER_SECONDS = 150.0
_NAME = 46  # columns
Row = dict[str, Any]


def _ask(job: Job, **what: Any) -> Ask:
    return lambda number: job.turn(**what, number=number)


@dataclass
class Bench:
    """What all parts know."""

    given: argparse.Namespace
    common: Common
    peak: Peak
    gib: float
    """Device memory for all children."""
    ends: float
    """Of :func:`time.monotonic`."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    @property
    def full(self) -> bool:
        """Whether it is no trial."""
        return not self.common.tiny


@dataclass
class Target:
    """What is asked for, and what it is."""

    what: str
    value: float
    asked: float
    at_most: bool = False
    aim: float | None = None

    @property
    def reached(self) -> bool:
        return self.value <= self.asked if self.at_most else self.value >= self.asked

    def __str__(self) -> str:
        asked = f"{'at most' if self.at_most else 'at least'} {self.asked:g}" + (f", aim {self.aim:g}" if self.aim else "")
        return f"  {self.what:<66}{self.value:8.3f}  ({asked}: {'reached' if self.reached else 'missed'})"


@dataclass
class Part:
    """One of them: its processes, its rows in the order of the table, and what it found."""

    bench: Bench
    jobs: list[Job] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    """By name; one that has no figures has ``failed``."""
    about: dict[str, Any] = field(default_factory=dict)
    seconds: float = 30.0
    """That its turns take, about."""

    name = ""

    def measure(self, deadline: float) -> None:
        """Take the turns; its processes are ready, or have failed."""
        raise NotImplementedError

    def targets(self) -> list[Target]:
        """Those whose figures are there."""
        return []

    def lines(self) -> list[str]:
        """The table, without rows."""
        raise NotImplementedError

    def row(self, row: Row) -> str:
        """The figures of one."""
        raise NotImplementedError

    def leave_out(self, reason: str) -> None:
        """All rows that have no figures."""
        for name, row in self.rows.items():
            if not row:
                self.rows[name] = {"failed": reason}

    def table(self) -> str:
        """As it is printed."""
        rows = [f"  {name:<{_NAME}}{row['failed'] if 'failed' in row else self.row(row)}" for name, row in self.rows.items()]
        return "\n".join([*self.lines(), *rows])


class Training(Part):
    """``gpt2`` or ``decoder``."""

    def __init__(self, bench: Bench, name: str) -> None:
        narrow, batch = bench.common.dtype != "float32", bench.common.batch
        gib = batch * (0.7 if narrow else 1.4) + 3 if bench.full else 1.0
        jobs = [
            Job(each, {"kind": "training", "given": {"table": name, "name": each}}, gib, 3.0 if bench.full else 1.0)
            for each in TABLES[name]
        ]
        super().__init__(bench, jobs, {each: {} for each in TABLES[name]}, seconds=8.0 * len(jobs) if bench.full else 5.0)
        self.name = name

    def measure(self, deadline: float) -> None:
        steps, setting = self.bench.given.steps, self.bench.common.setting()
        asks: dict[str, Ask] = {}
        for job in self.jobs:
            if job.live:
                asks[job.name] = _ask(job, steps=steps)
            else:
                self.rows[job.name] = {"failed": job.failed}
        turns = take_turns(self.name, asks, self.bench.given.rounds, deadline)
        tokens = setting.batch * setting.shape["context_length"]
        self.about["tokens_per_step"] = tokens
        for job in self.jobs:
            if job.name in turns.answers:
                self.rows[job.name] = self._row(job, turns, tokens)
            elif job.name in turns.failed:
                self.rows[job.name] = {"failed": turns.failed[job.name]}
        for name, row in self.rows.items():
            base = self.rows.get(self._base(name), {})
            if "failed" not in row and base is not row and name != "onym, by default" and "tokens_per_second" in base:
                row["onym_is_times_as_fast"] = base["tokens_per_second"] / row["tokens_per_second"]

    def _row(self, job: Job, turns: Turns, tokens: int) -> Row:
        answers = turns.answers[job.name]
        rates = [tokens / answer["seconds"] for answer in answers]
        last = answers[-1]
        if not math.isfinite(last["loss"]):
            return {"failed": f"its loss is {last['loss']} after {last['steps']} steps"}
        arch: Arch = "llama" if "llama" in job.name.lower() else "qwen3" if "qwen3" in job.name.lower() else "gpt2"
        flops = training_flops_per_token(_training_peers.config_of(self.bench.common.setting(), arch))
        rate = statistics.median(rates)
        return {
            "tokens_per_second": rate,
            "rates": rates,
            "mfu": rate * flops / self.bench.peak.flops,
            "peak_mib": max(answer["peak_mib"] for answer in answers),
            "reserved_mib": max(answer["reserved_mib"] for answer in answers),
            "compile_s": job.ready["compile_s"],
            "first_loss": job.ready["first_loss"],
            "loss": last["loss"],
            "steps": last["steps"],
            "note": job.ready["note"],
        }

    def _base(self, name: str) -> str:
        """The row of onym's that one is compared with."""
        return "onym" if self.name == "gpt2" else "onym, llama" if "llama" in name.lower() else "onym, qwen3"

    def targets(self) -> list[Target]:
        found = []
        for name in dict.fromkeys(map(self._base, self.rows)):
            if "mfu" in (row := self.rows[name]):
                found.append(Target(f"{self.name}: MFU of {name}", row["mfu"], 0.45, aim=0.5))
            ratios = [
                other["onym_is_times_as_fast"]
                for other_name, other in self.rows.items()
                if "onym_is_times_as_fast" in other and self._base(other_name) == name
            ]
            if ratios:
                found.append(Target(f"{self.name}: {name} / the fastest peer", min(ratios), 1.1))
        return found

    def lines(self) -> list[str]:
        common, setting = self.bench.common, self.bench.common.setting()
        shape = {**setting.shape, **(setting.gated if self.name == "decoder" else {})}
        sizes = ", ".join(f"{key} {value:,}" for key, value in shape.items())
        how = "nothing compiled" if common.eager else "compiled"
        steps = next((row["steps"] for row in self.rows.values() if "steps" in row), 0)
        return [
            f"{self.name}: {sizes}; {common.batch} sequences a step; {common.dtype}, {how}; loss after {steps} steps",
            f"  {'':<{_NAME}}{'tokens/s':>10}{'(min .. max)':>24}{'MFU':>7}{'onym is':>9}{'MiB':>9}{'reserved':>9}"
            f"{'compile':>9}{'loss':>8}",
        ]

    def row(self, row: Row) -> str:
        spread = f"({min(row['rates']):,.0f} .. {max(row['rates']):,.0f})"
        ratio = f"{row['onym_is_times_as_fast']:.2f}x" if "onym_is_times_as_fast" in row else "-"
        memory = f"{row['peak_mib']:>9,.0f}{row['reserved_mib']:>9,.0f}"
        return (
            f"{row['tokens_per_second']:>10,.0f}{spread:>24}{row['mfu']:>7.1%}{ratio:>9}{memory}{row['compile_s']:>7.0f} s"
            f"{row['loss']:>8.3f}  {row['note'][:90]}".rstrip()
        )


class Saving(Part):
    """``saving``."""

    name = "saving"
    FIRST, SAVE, COPY, FILES = "the first save, which allocates", "save, until it returns", "copy", "what was written"

    def __init__(self, bench: Bench) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=bench.given.folder, prefix="onym-bench-", ignore_cleanup_errors=True)
        job = Job("saving", {"kind": "saving", "given": {"folder": self._folder.name}}, 5.0 if bench.full else 1.0, 3.0)
        rows: dict[str, Row] = {name: {} for name in (self.FIRST, self.SAVE, self.COPY, self.FILES)}
        super().__init__(bench, [job], rows, seconds=30.0 if bench.full else 5.0)

    def measure(self, deadline: float) -> None:
        (job,) = self.jobs
        if not job.live:
            self.leave_out(job.failed)
            return
        self.about |= job.ready
        first = take_turns("first save", {self.FIRST: _ask(job, what="save")}, 1, deadline)
        self._take(first)
        asks = {self.COPY: _ask(job, what="copy"), self.SAVE: _ask(job, what="save")}
        self._take(take_turns("saving", asks, self.bench.given.rounds, deadline))
        check = take_turns("written files", {self.FILES: _ask(job, what="check")}, 1, deadline)
        self.rows[self.FILES] = check.answers.get(self.FILES, [{"failed": check.failed.get(self.FILES, "")}])[0]
        if "seconds" in self.rows[self.SAVE] and "seconds" in self.rows[self.COPY]:
            self.rows[self.SAVE]["times_the_copy"] = self.rows[self.SAVE]["seconds"] / self.rows[self.COPY]["seconds"]

    def _take(self, turns: Turns) -> None:
        for name, answers in turns.answers.items():
            all_seconds = [answer["seconds"] for answer in answers]
            self.rows[name] = {"seconds": statistics.median(all_seconds), "all": all_seconds}
            if "written_after_s" in answers[0]:
                self.rows[name]["written_after_s"] = statistics.median(answer["written_after_s"] for answer in answers)
        for name, reason in turns.failed.items():
            self.rows[name] = {"failed": reason}

    def targets(self) -> list[Target]:
        found = []
        if "times_the_copy" in self.rows[self.SAVE]:
            found.append(
                Target("saving: stall / one copy of the same", self.rows[self.SAVE]["times_the_copy"], 1.2, at_most=True)
            )
        if "equal" in (row := self.rows[self.FILES]):
            found.append(Target("saving: files equal the state at the call", float(row["equal"]), 1.0))
        return found

    def lines(self) -> list[str]:
        size = f"{self.about['bytes'] / 1e9:,.3f} GB in {self.about['tensors']} tensors" if self.about else "no state"
        buffers = "pinned buffers" if self.bench.common.device != "cpu" else "buffers"
        return [f"saving: model, AdamW and guard, {size}; a copy is into {buffers} that are there already"]

    def row(self, row: Row) -> str:
        if "compared" in row:
            verdict = "equal to the state at the call" if row["equal"] else f"DIFFERENT: {', '.join(row['different'])}"
            return f"{row['compared']} tensors, {verdict}; {row['changed_since']} changed meanwhile"
        spread = f"({min(row['all']) * 1e3:,.1f} .. {max(row['all']) * 1e3:,.1f})"
        text = f"{row['seconds'] * 1e3:>10,.1f} ms{spread:>22}"
        text += f"{row['times_the_copy']:>7.2f}x the copy" if "times_the_copy" in row else ""
        return text + (f"; durable {row['written_after_s']:.1f} s later" if "written_after_s" in row else "")


class Decoding(Part):
    """``decoding``."""

    name = "decoding"

    def __init__(self, bench: Bench) -> None:
        self._where: dict[str, Job] = {}
        self._of: dict[str, tuple[str, int, str]] = {}  # row -> shape, slots, program
        super().__init__(bench, seconds=60.0 if bench.full else 10.0)
        common = bench.common
        dtype = "bf16" if common.dtype == "bfloat16" else "fp32"
        shapes = ["gpt2-medium", "gpt2-small", "gpt2-xl"][: 1 if common.tiny else 3 if bench.gib >= 24 else 2]
        groups: list[tuple[str, dict[str, Row]]] = []
        for shape in shapes:
            groups.append((shape, self._onym(shape, [(slots, dtype, way) for slots in (1, 8) for way in ("off", "auto")])))
            if not common.eager:
                groups.append((shape, self._onym(shape, [(1, dtype, "on")])))
            groups.append((shape, self._transformers(shape, "dynamic", (1, 8))))
        for slots in (1, 8):
            for shape in shapes:
                if common.eager:
                    groups[0][1].update(self._onym(shape, [(slots, "int8", "off")]))
                    continue
                groups.append((shape, self._onym(shape, [(slots, "int8", "on")])))
                if slots == 8:
                    groups.append((shape, self._onym(shape, [(slots, dtype, "on")])))
        for shape in shapes[:2] if not common.eager else []:
            groups.append((shape, self._transformers(shape, "static", (1,))))
        for shape, rows in groups:
            self._add(shape, rows)
        order = {name: (list(DECODING_SHAPES).index(shape), slots) for name, (shape, slots, _) in self._of.items()}
        self.rows = {name: {} for name in sorted(self._where, key=lambda name: order[name])}

    def _onym(self, shape: str, rows: list[tuple[int, str, str]]) -> dict[str, Row]:
        """Rows of slots, dtype and way."""
        return {
            self._named(shape, slots, f"onym {dtype} {way}"): {"program": "onym", "way": way, "dtype": dtype, "slots": slots}
            for slots, dtype, way in rows
        }

    def _transformers(self, shape: str, cache: str, all_slots: tuple[int, ...]) -> dict[str, Row]:
        program = f"transformers {cache}{' compiled' if cache == 'static' else ''}"
        return {
            self._named(shape, slots, program): {"program": "transformers", "cache": cache, "slots": slots}
            for slots in all_slots
        }

    def _named(self, shape: str, slots: int, program: str) -> str:
        name = f"{shape}, {slots}: {program}"
        self._of[name] = shape, slots, program
        return name

    def _add(self, shape: str, rows: dict[str, Row]) -> None:
        given = self.bench.given
        request = {"shape": shape, "rows": rows, "prompt": given.prompt, "tokens": given.tokens}
        gib = {"gpt2-small": 1.5, "gpt2-medium": 2.5, "gpt2-xl": 6.0}[shape] if self.bench.full else 1.0
        least = {"gpt2-xl": 45.0}.get(shape, 20.0) if self.bench.full else 5.0
        title = (
            next(iter(rows)) if len(rows) == 1 else f"{shape}: {next(iter(rows)).split(': ')[1].split()[0]}, {len(rows)} rows"
        )
        job = Job(title, {"kind": "decoding", "given": request}, gib, gib, least)
        self.jobs.append(job)
        self._where |= dict.fromkeys(rows, job)

    def measure(self, deadline: float) -> None:
        asks: dict[str, Ask] = {}
        for name in self.rows:
            job = self._where[name]
            if not job.live:
                self.rows[name] = {"failed": job.failed}
            elif name in job.ready["failed"]:
                self.rows[name] = {"failed": job.ready["failed"][name]}
            else:
                asks[name] = _ask(job, row=name)
        bandwidth = self.about["bandwidth"] = read_bandwidth(torch.device(self.bench.common.device))
        if self.bench.common.device != "cpu":
            torch.cuda.empty_cache()
        turns = take_turns("decoding", asks, self.bench.given.rounds, deadline)
        for name, answers in turns.answers.items():
            rates = [answer["tokens_per_second"] for answer in answers]
            gpu = [answer["gpu_ms"] for answer in answers if answer["gpu_ms"] is not None]
            self.rows[name] = {
                "tokens_per_second": statistics.median(rates),
                "rates": rates,
                "step_ms": statistics.median(answer["step_ms"] for answer in answers),
                "gpu_ms": statistics.median(gpu) if gpu else None,
                "bandwidth_share": statistics.median(answer["bytes_per_second"] for answer in answers) / bandwidth,
                **self._where[name].ready["rows"][name],
            }
        for name, reason in turns.failed.items():
            self.rows[name] = {"failed": reason}
        for name, row in self.rows.items():
            shape, slots, program = self._of[name]
            theirs = self.rows.get(f"{shape}, {slots}: transformers dynamic", {}).get("tokens_per_second")
            if theirs and "failed" not in row and "transformers" not in program:
                row["of_transformers"] = row["tokens_per_second"] / theirs

    def targets(self) -> list[Target]:
        found = []
        for shape in ("gpt2-medium", "gpt2-xl"):
            shares = {
                name: row["bandwidth_share"]
                for name, row in self.rows.items()
                if self._of[name][:2] == (shape, 1) and "bandwidth_share" in row and "onym" in name and "int8" not in name
            }
            if shares:
                best = max(shares, key=lambda name: shares[name])
                found.append(Target(f"decoding: {best}: share of the bandwidth", shares[best], 0.7))
        return found

    def lines(self) -> list[str]:
        given = self.bench.given
        bandwidth = f"bandwidth {self.about['bandwidth'] / 1e9:,.1f} GB/s" if self.about else "bandwidth not measured"
        return [
            f"decoding: {given.tokens} tokens after prompts of {given.prompt}; {bandwidth}",
            f"  {'':<{_NAME}}{'tokens/s':>10}{'(min .. max)':>20}{'ms':>9}{'GPU ms':>8}{'share':>7}{'/ transformers':>16}"
            f"{'ready':>8}",
        ]

    def row(self, row: Row) -> str:
        spread = f"({min(row['rates']):,.0f} .. {max(row['rates']):,.0f})"
        gpu = f"{row['gpu_ms']:.3f}" if row["gpu_ms"] is not None else "-"
        ratio = f"{row['of_transformers']:.2f}x" if "of_transformers" in row else "-"
        return (
            f"{row['tokens_per_second']:>10,.0f}{spread:>20}{row['step_ms']:>9.3f}{gpu:>8}{row['bandwidth_share']:>7.1%}"
            f"{ratio:>16}{row['compile_s']:>6.0f} s  {row['note'][:90]}".rstrip()
        )


class Ladder(Part):
    """``ladder``."""

    name = "ladder"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, rows={"ladder": {}}, seconds=LADDER_SECONDS if bench.full else 20.0)

    def measure(self, deadline: float) -> None:
        from rich.console import Console

        from onym.gpt.config import GPTConfig
        from onym.tools.ladder.ladder import BOOK_VOCABULARY, RUNGS, climb
        from onym.train.display import Display

        common, shape = self.bench.common, self.bench.common.setting().shape
        rungs = RUNGS[:2] if common.eager else RUNGS
        config = GPTConfig.from_dict(shape) if common.tiny else GPTConfig.preset("gpt2-small", vocab_size=BOOK_VOCABULARY)
        compute = choose_compute(common.device, "auto")
        batch = max(1, common.batch // 4)
        display = Display(Console(stderr=True, highlight=False, soft_wrap=True, emoji=False))
        minutes = max(1.0, min(deadline - time.monotonic(), self.seconds if common.eager else 300.0)) / 60
        self.about["batch"] = batch
        ladder = climb(config, batch, compute, minutes, display, rungs=rungs)
        del self.rows["ladder"]
        for figure in ladder.figures:
            values = {
                key: value for key, value in dataclasses.asdict(figure).items() if key not in ("number", "title", "reason")
            }
            self.rows[f"{figure.number:>2} {figure.title}"] = {"failed": figure.reason} if figure.reason else values

    def lines(self) -> list[str]:
        batch = f"batch {self.about['batch']}" if self.about else "onym tools ladder"
        return [
            f"ladder: {batch}",
            f"  {'':<{_NAME}}{'tokens/s':>10}{'x before':>10}{'x first':>10}{'used':>8}{'MiB':>10}{'A100':>10}{'x before':>10}",
        ]

    def row(self, row: Row) -> str:
        def cell(value: float | None, form: str, width: int) -> str:
            return f"{'-' if value is None else format(value, form):>{width}}"

        return (
            f"{row['tokens_per_second']:>10,.0f}{cell(row['factor'], '.2f', 10)}{cell(row['total'], '.2f', 10)}"
            f"{cell(row['utilisation'], '.1%', 8)}{cell((row['memory_bytes'] or 0) / 2**20, ',.0f', 10)}"
            f"{cell(row['a100_tokens_per_second'], ',.0f', 10)}{cell(row['a100_factor'], '.2f', 10)}"
        )
