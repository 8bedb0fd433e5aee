"""All that a GPU changes, in one table within minutes: training, the stall of a save, decoding; against the peers there.

    python bench/gpu.py [--minutes 7] [--only training saving decoding ladder] [--batch 32] [--one-after-another] [--out FILE]
    python bench/gpu.py --device cpu --tiny [--eager]        the same on a CPU in tiny shapes, to try this file

It needs torch, numpy and what Onym itself imports (blake3, platformdirs, tokenizers, tyro; rich for the ladder), but not an
installed Onym. transformers and llms_from_scratch are measured where they are. Each program runs in a process of its own,
which computes only while it is asked to. Those of a part start, and compile, at the same time; then they take turns, in an
order that turns. What fails, is not installed or not ready in time costs its own row, which says so. The parts, the most
important first:

    gpt2      GPT-2 124M (context 1024, vocabulary 50304, 32 sequences a step; fewer on GPUs below 64 GiB), bf16 where the GPU
              has it, else fp32; compiled. A turn is some steps, waited for at its end alone. onym is what onym train does, with
              the guard; the peers' loss is compiled together with their model. onym by default has its own optimizer, Muon
    saving    until Checkpointer.save returns, with the whole state of that training on the GPU, against one copy of the same
              tensors into pinned buffers that are there already; and whether the files have the state at the call, bit by bit,
              although steps were taken meanwhile
    decoder   the same as gpt2 of onym's llama and qwen3 in the preset small (124M), against transformers'
    decoding  three shapes of GPT-2 with random weights, 1 and 8 texts: the step as it is written (off), as a CUDA graph (auto),
              compiled and then captured (on), in bf16 and int8; transformers' generate with the dynamic cache and, compiled,
              the static one. The share is of the bandwidth: weights once a step, and the keys and values that are held. The
              processes compile beside each other, so what tuning chooses may not be what it would choose alone
    ladder    the rungs of onym tools ladder, each a new process, four of which compile: at least 150 seconds, so only where
              they are left, or with --only ladder

Model FLOP/s utilisation (MFU) is of the documented peak where Onym knows the GPU, else of the rate of a large product here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

import torch  # noqa: E402

from _gpu_children import Common, reason_of, serve  # noqa: E402
from _gpu_parts import LADDER_SECONDS, Bench, Decoding, Ladder, Part, Saving, Target, Training  # noqa: E402
from _gpu_processes import LEFT_OUT, close_all, say, start_all  # noqa: E402
from _measure import RESULTS, machine  # noqa: E402
from onym.errors import OnymError  # noqa: E402
from onym.train.metering import matmul_flops, peak_of  # noqa: E402
from onym.train.precision import Compute, choose_compute  # noqa: E402

GIB = 2**30
PARTS = ("gpt2", "saving", "decoder", "decoding", "ladder")
ALIASES = {"training": ("gpt2", "decoder")}
ONYM_NEEDS = ("blake3", "platformdirs", "rich", "tokenizers", "tyro")
LAST_SECONDS = 15.0
"""To end processes, and to print."""


def gpu_of(compute: Compute) -> dict[str, Any]:
    """Its name, memory, driver and CUDA, and the rate of a large product."""
    device = compute.device
    if device.type != "cuda":
        return {}
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    properties = torch.cuda.get_device_properties(device)
    product = matmul_flops(device, compute.dtype)
    torch.cuda.empty_cache()
    return {
        "gpu": properties.name,
        "gpu_gib": round(properties.total_memory / GIB, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "product_flops": product,
    }


def say_what_is_missing() -> None:
    """In one sentence, since each row would say it for itself."""
    missing = [name for name in ONYM_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        say(f"not installed, and Onym needs them: pip install {' '.join(missing)}")


def batch_for(gib: float) -> int:
    """Sequences of 1,024 tokens in a step, where the GPU has so much memory."""
    return next((batch for least, batch in ((63, 32), (36, 16), (20, 8), (10, 4)) if gib >= least), 2)


def waves_of(bench: Bench, chosen: list[str]) -> list[list[Part]]:
    """The parts; those of a wave start their processes at the same time."""
    makers = {
        "gpt2": lambda: Training(bench, "gpt2"),
        "saving": lambda: Saving(bench),
        "decoder": lambda: Training(bench, "decoder"),
        "decoding": lambda: Decoding(bench),
        "ladder": lambda: Ladder(bench),
    }
    waves = [[makers[name]() for name in names if name in chosen] for names in (PARTS[:2], PARTS[2:4], PARTS[4:])]
    return [wave for wave in waves if wave]


def run_wave(bench: Bench, wave: list[Part], later: float, report: Report) -> None:
    """Start the processes of some parts, then measure one part after the other.

    Args:
        later: seconds that what follows needs at least.
    """
    jobs = [job for part in wave for job in part.jobs]
    turns = sum(part.seconds for part in wave)
    spare = bench.left - turns - later
    names = " and ".join(part.name for part in wave)
    say(f"{names}: {bench.left:.0f} s left; ready within {max(spare, bench.left / 3):.0f} s, then about {turns:.0f} s")
    try:
        at_once = 1 if bench.given.one_after_another else os.cpu_count() or 1
        start_all(jobs, dataclasses.asdict(bench.common), time.monotonic() + max(spare, bench.left / 3), bench.gib, at_once)
        for number, part in enumerate(wave):
            following = sum(other.seconds for other in wave[number + 1 :])
            try:
                part.measure(bench.ends - later - following)
            except Exception as error:  # a mistake here costs its part
                traceback.print_exc()
                part.leave_out(reason_of(error))
            part.leave_out("no figure")
            report.save()
            close_all(part.jobs)
    finally:
        close_all(jobs)


@dataclass
class Report:
    """What is printed and saved at the end."""

    bench: Bench
    parts: list[Part]
    facts: Mapping[str, Any]
    out: Path | None
    began: float = field(default_factory=time.monotonic)

    def save(self) -> None:
        """Write what is there so far."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        common = dataclasses.asdict(self.bench.common)
        results = {
            "machine": {**machine(), **self.facts},
            "peak": dataclasses.asdict(self.bench.peak),
            "settings": {**common, "rounds": self.bench.given.rounds, "steps": self.bench.given.steps},
            "seconds": time.monotonic() - self.began,
            "parts": {part.name: {**part.about, "rows": part.rows} for part in self.parts},
            "targets": [{**dataclasses.asdict(each), "reached": each.reached} for each in self.targets()],
        }
        self.out.write_text(json.dumps(results, indent=1) + "\n")

    def targets(self) -> list[Target]:
        return [target for part in self.parts for target in part.targets()]

    def show(self) -> None:
        """The table."""
        where = self.facts.get("gpu", "CPU")
        peak = f"peak {self.bench.peak.flops / 1e12:,.2f} TFLOP/s ({self.bench.peak.source})"
        print(
            f"\n{where}, torch {torch.__version__}, CUDA {self.facts.get('cuda', '-')}, {self.facts.get('driver', '-')}; {peak}"
        )
        print("\n".join(part.table() for part in self.parts))
        found = self.targets()
        print("targets" + (" (in tiny shapes they say nothing)" if self.bench.common.tiny else ""))
        print("\n".join(map(str, found)) or "  none measured")
        print(f"{time.monotonic() - self.began:.0f} s" + (f"; {self.out}" if self.out else ""), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; without it, CUDA where there is some")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *ALIASES], default=[])
    parser.add_argument("--batch", type=int, help="sequences in a training step")
    parser.add_argument("--rounds", type=int, help="turns of each, where there is time")
    parser.add_argument("--steps", type=int, help="in a turn of training")
    parser.add_argument("--one-after-another", action="store_true", help="start one process at a time, for little memory")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try this file")
    parser.add_argument("--eager", action="store_true", help="compile nothing, to try this file")
    parser.add_argument("--out", type=Path, help="JSON; without it bench/results/gpu.json, of a trial none")
    parser.add_argument("--folder", help="on the disk that is saved to; without it the system's for temporary files")
    parser.add_argument("--cache", help="of compiled code, kept; without it a new one, so that compiling takes what it takes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.rounds = given.rounds or (2 if given.tiny else 5)
    given.steps = given.steps or (2 if given.tiny else 10)
    given.prompt, given.tokens = (8, 16) if given.tiny else (32, 128)
    return given


def main() -> int:
    given = arguments()
    if given.child:
        serve(json.loads(given.child))
        return 0
    if given.device == "auto" and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so there is nothing to measure: --device cpu --tiny tries this file.")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is there is printed, and no process left
    say_what_is_missing()
    ends = time.monotonic() + 60 * given.minutes - (0.0 if given.tiny else LAST_SECONDS)
    try:
        compute = choose_compute(given.device, "auto")
    except OnymError as error:
        print(error, file=sys.stderr)
        return 2
    facts = gpu_of(compute)
    batch = given.batch or (2 if given.tiny else batch_for(facts.get("gpu_gib", 0.0)))
    common = Common(str(compute.device), str(compute.dtype).removeprefix("torch."), given.tiny, given.eager, batch)
    gib = torch.cuda.mem_get_info(compute.device)[0] / GIB - 3 if compute.device.type == "cuda" else math.inf
    bench = Bench(given, common, peak_of(compute), gib, ends)
    chosen = [each for name in given.only or PARTS for each in ALIASES.get(name, (name,))]
    out = given.out or (RESULTS / "gpu.json" if compute.device.type == "cuda" and not given.tiny and not given.only else None)
    with tempfile.TemporaryDirectory(prefix="onym-bench-", ignore_cleanup_errors=True) as fresh:
        os.environ["ONYM_CACHE_DIR"] = str(Path(given.cache or fresh, "onym"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(given.cache or fresh, "torch"))
        waves = waves_of(bench, chosen)
        report = Report(bench, [part for wave in waves for part in wave], facts, out)
        reason = "stopped before its turn"
        try:
            for number, wave in enumerate(waves):
                least = 0.0 if given.tiny else LADDER_SECONDS if wave[0].name == "ladder" and not given.only else 40.0
                if bench.left < max(least, 5.0):
                    say(f"{' and '.join(part.name for part in wave)}: {LEFT_OUT}")
                    continue
                later = [part for each in waves[number + 1 :] for part in each if part.name != "ladder"]
                run_wave(bench, wave, 1.5 * sum(part.seconds for part in later), report)
            reason = LEFT_OUT
        finally:
            for part in report.parts:
                part.leave_out(reason)
            report.save()
            report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
