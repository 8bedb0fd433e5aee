"""How much sooner a restarted run takes its first compiled step: target, a fifth of the time of the first start.

    python bench/warm_start.py [--preset mini] [--rounds 3] [--batch-size 8] [--vocab-size 8192]

Each start is a process of its own, timed from before it is there to the end of its first training step, Python's start and all
imports included. Cold: nothing is in the cache, and the temporary folder is empty. Warm: the cache that the cold start of the
round left, and the temporary folder empty again, as after a restart of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measure import rounds, save_results, table

TARGET = 1 / 5
CHILD = """
import json, sys, torch
from onym import GPT, GPTConfig
from onym.compile.cache import warm_start
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper
preset, vocab_size, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
compute = choose_compute("auto", "auto")
compute.set_deterministic(False)
torch.manual_seed(0)
model = GPT(GPTConfig.preset(preset, vocab_size=vocab_size)).to(compute.device)
stepper = Stepper(model, OptimizationOptions(optimizer="adamw"), compute)
batch = torch.randint(0, vocab_size, (2, batch_size, model.config.context_length), device=compute.device).unbind()
with warm_start(True, sys.exit) as warm:
    compilation, _ = prepare(stepper, batch, [batch_size], True)
assert compilation.compiled, compilation.reason
loss = float(stepper(batch, 1e-3, 0).loss)
print(json.dumps([compilation.seconds, warm.counts.found, warm.counts.made, loss]), flush=True)
"""


def start(place: Path, arguments: list[str]) -> tuple[float, float, int, int, float]:
    """Seconds to the first step, seconds of it that compiling took, graphs found, graphs made, loss."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR", "TRITON"))}
    with tempfile.TemporaryDirectory() as temporary:
        environment = {**inherited, "ONYM_CACHE_DIR": str(place), "TMPDIR": temporary}
        began = time.perf_counter()
        command = [sys.executable, "-c", CHILD, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - began
        assert process.returncode == 0, process.returncode
    return (seconds, *json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    given = parser.parse_args()
    arguments = [given.preset, str(given.vocab_size), str(given.batch_size)]
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    compiling: dict[str, list[float]] = {"cold": [], "warm": []}
    losses = set()
    for _ in rounds(given.rounds):
        with tempfile.TemporaryDirectory() as place:
            for name in seconds:
                total, compiled, found, made, loss = start(Path(place), arguments)
                assert (found > 0 and not made) if name == "warm" else not found, f"{name}: {found} found, {made} made"
                seconds[name].append(total)
                compiling[name].append(compiled)
                losses.add(loss)
            size = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    assert len(losses) == 1, f"other code gives other bits: {losses}"
    ratio = 1 / table(f"{given.preset}, batch {given.batch_size}: to the end of the first step", seconds, "cold")["warm"]
    part = 1 / table("of these, compiling and the dry run", compiling, "cold")["warm"]
    verdict = "met" if ratio <= TARGET else "MISSED"
    print(f"\n  warm / cold: {ratio:.3f} (target {TARGET:.3f}: {verdict}); of compiling: {part:.3f}")
    print(f"  {size / 1e6:.1f} MB in the cache")
    save_results(
        "warm_start",
        {
            "preset": given.preset,
            "batch_size": given.batch_size,
            "vocab_size": given.vocab_size,
            "seconds": seconds,
            "compiling_seconds": compiling,
            "ratio": ratio,
            "compiling_ratio": part,
            "target": TARGET,
            "cache_bytes": size,
        },
    )


if __name__ == "__main__":
    main()
