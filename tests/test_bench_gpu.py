"""bench/gpu.py, which nobody can run on a GPU here, in full on a CPU: tiny shapes, nothing compiled, its real processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
DTYPES = ("bf16", "fp32")
"""Of which a machine decodes in one."""


def bench(
    folder: Path, *arguments: str, packages: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run it, and open what it saved."""
    out = folder / "gpu.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--eager", "--out", str(out), "--folder", str(folder)]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    results = json.loads(out.read_text())
    for part in results["parts"].values():
        for name, row in part["rows"].items():
            assert any(line.startswith(f"  {name} ") for line in done.stdout.splitlines()), (name, done.stdout)
            assert "failed" not in row or row["failed"] in done.stdout
    return done, results


def require_figures(row: dict[str, Any], *names: str) -> None:
    """All of them are there, and none is nothing."""
    assert "failed" not in row, row
    for name in names:
        assert math.isfinite(row[name]), (name, row)
        assert row[name] > 0, (name, row)


def test_every_row_has_its_figures(tmp_path: Path) -> None:
    done, results = bench(tmp_path, "--only", "training", "saving", "decoding")
    parts = {name: part["rows"] for name, part in results["parts"].items()}
    assert list(parts) == ["gpt2", "saving", "decoder", "decoding"]
    assert list(parts["gpt2"]) == ["onym", "onym, by default", "nanoGPT's recipe", "transformers", "the book, optimised"]
    assert list(parts["decoder"]) == ["onym, llama", "onym, qwen3", "transformers, Llama", "transformers, Qwen3"]
    training = {**parts["gpt2"], **parts["decoder"]}
    for row in training.values():
        require_figures(row, "tokens_per_second", "mfu", "peak_mib", "reserved_mib", "compile_s", "first_loss", "loss")
        assert len(row["rates"]) == 2
        assert abs(row["first_loss"] - math.log(512)) < 0.5, "weights that know nothing of 512 tokens"
    assert len({row["steps"] for row in training.values()}) == 1, "losses are of the same steps"
    assert [name for name, row in training.items() if "onym_is_times_as_fast" not in row] == [
        name for name in training if name.startswith("onym")
    ], "each peer is compared, and nobody else"

    saving = parts["saving"]
    for name in ("the first save, which allocates", "save, until it returns", "copy"):
        require_figures(saving[name], "seconds")
    require_figures(saving["save, until it returns"], "times_the_copy", "written_after_s")
    assert saving["what was written"]["equal"], saving
    assert saving["what was written"]["compared"] > 100, "weights, both moments of each, the guard, generators"
    assert saving["what was written"]["changed_since"] > 80, "or steps would not have been taken meanwhile"

    dtype = next(dtype for dtype in DTYPES if f"gpt2-medium, 1: onym {dtype} off" in parts["decoding"])
    assert set(parts["decoding"]) == {
        f"gpt2-medium, {slots}: {program}"
        for slots in (1, 8)
        for program in (f"onym {dtype} off", f"onym {dtype} auto", "onym int8 off", "transformers dynamic")
    }
    for row in parts["decoding"].values():
        require_figures(row, "tokens_per_second", "step_ms", "bandwidth_share")
    assert results["parts"]["decoding"]["bandwidth"] > 1e8

    named = [target["what"] for target in results["targets"]]
    for what in ("gpt2: MFU of onym", "gpt2: onym / the fastest peer", "decoder: onym, qwen3 / the fastest peer", "stall"):
        assert any(what in each for each in named), named
    assert all("reached" in line or "missed" in line for line in done.stdout.splitlines() if "at least" in line)
    assert len(done.stdout) < 12_000, "where the end of the output alone is seen, the table is"


def test_a_peer_that_fails_costs_its_own_row(tmp_path: Path) -> None:
    peer = tmp_path / "packages" / "transformers" / "__init__.py"
    peer.parent.mkdir(parents=True)
    peer.write_text(FAILING)
    done, results = bench(tmp_path, "--only", "training", packages=peer.parents[1])
    gpt2, decoder = (results["parts"][name]["rows"] for name in ("gpt2", "decoder"))
    assert gpt2["transformers"] == {"failed": "out of memory"}
    assert "transformers: out of memory beside others; again, alone" in done.stderr
    assert decoder["transformers, Llama"] == {"failed": "its process ended with code 3: no such device"}
    assert decoder["transformers, Qwen3"] == {"failed": "not installed: fla"}
    for row in (gpt2["onym"], gpt2["onym, by default"], gpt2["nanoGPT's recipe"], decoder["onym, llama"]):
        require_figures(row, "tokens_per_second", "loss")


FAILING = """
import os, sys

def __getattr__(name):
    if name == "GPT2Config":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if name == "LlamaConfig":
        print("no such device", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "Qwen3Config":
        raise ModuleNotFoundError("No module named 'fla'", name="fla")
    raise AttributeError(name)
"""
"""A package that fails in three ways."""


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    _, results = bench(tmp_path, "--minutes", "0.01")
    rows = [row for part in results["parts"].values() for row in part["rows"].values()]
    assert len(rows) > 20
    assert all(row == {"failed": "left out: no time left"} for row in rows)


def test_the_ladder(tmp_path: Path) -> None:
    _, results = bench(tmp_path, "--only", "ladder")
    (first, second) = results["parts"]["ladder"]["rows"].items()
    assert [first[0], second[0]] == [" 1 book's first script", " 2 mask made on the fly"]
    require_figures(first[1], "tokens_per_second", "utilisation")
    require_figures(second[1], "tokens_per_second", "factor")


@pytest.mark.parametrize("device", ["cuda:7", "nowhere"])
def test_a_device_that_is_not_there_is_a_sentence(device: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--device", device], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"There is no device {device!r} here")
