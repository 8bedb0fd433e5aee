"""DCPWriter and DCPReader under torch's own dcp.save and dcp.load, in real processes (gloo) of FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

import onym
from onym.cli.main import main
from onym.format import manifest
from onym.format.chunk_index import CHUNKS
from onym.format.manifest import MODEL, FileEntry, Manifest
from onym.format.reader import read_checkpoint

PROGRAM = """
import errno, os, signal, sys, time, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from pathlib import Path
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
import onym
from onym.storage.disk import Disk

mode, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
rank, most = dist.get_rank(), dist.get_world_size()
groups = {count: dist.new_group(list(range(count))) for count in range(1, most + 1)}
meshes = {count: DeviceMesh("cpu", list(range(count))) for count in range(1, most + 1)}

class Parts(torch.nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(x)

def training(count, seed):
    # 7, 5 and 100 rows are shared out unevenly, and of 3 rows one of four processes has none
    torch.manual_seed(seed)
    model = Parts(odd=torch.nn.Linear(5, 7), few=torch.nn.Linear(4, 3), emb=torch.nn.Embedding(100, 6),
                  head=torch.nn.Linear(6, 100, bias=False))
    model.head.weight = model.emb.weight
    mesh = meshes[count]
    fully_shard(model.odd, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return model, optimizer

def state_of(model, optimizer):
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    return {**parts, "progress": {"step": 7, "seen": [1, 2.5, None], "order": torch.arange(4)}}

def whole(state):
    found = {}
    def walk(value, path):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")
        elif isinstance(value, torch.Tensor):
            found[path] = value.full_tensor() if hasattr(value, "full_tensor") else value
        else:
            found[path] = value
    walk(state, "")
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in found.items()}

def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        equal = torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        assert equal, name

if mode == "every":
    for count in range(1, most + 1):
        if rank < count:
            model, optimizer = training(count, 0)
            state = state_of(model, optimizer)
            dcp.save(state, checkpoint_id=folder / str(count), storage_writer=onym.DCPWriter(), process_group=groups[count])
        dist.barrier()
    for count in range(1, most + 1):
        if rank < count:
            expected = whole(state_of(*training(count, 0)))
            for written in range(1, most + 1):
                state = state_of(*training(count, 1))
                state["progress"] = {"step": 0, "seen": [], "order": torch.zeros(4, dtype=torch.int64)}
                dcp.load(state, checkpoint_id=folder / str(written), storage_reader=onym.DCPReader(),
                         process_group=groups[count])
                same(expected, whole(state))
        dist.barrier()
    torch.manual_seed(0)
    if rank == 0:
        torch.save({name: value for name, value in whole(state_of(*training(1, 0))).items()
                    if isinstance(value, torch.Tensor)}, folder / "expected.pth")
else:
    good = state_of(*training(most, 0))
    writer = onym.DCPWriter()
    dcp.save(good, checkpoint_id=folder / "step", storage_writer=writer)
    real = Disk.write
    def broken(disk, descriptor, data, position):
        if mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for failing in (most - 1, 0):
        if rank == failing:
            Disk.write = broken
        print("saving", flush=True)
        try:
            dcp.save(state_of(*training(most, 2)), checkpoint_id=folder / "step", storage_writer=writer)
            raise SystemExit("it should have failed")
        except CheckpointException as error:
            assert "disk is full" in str(error), error
            print(f"{rank} was told", flush=True)
        Disk.write = real
    state = state_of(*training(most, 3))
    dcp.load(state, storage_reader=onym.DCPReader(folder / "step"))
    same(whole(good), whole(state))
    dcp.save(state_of(*training(most, 2)), checkpoint_id=folder / "step", storage_writer=writer)
    dcp.load(state, storage_reader=onym.DCPReader(folder / "step"))
    same(whole(state_of(*training(most, 2))), whole(state))
dist.barrier()
print("as it should be", flush=True)
os._exit(0)
"""

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    def launch(count: int, mode: str) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*torchrun, str(program), mode, str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment
        )

    return launch


def _by_the_page_alone(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors as docs/format.md says, by JSON and stock safetensors."""
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    tensors = {}
    index = json.loads((folder / "chunks.json").read_text())
    for name, entry in index["tensors"]["model.safetensors"].items():
        whole = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for process, start, size in index["layouts"][entry["layout"]]:
            box = ",".join(f"{at}:{at + length}" for at, length in zip(start, size, strict=True))
            stored = files[f"model-{process:05d}.safetensors"][name if size == entry["shape"] else f"{name}[{box}]"]
            whole[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))] = stored
        tensors |= dict.fromkeys([name, *entry.get("aliases", [])], whole)
    return tensors


def test_what_any_number_of_processes_wrote_any_number_reads(launch: Launch, tmp_path: Path) -> None:
    """Each of 1 to 4 writes, each of 1 to 4 reads all of these, bit for bit; then one without torch.distributed."""
    run = launch(4, "every")
    assert run.stdout.count("as it should be") == 4, run.stdout + run.stderr
    expected = torch.load(tmp_path / "expected.pth", weights_only=True)
    for count in "1234":
        checkpoint = onym.open_checkpoint(tmp_path / count)
        checkpoint.verify()
        assert set(checkpoint.names) == {"odd.weight", "odd.bias", "few.weight", "few.bias", "emb.weight", "head.weight"}
        for name in checkpoint.names:
            assert torch.equal(checkpoint.tensor(name), expected[f".model.{name}"])
        moments = checkpoint.tensors("state.safetensors")
        assert torch.equal(
            moments.tensor("optimizer.state.odd.weight.exp_avg"), expected[".optimizer.state.odd.weight.exp_avg"]
        )
        plain = torch.nn.ModuleDict({"odd": torch.nn.Linear(5, 7), "few": torch.nn.Linear(4, 3)})
        onym.load(tmp_path / count, into=plain, strict=False)
        assert torch.equal(plain["odd"].weight, expected[".model.odd.weight"])
        jsonschema.validate(
            json.loads((tmp_path / count / "manifest.json").read_text()),
            json.loads((Path(manifest.__file__).parent / "manifest.schema.json").read_text()),
        )
        for name, value in _by_the_page_alone(tmp_path / count).items():
            assert torch.equal(value, expected[f".model.{name}"])
        assert {file.suffix for file in (tmp_path / count).iterdir()} == {".json", ".safetensors"}
    index = json.loads((tmp_path / "4" / CHUNKS).read_text())
    cut = index["layouts"][index["tensors"][MODEL]["odd.weight"]["layout"]]
    assert cut == [[0, [0, 0], [2, 5]], [1, [2, 0], [2, 5]], [2, [4, 0], [2, 5]], [3, [6, 0], [1, 5]]]


def test_a_disk_that_is_full_for_one_process_is_told_to_all_and_nothing_is_lost(launch: Launch, tmp_path: Path) -> None:
    run = launch(2, "full")  # first the other one's, then that of the process that commits
    assert run.stdout.count("was told") == 4, run.stdout + run.stderr
    assert run.stdout.count("as it should be") == 2, run.stdout + run.stderr
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["step"]


def test_a_process_that_is_killed_while_it_saves_leaves_the_checkpoint_before(launch: Launch, tmp_path: Path) -> None:
    run = launch(2, "killed")
    assert "saving" in run.stdout
    assert run.returncode != 0
    read_checkpoint(tmp_path / "step").verify()
    # What is left is a dead writer's; the next one in the folder deletes it.
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / "next", storage_writer=onym.DCPWriter(), no_dist=True)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["next", "step"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=50))
    state = {"model": model.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "saved", storage_writer=onym.DCPWriter(), no_dist=True)
    return tmp_path / "saved"


def test_tensors_inside_of_objects_come_back(tmp_path: Path) -> None:
    """DCP takes dicts and lists apart; a tuple it leaves to the writer."""
    model = torch.nn.Linear(2, 2).state_dict()
    dcp.save({"model": model, "pair": (torch.ones(3), 1)}, storage_writer=onym.DCPWriter(tmp_path / "x"), no_dist=True)
    state: dict[str, Any] = {"model": model, "pair": (torch.zeros(3), 0)}
    dcp.load(state, storage_reader=onym.DCPReader(tmp_path / "x"), no_dist=True)
    assert torch.equal(state["pair"][0], torch.ones(3))
    assert state["pair"][1] == 1


def test_what_is_damaged_is_never_loaded(saved: Path) -> None:
    state = {"model": onym.GPT(onym.GPTConfig.preset("nano", vocab_size=50)).state_dict(), "step": 0}
    for file in sorted(saved.iterdir()):
        before = file.read_bytes()
        file.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        with pytest.raises((CheckpointException, onym.OnymError), match=r"damaged|not those that were written"):
            dcp.load(state, storage_reader=onym.DCPReader(saved), no_dist=True)
        file.write_bytes(before)
    dcp.load(state, storage_reader=onym.DCPReader(saved), no_dist=True)
    assert state["step"] == 3


def test_the_command_checks_every_chunk(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    assert "no hashes" not in capsys.readouterr().out
    file = saved / "model-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert main(["verify", str(saved)]) != 0
    assert file.name in capsys.readouterr().out


def _index_with(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another chunks.json, with a manifest that is right about it: as somebody else could write them."""
    values = json.loads((saved / CHUNKS).read_text())
    change(values)
    text = json.dumps(values).encode()
    (saved / CHUNKS).write_bytes(text)
    manifest = Manifest.read(saved)
    manifest.files[CHUNKS] = FileEntry(len(text), blake3(text).hexdigest(), len(text))
    (saved / "manifest.json").write_text(manifest.to_json())


def _of(index: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    entry = index["tensors"][MODEL]["tok_emb.weight"]
    return entry, index["layouts"][entry["layout"]]


def _shift(index: dict[str, Any]) -> None:
    _of(index)[1][0][1] = [1, 0]


def _elsewhere(index: dict[str, Any]) -> None:
    _of(index)[1][0][0] = 7


def _nobody(index: dict[str, Any]) -> None:
    _of(index)[1][0][0] = -1


def _twice(index: dict[str, Any]) -> None:
    entry, layout = _of(index)
    layout *= 2
    entry["shape"][0] *= 2


def _larger(index: dict[str, Any]) -> None:
    _of(index)[0]["shape"][0] = 2**40


def _all_larger(index: dict[str, Any]) -> None:
    entry, layout = _of(index)
    entry["shape"][0] = layout[0][2][0] = 2**40


def _other_dtype(index: dict[str, Any]) -> None:
    _of(index)[0]["dtype"] = "int32"


def _none(index: dict[str, Any]) -> None:
    _of(index)[1].clear()


def _last(index: dict[str, Any]) -> None:
    _of(index)[0]["layout"] = -1


def _no_list(index: dict[str, Any]) -> None:
    index["tensors"][MODEL]["tok_emb.weight"] = 5


@pytest.mark.parametrize(
    "change", [_shift, _elsewhere, _nobody, _twice, _larger, _all_larger, _other_dtype, _none, _last, _no_list]
)
def test_chunks_that_cannot_be_a_tensor_are_refused(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _index_with(saved, change)
    with pytest.raises(onym.OnymError, match="damaged"):
        onym.open_checkpoint(saved).tensor("tok_emb.weight")


def test_no_pickle_is_written_and_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="set"):
        dcp.save(
            {"model": {"w": torch.ones(1)}, "seen": {1, 2}},
            checkpoint_id=tmp_path / "x",
            storage_writer=onym.DCPWriter(),
            no_dist=True,
        )
    assert not (tmp_path / "x").exists()


def test_another_dtype_is_refused_and_cast_on_request(saved: Path) -> None:
    shape = read_checkpoint(saved).model.shapes["tok_emb.weight"]
    state = {"model": {"tok_emb.weight": torch.zeros(shape, dtype=torch.bfloat16)}}
    with pytest.raises(CheckpointException, match=r"float32 in .* and bfloat16 here"):
        dcp.load(state, storage_reader=onym.DCPReader(saved), no_dist=True)
    dcp.load(state, storage_reader=onym.DCPReader(saved, dtype="cast"), no_dist=True)
    assert state["model"]["tok_emb.weight"].any()


def test_what_one_process_wrote_is_read_too(tmp_path: Path) -> None:
    model = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=50, tie_embeddings=True))
    onym.save(model, tmp_path / "model")
    other = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=50, tie_embeddings=True))
    dcp.load(other.state_dict(), storage_reader=onym.DCPReader(tmp_path / "model"), no_dist=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_is_there_and_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises((CheckpointException, onym.OnymError), match="did not write"):
        dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "theirs", storage_writer=onym.DCPWriter(), no_dist=True)
    assert (tmp_path / "theirs" / "notes.txt").read_text() == "mine"


def test_a_file_that_changes_after_it_was_checked_is_checked_again(saved: Path) -> None:
    checkpoint = read_checkpoint(saved)
    checkpoint.model.state()
    file = saved / "model-00000.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size - 9)
        byte = opened.read(1)
        opened.seek(size - 9)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(onym.OnymError, match="damaged"):
        checkpoint.model.state()


def test_what_several_threads_read_is_checked_all_the_same(tmp_path: Path) -> None:
    """Five tensors of 6 MB, each in blocks: a changed byte of one is an error, and names it."""
    state = {f"w{number}": torch.rand(1500, 1000) for number in range(5)}
    dcp.save(state, storage_writer=onym.DCPWriter(tmp_path / "step"), no_dist=True)
    into = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "step"), no_dist=True)
    assert all(torch.equal(into[name], value) for name, value in state.items())
    (file,) = (tmp_path / "step").glob("model-*.safetensors")
    content = bytearray(file.read_bytes())
    at = content.index(state["w3"][800].numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointException, match="the bytes of 'w3' are not those that were written"):
        dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "step"), no_dist=True)
    dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "step", verify=False), no_dist=True)
    assert [name for name, value in state.items() if not torch.equal(into[name], value)] == ["w3"]


class Staged(DefaultLoadPlanner):
    """One that takes what was read out of a buffer, which is the same for all."""

    buffer = torch.zeros(600, 1000)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self.place = super().resolve_tensor(read_item)
        return self.buffer

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.place.copy_(tensor)


def filled(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((600, 1000), float(value)) for name, value in values.items()}


def test_where_it_is_read_to_is_the_planners_word(tmp_path: Path) -> None:
    """Threads that read do not change whose memory has what at the end."""
    dcp.save(filled(a=1, b=2, c=3), storage_writer=onym.DCPWriter(tmp_path / "step"), no_dist=True)
    reader = onym.DCPReader(tmp_path / "step")
    into = filled(a=0, b=0, c=0)
    dcp.load(into, storage_reader=reader, planner=Staged(), no_dist=True)
    assert [value.unique().tolist() for value in into.values()] == [[1], [2], [3]], "one at a time"

    for _ in range(10):
        one = torch.zeros(600, 1000)
        dcp.load({"a": one, "b": one, "c": torch.zeros(600, 1000)}, storage_reader=reader, no_dist=True)
        assert one.unique().tolist() == [2], "what shares memory has the last of them, and no mixture"

    with torch.inference_mode():
        for dtype, how in ((torch.float32, "exact"), (torch.float64, "cast")):
            wanted = {name: value.to(dtype).t().contiguous().t() for name, value in filled(a=0, b=0, c=0).items()}
            dcp.load(wanted, storage_reader=onym.DCPReader(tmp_path / "step", dtype=how), no_dist=True)
            assert [value.unique().tolist() for value in wanted.values()] == [[1], [2], [3]]


def test_memory_that_is_not_its_values(tmp_path: Path) -> None:
    """Conjugated, negated, or of one number that calls itself contiguous with a stride."""
    values = torch.arange(1.0, 65).view(8, 8) + 1j
    stored = {"z": values, "n": values.imag * 2, "one": torch.tensor([3.0])}
    dcp.save(stored, storage_writer=onym.DCPWriter(tmp_path / "step"), no_dist=True)
    into = {
        "z": torch.zeros(8, 8, dtype=torch.complex64).conj(),
        "n": torch._neg_view(torch.zeros(8, 8)),
        "one": torch.zeros(5)[::5],
    }
    assert into["one"].is_contiguous()
    dcp.load(into, storage_reader=onym.DCPReader(tmp_path / "step"), no_dist=True)
    assert all(torch.equal(into[name], value) for name, value in stored.items())


def test_more_than_can_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MOST_JSON_VALUES", 1000)
    state = {f"weight{number}": torch.zeros(1) for number in range(300)}
    with pytest.raises(CheckpointException, match="1,000 values"):
        dcp.save(state, checkpoint_id=tmp_path / "saved", storage_writer=onym.DCPWriter(), no_dist=True)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(onym.OnymError, match="1,000 values"):
        onym.save(torch.nn.ParameterDict(state), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_a_process_does_not_see_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two machines with a disk each."""
    plan = onym.DCPWriter.prepare_global_plan

    def elsewhere(writer: Any, plans: Any) -> Any:
        plans = plan(writer, plans)
        writer._folder, kept = None, writer._folder
        writer.kept = kept
        return [replace(each, storage_data=replace(each.storage_data, folder="/nowhere/at/all")) for each in plans]

    monkeypatch.setattr(onym.DCPWriter, "prepare_global_plan", elsewhere)
    with pytest.raises(CheckpointException, match="not seen by all ranks"):
        dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "x", storage_writer=onym.DCPWriter(), no_dist=True)


def test_importing_onym_does_not_import_what_few_need(in_fresh_process: Callable[[str], str]) -> None:
    program = "import sys, onym; print('torch.distributed.checkpoint' in sys.modules, onym.DCPWriter.__name__)"
    assert in_fresh_process(program).split() == ["False", "DCPWriter"]
