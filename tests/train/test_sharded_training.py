"""``--parallel fsdp`` and ``hybrid``: each process has its share, and the run is the same one: losses, files, names, bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import onym as library
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.format.reader import read_checkpoint
from onym.train import distributed
from onym.train.launch import free_port
from onym.train.options import RunOptions
from onym.train.parallel import make_sharding
from onym.train.precision import Compute
from tests.cli.test_train import EAGER, assert_equal_bits, checkpoint, metrics
from tests.conftest import TINY_RUN, WORDS, Run, workers
from tests.convert import peers
from tests.train.test_ranks import needs_proc, start, wait_for_step

RUN = (*EAGER, "--precision", "fp32", "--steps", 20, "--save-every", 10, "--eval-every", 20, "--eval-batches", 3)
ALL_OF_IT = ("--drop-rate", 0.1, "--micro-batch", 1, "--ema", 0.9, "--gradient-checkpointing", "--tie-embeddings", "True")
TO_BE_KILLED = (*RUN, "--steps", 25, "--save-every", 5, "--eval-every", 25, *ALL_OF_IT)
ROUNDED = (*RUN, "--precision", "bf16", "--ema", 0.9, "--gradient-checkpointing")
FROM_NANOGPT = (
    *("--from", "ckpt.pt", "--tokenizer", "tokenizer.json", "--steps", 8, "--batch-size", 4),
    *("--compile", "off", "--precision", "fp32"),
)
QWEN = ("--arch", "qwen3", "--tie-embeddings", "True")
DECODER = (*RUN, *QWEN, "--gradient-checkpointing", "--micro-batch", 1)
GOING_ON = (*RUN, "--schedule", "constant", "--name", "mixed")

# Several runs, one after the other, in processes that have imported all of it already; it costs two seconds each time.
_WORKER = """
import contextlib, errno, io, json, os, sys, time
began = time.monotonic()
from pathlib import Path
import torch
from onym.cli.main import main
from onym.storage.disk import Disk
from onym.train import loop, proof
from onym.train.step import Stepper

def prove(checkpoint, expected, sources, **how):
    held_out, sample = proof._open_and_measure({"checkpoint": str(checkpoint), "sources": sources.to_list(), **how})
    return proof.Proof(held_out, expected, sample)

loop.prove = prove
rank = int(os.environ["RANK"])
step, flush = Stepper.__call__, Disk.flush

def spoilt(self, batch, rate, number):
    result = step(self, batch, rate, number)
    if number == 13 and not spoilt.done:
        spoilt.done = True
        weight = self.model.final_norm.weight.to_local()
        with torch.no_grad():
            weight[: rank] = torch.inf  # in one process's share alone
    return result
spoilt.done = False

def full(self, descriptor):
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}") and not full.done:
        full.done = True
        raise OSError(errno.ENOSPC, "full")
    flush(self, descriptor)
full.done = False

for number, (name, arguments, fault, changes) in enumerate(json.loads(sys.argv[1])):
    os.environ.update(MASTER_PORT=str(changes.pop("port")))
    before = dict(os.environ)
    os.environ.update({key: value[rank] for key, value in changes.items()})
    Stepper.__call__ = spoilt if fault == "spoilt" else step
    Disk.flush = full if fault == "full" else flush
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = exec(arguments[0], {}) or 0 if fault == "program" else main(arguments)
    os.environ.clear()
    os.environ.update(before)
    print(name, round(time.monotonic() - began, 1), flush=True)
    Path(f"{name}-{rank}.json").write_text(json.dumps([code, out.getvalue(), error.getvalue()]))
"""


def run_together(folder: Path, program: str, *arguments: str, count: int = 2, **environment: str) -> list[tuple[int, str]]:
    """A program in several processes; each one's exit code, and what it said."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared |= {"ONYM_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(count), **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=folder,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    said = []
    for process in processes:
        try:
            out, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:  # each waits for another one
            process.kill()
            out = process.communicate()[0] + "\nit did not end"
        said.append((process.returncode, out))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a text of 30 paragraphs, and runs that two processes have made of it."""
    folder = tmp_path_factory.mktemp("sharded")
    lines = [f"{word} was the {n}th of the {n * 7} things, and the {word} knew it.\n\n" for n, word in enumerate(WORDS * 10)]
    (folder / "book.txt").write_text("".join(lines), encoding="utf-8")
    tokenizer = Tokenizer.train(["".join(lines)], 300)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    peers.nanogpt(folder / "ckpt.pt", vocab_size=tokenizer.vocab_size, steps=6)
    environment = {**os.environ, "ONYM_CACHE_DIR": str(folder / "cache")}
    if Path("/proc/self/stat").exists():
        killed = ("train", "--data", "book.txt", *TO_BE_KILLED, "--processes", 2, "--parallel", "fsdp", "--name", "killed")
        process = start(folder, environment, *killed)
        wait_for_step(folder / "runs/killed/checkpoints", 10, process)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        (folder / "killed.json").write_text(json.dumps(process.communicate(timeout=60)[1].splitlines()))
    runs: list[tuple[str, tuple[object, ...], str, dict[str, list[str]]]] = [
        ("straight", (*TO_BE_KILLED, "--parallel", "fsdp", "--name", "straight"), "", {}),
        ("ddp", (*GOING_ON, "--steps", 10), "", {}),
        ("fsdp", (*GOING_ON, "--steps", 20, "--parallel", "fsdp"), "", {}),
        ("spoilt", (*RUN, "--parallel", "fsdp", "--name", "spoilt"), "spoilt", {}),
        ("full", (*RUN, "--parallel", "fsdp", "--name", "full", "--save-every", 20), "full", {}),
        (
            "hybrid",
            (*RUN, "--parallel", "hybrid", "--name", "hybrid", "--micro-batch", 1),
            "",
            {"LOCAL_WORLD_SIZE": ["1", "1"]},
        ),
        ("nanogpt", (*FROM_NANOGPT, "--parallel", "fsdp", "--name", "nanogpt"), "", {}),
        ("rounded", (*ROUNDED, "--parallel", "fsdp", "--gather-dtype", "bf16", "--name", "rounded"), "", {}),
        ("plain", (*RUN, "--parallel", "fsdp", "--name", "2"), "", {}),
        ("decoder", (*DECODER, "--parallel", "fsdp", "--name", "decoder-2"), "", {}),
        (
            "rounded-decoder",
            (*ROUNDED, *QWEN, "--parallel", "fsdp", "--gather-dtype", "bf16", "--name", "rounded-decoder"),
            "",
            {},
        ),
        ("killed", (*TO_BE_KILLED, "--parallel", "fsdp", "--name", "killed"), "", {}),
        ("uneven", (*RUN, "--parallel", "hybrid", "--name", "uneven"), "", {"LOCAL_WORLD_SIZE": ["1", "2"]}),
    ]
    commands: list[Any] = []
    for name, arguments, fault, changes in runs:
        port = free_port()
        command = ["train", "--data", "book.txt", "--runs-dir", "runs", "--processes", 2, *arguments]
        commands.append((name, list(map(str, command)), fault, {**changes, "port": port}))
    # The last one of them leaves as a program that has failed, in which no other can be started.
    commands.insert(-1, ("shares", [_SHARES], "program", {"port": free_port()}))
    (folder / "said.json").write_text(json.dumps(run_together(folder, _WORKER, json.dumps(commands))))
    return folder


@pytest.fixture
def said(folder: Path) -> Callable[[str], list[tuple[int, str, str]]]:
    """What became of one of those runs, in each process: exit code, output, errors."""

    def look(name: str) -> list[tuple[int, str, str]]:
        files = [folder / f"{name}-{rank}.json" for rank in range(2)]
        assert all(file.exists() for file in files), (folder / "said.json").read_text()
        return [tuple(json.loads(file.read_text())) for file in files]

    return look


def losses_apart(one: Path, other: Path) -> float:
    rows = [[row for row in metrics(each) if "train_loss" in row] for each in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    return max(
        abs(mine[key] - theirs[key])
        for mine, theirs in zip(*rows, strict=True)
        for key in ("train_loss", "val_loss", "grad_norm")
        if mine.get(key) is not None
        and theirs.get(key) is not None  # whichever ended there has measured
        and (mine["step"] or key == "val_loss")  # before the first step, a loss is that of a part
    )


def test_the_losses_are_those_of_one_process(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]], onym: Run
) -> None:
    """Which the same options train too: alone it has all of the model."""
    assert [code for code, _, _ in said("plain")] == [0, 0], said("plain")
    where = ("--runs-dir", folder / "runs", "--name", "1")
    assert onym("train", "--data", folder / "book.txt", *RUN, *where, "--parallel", "fsdp").returncode == 0
    assert "; 2 processes, weights sharded\n" in said("plain")[0][1]
    assert said("plain")[1][1:] == ("", ""), "one of them talks"
    assert_the_same_run(folder / "runs/1", folder / "runs/2")


def test_a_decoders_losses_are_those_of_one_process(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]], onym: Run
) -> None:
    assert [code for code, _, _ in said("decoder")] == [0, 0], said("decoder")
    where = ("--runs-dir", folder / "runs", "--name", "decoder-1")
    assert onym("train", "--data", folder / "book.txt", *DECODER, *where, "--parallel", "fsdp").returncode == 0
    assert_the_same_run(folder / "runs/decoder-1", folder / "runs/decoder-2")


@pytest.mark.prove
def test_the_losses_of_the_command_are_those_of_one_process(onym_process: Run, onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *RUN, "--name", 1, "--parallel", "fsdp").returncode == 0
    for count in (2, 4):
        done = onym_process("train", "--data", book, *RUN, "--name", count, "--processes", count, "--parallel", "fsdp")
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        assert f"; {count} processes, weights sharded\n" in done.stdout
        assert done.stdout.count("bitwise identical") == 1, "one of them talks"
        assert_the_same_run(tmp_path / "runs/1", tmp_path / f"runs/{count}")


def assert_the_same_run(one: Path, other: Path) -> None:
    assert losses_apart(one, other) <= 2e-5
    mine, theirs = (library.load_model(run).state_dict() for run in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], atol=2e-4), name


@needs_proc
def test_killed_and_continued_it_ends_with_the_same_bits(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]]
) -> None:
    assert [code for code, _, _ in said("straight") + said("killed")] == [0] * 4, said("killed")
    (error,) = json.loads((folder / "killed.json").read_text())
    assert error.startswith("onym: Process 1 of 2 was ended by SIGKILL")
    assert "Continuing after step" in said("killed")[0][1]
    assert_equal_bits(*(checkpoint(folder / "runs" / name, 25) for name in ("straight", "killed")))
    steps = (folder / f"runs/{name}/checkpoints/step-000000025" for name in ("straight", "killed"))
    assert_equal_bits(*(read_checkpoint(step).tensors("ema.safetensors").state() for step in steps))


def test_a_run_changes_between_all_of_it_and_shares(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]], onym: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ddp to fsdp to one process; another number of them only adds up in another order."""
    assert [code for code, _, _ in said("ddp") + said("fsdp")] == [0] * 4, said("fsdp")
    assert "; 2 processes\n" in said("ddp")[0][1]
    assert "Changed since the run was started: --parallel was ddp, is fsdp" in said("fsdp")[0][1]
    assert "interruption: processes was 2, is 2, weights sharded" in said("fsdp")[0][1]
    assert said("fsdp")[1][1:] == ("", ""), "one of them talks"
    for name, where in (("mixed", ("--name", "mixed")), ("alone", ("--name", "alone"))):
        done = onym(
            "train",
            "--data",
            folder / "book.txt",
            *GOING_ON,
            *where,
            "--runs-dir",
            folder / "runs",
            "--steps",
            30,
            "--processes",
            1,
        )
        assert done.returncode == 0, done.stderr
        assert ("interruption: processes was 2, weights sharded, is 1" in done.stdout) == (name == "mixed")
    assert losses_apart(folder / "runs/mixed", folder / "runs/alone") <= 1e-4


def test_weights_spoilt_in_one_share_are_rolled_back_in_all(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]]
) -> None:
    assert [code for code, _, _ in said("spoilt")] == [0, 0], said("spoilt")
    assert "non-finite weights: 1 tensors, the first final_norm.weight" in said("spoilt")[0][1]
    assert "back to step 10, and on without batches 10 to" in said("spoilt")[0][1]
    for name, tensor in checkpoint(folder / "runs/spoilt", 20).items():
        assert tensor.isfinite().all(), name


def test_a_full_disk_of_the_one_that_writes_keeps_nobody_waiting(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]]
) -> None:
    assert [code for code, _, _ in said("full")] == [0, 0], said("full")
    assert "A checkpoint was not saved" in said("full")[0][1]
    assert checkpoint(folder / "runs/full", 20)


def test_machines_share_within_and_add_up_across(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]], onym: Run
) -> None:
    assert [code for code, _, _ in said("hybrid")] == [0, 0], said("hybrid")
    assert "; 2 processes, weights sharded within each of 2 machines\n" in said("hybrid")[0][1]
    where = ("--runs-dir", folder / "runs", "--name", "hybrid-1")
    assert onym("train", "--data", folder / "book.txt", *RUN, "--micro-batch", 1, *where).returncode == 0
    assert losses_apart(folder / "runs/hybrid", folder / "runs/hybrid-1") <= 2e-5


def test_moments_of_another_program_are_shared_out_too(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]], onym: Run
) -> None:
    assert [code for code, _, _ in said("nanogpt")] == [0, 0], said("nanogpt")
    assert "Continuing after step 6 of 8." in said("nanogpt")[0][1]
    files = ("--from", folder / "ckpt.pt", "--tokenizer", folder / "tokenizer.json", "--runs-dir", folder / "runs")
    done = onym("train", "--data", folder / "book.txt", *FROM_NANOGPT, *files, "--name", "nanogpt-1")
    assert done.returncode == 0, done.stderr
    one, other = (checkpoint(folder / "runs" / name, 8) for name in ("nanogpt", "nanogpt-1"))
    moments = [name for name in one if ".exp_avg" in name]
    assert moments
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-6) for name in moments)


def test_uneven_machines_are_refused_before_any_work(folder: Path, said: Callable[[str], list[tuple[int, str, str]]]) -> None:
    """In a sentence that one of them says."""
    assert [code for code, _, _ in said("uneven")] == [2, 2]
    sentence = (
        "onym: --parallel hybrid needs the same number of processes on each machine, not 1 and 2: take --parallel fsdp.\n"
    )
    assert sorted(error for _, _, error in said("uneven")) == ["", sentence]
    assert "Text:" not in said("uneven")[0][1]


@pytest.mark.parametrize(("name", "kind"), [("rounded", ()), ("rounded-decoder", QWEN)])
def test_weights_put_together_in_bf16(
    folder: Path, said: Callable[[str], list[tuple[int, str, str]]], onym: Run, name: str, kind: tuple[str, ...]
) -> None:
    """About the same losses; what is proven is the model that computed them, and what is kept is fp32."""
    assert [code for code, _, _ in said(name)] == [0, 0], said(name)
    assert "; 2 processes, weights sharded, all-gathered in bf16\n" in said(name)[0][1]
    assert "bitwise identical" in said(name)[0][1]
    alone = ("--name", name, "--runs-dir", folder / "r")
    assert onym("train", "--data", folder / "book.txt", *ROUNDED, *kind, *alone).returncode == 0
    assert 0 < losses_apart(folder / "runs" / name, folder / "r" / name) <= 0.03
    weights = library.load_model(folder / "runs" / name).trf_blocks[0].norm1.weight
    assert not torch.equal(weights, weights.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--cpu-offload", "--parallel", "ddp"),
            "--cpu-offload is about sharded weights: add --parallel fsdp, or leave it out.",
        ),
        (
            ("--gather-dtype", "bf16", "--parallel", "ddp"),
            "--gather-dtype bf16 is about sharded weights: add --parallel fsdp, or leave it out.",
        ),
        (("--optimizer", "muon"), "Muon needs full matrices, and --parallel fsdp shards them: take --optimizer adamw"),
        (("--precision", "fp16"), "shards them: take --precision bf16 or fp32, or --parallel ddp."),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    onym: Run, book: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    done = onym("train", "--data", book, *RUN, "--parallel", "fsdp", "--processes", 2, *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "count", "says"),
    [
        ({"gather_dtype": "bf16"}, 2, "is for --precision bf16, and this run computes in fp32: leave it out"),
        ({"cpu_offload": True}, 2, "for weights that a GPU computes with; this run's are in main memory: leave it out"),
    ],
)
def test_what_has_no_sense_here_is_refused(options: dict[str, Any], count: int, says: str) -> None:
    run = RunOptions(parallel="fsdp", **options)
    with pytest.raises(ConfigError, match=says):
        make_sharding(run, distributed.DistContext(0, count), Compute(torch.device("cpu"), torch.float32))


# Each process looks at what it has itself.
_SHARES = """
import torch
from onym import GPT, GPTConfig
from onym.data.batches import evaluation_batches
from onym.train.evaluate import held_out_loss
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions, RunOptions
from onym.train.precision import Compute
from onym.train.distributed import join
from onym.train.parallel import Sharding, make_sharding
from onym.train.step import Stepper

TINY = GPTConfig(vocab_size=101, context_length=32, emb_dim=32, n_heads=4, n_layers=2)
ranks, _ = join("cpu", 600)
compute = Compute(torch.device("cpu"), torch.float32)
torch.manual_seed(0)
sharding = make_sharding(RunOptions(parallel="fsdp"), ranks, compute)
model = sharding.make(TINY)
whole = sum(parameter.nbytes for parameter in model.parameters())
stepper = Stepper(model, OptimizationOptions(ema=0.9), compute, ranks, sharding)
tokens = torch.randint(0, TINY.vocab_size, (4, TINY.context_length + 1), generator=torch.Generator().manual_seed(ranks.rank))
batch = tokens[:, :-1], tokens[:, 1:]

# Too much for the second block on the way forward, or, recomputed, on the way back: half of it is tried.
tried = []
def too_large(module, arguments):
    tried.append(len(arguments[0]))
    if len(arguments[0]) > 2 and (not BACKWARD or len(tried) > 1):
        raise MemoryError("out of memory")
for BACKWARD in (False, True):
    tried.clear()
    model.recompute_activations = BACKWARD
    hook = model.trf_blocks[1].ff.register_forward_pre_hook(too_large)
    prepare(stepper, batch, [4, 2], "off")
    hook.remove()
    assert stepper.micro_batch == 2 and tried[0] == 4, tried
model.recompute_activations = False

def held(tensors):
    tensors = list(tensors)
    assert all(hasattr(each, "to_local") for each in tensors)
    return sum(each.to_local().untyped_storage().nbytes() for each in tensors)

def look():
    moments = [value for state in stepper.optimizers[0].state.values() for slot, value in state.items() if slot != "step"]
    return held(model.parameters()), held(stepper.average.model.parameters()), held(moments)

gradients = []
for number in range(2):
    for parameter in model.parameters() if number == 0 else ():
        parameter.register_post_accumulate_grad_hook(lambda parameter: gradients.append(parameter.grad.to_local().nbytes))
    stepper(batch, 1e-3, number)
assert stepper.finite
class Stream:
    tokens = tokens.flatten().numpy()
    def __len__(self): return len(self.tokens)
    def read(self, start, stop): return self.tokens[start:stop]
for each in (model, stepper.average.model):  # five batches for two: one of them has nothing to measure in the last pass
    assert held_out_loss(each, evaluation_batches(Stream(), 32, 1, 5), compute, ranks) > 0
print(whole, *look(), sum(gradients) / 4)  # of two steps of two parts each

mesh = sharding.mesh
def trained(**how):
    torch.manual_seed(0)
    sharding = Sharding(mesh, **how)
    model = sharding.make(TINY)
    half = Compute(compute.device, torch.bfloat16)
    stepper = Stepper(model, OptimizationOptions(ema=0.9), half, ranks, sharding)
    seen = set()
    for each in (model.tok_emb, model.trf_blocks[0].norm1, model.trf_blocks[1].ff.layers[2], model.out_head):
        each.register_forward_pre_hook(lambda m, given: seen.add((type(m).__name__, m.weight.dtype, given[0].dtype)))
    stepper.micro_batch = 2
    losses = [stepper(batch, 1e-3, number).loss.item() for number in range(3)]
    assert stepper.finite
    mine = [each.to_local() for m in (model, stepper.average.model) for each in m.parameters()]
    assert {each.dtype for each in mine} == {torch.float32}
    between = {given for name, _, given in seen if name.endswith("LayerNorm")}
    return losses, mine, {(name, weight) for name, weight, given in seen}, between

# The weights to begin with, and how much memory it takes to make them: less than those of a whole model.
from pathlib import Path
def memory(kind):
    return int(Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0]) * 1024
large = GPTConfig(vocab_size=101, context_length=32, emb_dim=256, n_heads=4, n_layers=50)
torch.manual_seed(3)
try:
    Path("/proc/self/clear_refs").write_text("5")  # the most is counted from now on
    before, measurable = min(memory("VmRSS"), memory("VmHWM")), True
except (OSError, IndexError):  # not every system does
    measurable = False
shared = sharding.make(large)
average = sharding.copy(shared)
took = (memory("VmHWM") - before) / sum(parameter.nbytes for parameter in shared.parameters()) if measurable else 1.1
drawn = torch.rand(1)
torch.manual_seed(3)
for (name, theirs), mine, again in zip(GPT(large).named_parameters(), shared.parameters(), average.parameters(), strict=True):
    assert torch.equal(mine.full_tensor(), theirs) and torch.equal(again.full_tensor(), theirs), name
assert torch.equal(torch.rand(1), drawn), "the generator goes on as it would"
assert 0.8 < took < 1.4, took  # two halves, and a block; of whole models it would be two
del shared, average

from onym.state.dtensor import computes_on, distribute_like
given = torch.rand(101, 32)
like = model.tok_emb.weight
mine = distribute_like(given, like)
assert torch.equal(mine.full_tensor(), given)
assert mine.to_local().untyped_storage().nbytes() == like.to_local().nbytes, "the rest of it can go"
assert computes_on(like) == compute.device

losses, weights, dtypes, between = trained()
assert {dtype for _, dtype in dtypes} == between == {torch.float32}
offloaded = trained(offloads=True)
assert offloaded[0] == losses and all(map(torch.equal, offloaded[1], weights)), "where they are changes nothing"
rounded = trained(gather_bf16=True)
assert rounded[0] != losses
torch.testing.assert_close(rounded[0], losses, rtol=0, atol=1e-3)
outside = {("Embedding", torch.float32), ("Head", torch.float32)}
assert rounded[2] == outside | {("UpcastLayerNorm", torch.bfloat16), ("Linear", torch.bfloat16)}, rounded[2]
assert rounded[3] == {torch.float32}, "what goes from block to block"
ranks.close()
"""


def test_each_process_has_its_share_alone(said: Callable[[str], list[tuple[int, str, str]]]) -> None:
    """Of weights, gradients, moments and average, after steps of two parts, a measurement, and batches that were too large."""
    for _, out, _ in said("shares"):
        full_tensor, weights, average, moments, gradients = map(float, out.split())
        assert weights / full_tensor == pytest.approx(0.5, abs=0.02)
        assert gradients / full_tensor == pytest.approx(0.5, abs=0.02)
        assert average / full_tensor == pytest.approx(0.5, abs=0.02)
        assert moments / full_tensor == pytest.approx(2 * 0.5, abs=0.04)


def test_one_that_alone_has_no_memory_left_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for its share; that they came to the same place is seen beside, in the store."""
    monkeypatch.setattr(distributed, "_ARRIVAL_SECONDS", 0.2)
    store = torch.distributed.HashStore()
    one, other = (distributed.DistContext(number, 2, number, store) for number in range(2))
    assert not one.all_arrive("here")
    assert other.all_arrive("here"), "late"
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(lambda each: each.all_arrive("here"), (one, other))) == [True, True], "again"


# One process is enough to see what the compiler is given; the code itself is not made.
_COMPILED = """
import functools, os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from onym import GPT, GPTConfig
from onym.compile.in_place import compile_in_place, graphs_compiled, uncompile
from onym.train.dry_run import prepare
from onym.train.parallel import Sharding

torch.compile = functools.partial(torch.compile, backend="aot_eager")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = GPT(GPTConfig.preset("nano", vocab_size=100, n_layers=12, context_length=32))
names = list(model.state_dict())
model = Sharding(init_device_mesh("cpu", (1,))).copy(model)
tokens = torch.randint(0, 100, (2, 32))
eager = model(tokens, tokens)
assert compile_in_place(model, "blocks", lambda: model(tokens, tokens).backward()).how == "blocks"
assert list(model.state_dict()) == names
torch.testing.assert_close(model(tokens, tokens), eager)
print(graphs_compiled(), sum(torch._dynamo.utils.counters["graph_break"].values()))
uncompile(model)
assert not any(module._compiled_call_impl for module in model.modules())
torch.testing.assert_close(model(tokens, tokens), eager, rtol=0, atol=0)
print(graphs_compiled())
"""


def test_the_blocks_are_one_graph_and_undone_without_a_trace(in_fresh_process: Callable[[str], str]) -> None:
    """Not one a block, which the compiler gives up after eight; and what gathers the weights is not in it."""
    assert in_fresh_process(_COMPILED).split() == ["1", "0", "1"]


@pytest.mark.prove
def test_compiled_they_train_the_same(onym_process: Run, book: Path, tmp_path: Path) -> None:
    shape = (*TINY_RUN, "--precision", "fp32", "--steps", 20, "--eval-batches", 2, "--compile", "whole")
    for processes in (1, 2):
        done = onym_process(
            "train", "--data", book, *shape, "--name", processes, "--processes", processes, "--parallel", "fsdp"
        )
        assert done.returncode == 0, done.stderr
        assert "compiled again" not in done.stdout
        assert ("Compiling each block: --parallel fsdp gathers one after the other." in done.stdout) == (processes == 2)
    assert losses_apart(tmp_path / "runs/1", tmp_path / "runs/2") <= 1e-4


@pytest.mark.prove
def test_two_machines_of_two(book: Path, tmp_path: Path, environment: dict[str, str], onym: Run) -> None:
    """Two torchruns of two processes each, as on two machines."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launch += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=book", "-m", "onym", "train", "--data", str(book)]
    command = [*launch, *map(str, RUN), "--parallel", "hybrid"]
    machines = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in machines]
    assert [process.returncode for process in machines] == [0, 0], said
    assert sum(out.count("; 4 processes, weights sharded within each of 2 machines\n") for out, _ in said) == 1
    assert onym("train", "--data", book, *RUN, "--name", "alone").returncode == 0
    assert losses_apart(tmp_path / "runs/book", tmp_path / "runs/alone") <= 2e-5
