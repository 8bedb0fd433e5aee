"""inspect: it says what a file or folder is, for every kind of file, and reads headers only."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onym as library
from onym.cli.tree import tree
from onym.format.manifest import MANIFEST
from onym.format.tensors import TensorFile
from onym.storage.lock import LEASE
from tests.conftest import Run

CONFIG = library.GPTConfig(vocab_size=50, context_length=8, emb_dim=8, n_heads=2, n_layers=3, tie_embeddings=True)


def make_run(folder: Path | str) -> None:
    """Three steps of a small GPT, the second one pinned; one tensor is another in each."""
    model = library.GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    with library.Checkpointer(f"{folder}/checkpoints") as checkpointer:
        for step in (10, 20, 30):
            with torch.no_grad():
                model.trf_blocks[1].norm1.weight.add_(1)
            checkpointer.save(step, {"model": model, "optimizer": optimizer}, {"val_loss": 5 - step / 10})
        checkpointer.pin(20, "keep-me")


def step_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)


def told(onym: Run, *arguments: object, code: int = 0) -> Any:
    """What a command says as JSON: one object, without NaN and infinity, and nothing else."""
    done = onym(*arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(done.stdout, parse_constant=refuse)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_listed(onym: Run, run_folder: Path) -> None:
    (step_of(run_folder, 10) / MANIFEST).write_text("{}")
    text = onym("inspect", run_folder).stdout
    assert "a run with 3 checkpoints" in text
    assert "val_loss 3, pinned as keep-me" in text
    assert "10    ?" in text
    assert "writ" not in text.replace("written", "", 1), "nobody writes"
    everything = told(onym, "inspect", run_folder)
    steps = everything["steps"]
    assert everything["writer"] is None
    assert [step["step"] for step in steps] == [10, 20, 30]
    assert [step["pinned"] for step in steps] == [[], ["keep-me"], []]
    assert "damaged" in steps[0]
    assert steps[2]["metrics"] == {"val_loss": 2.0}
    assert len(steps[2]["identity"]) == 64
    assert steps[2]["identity"][:12] in text
    assert steps[2]["bytes"] == sum(file.stat().st_size for file in step_of(run_folder, 30).iterdir())


def test_its_writer_is_named_and_whether_it_lives(onym: Run, run_folder: Path) -> None:
    lease = run_folder / "checkpoints" / LEASE
    with library.Checkpointer(run_folder / "checkpoints") as checkpointer:
        checkpointer.acquire()
        left = lease.read_text()
        assert "Being written by process" in onym("inspect", run_folder).stdout
        assert told(onym, "inspect", run_folder)["writer"]["lives"] is True
    lease.write_text(left)
    assert "which is gone" in onym("inspect", run_folder).stdout
    assert told(onym, "inspect", run_folder)["writer"]["lives"] is False
    lease.write_text(left.replace(platform.node(), "elsewhere"))
    assert "or left by it" in onym("inspect", run_folder).stdout
    assert told(onym, "inspect", run_folder)["writer"]["lives"] is None
    assert lease.exists(), "looking changes nothing"


def test_a_checkpoint_is_described_with_its_layers_folded(onym: Run, run_folder: Path) -> None:
    for step in ("keep-me", "20"):
        text = onym("inspect", run_folder, "--step", step).stdout
        assert "a checkpoint" in text
        assert "tie_embeddings=True" in text
        assert "continues     step 10" in text
        assert "trf_blocks.0 … trf_blocks.2  (3x)" in text
        assert text.count("qkv.weight") == 1
        assert "= tok_emb.weight" in next(line for line in text.splitlines() if "out_head.weight" in line)
    assert all(len(line) <= 80 for line in text.splitlines()[1:]), text
    everything = told(onym, "inspect", run_folder, "--step", "latest")
    parameters = sum(parameter.numel() for parameter in library.GPT(CONFIG).parameters())
    assert everything["step"] == 30
    assert everything["config"] == CONFIG.to_dict()
    assert everything["tensors"]["model.safetensors"]["tok_emb.weight"] == {
        "dtype": "float32", "shape": [50, 8], "aliases": ["out_head.weight"]
    }  # fmt: skip
    assert everything["parameters"] == parameters
    assert everything["totals"]["model.safetensors"] == {"float32": {"parameters": parameters, "bytes": 4 * parameters}}
    files = {file.name: file.stat().st_size for file in step_of(run_folder, 30).iterdir()}
    assert everything["files"] == {name: size for name, size in files.items() if name != MANIFEST}
    assert everything["bytes"] == sum(files.values())
    assert {"time", "host"} <= everything["provenance"].keys()


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_single_models_are_told_apart(onym: Run, tmp_path: Path, ending: str) -> None:
    library.save(nn.Linear(2, 1), tmp_path / f"x{ending}")
    text = onym("inspect", tmp_path / f"x{ending}").stdout
    says = {".safetensors": "a .safetensors file written by Onym", ".pth": "a file of torch.save", "": "a model folder"}[ending]
    assert says in text
    assert "float32 [1, 2]" in text
    assert ("none: it holds no hashes" in text) == (ending == ".pth")


def test_files_of_other_programs(onym: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3), "h": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "stock.safetensors")
    everything = told(onym, "inspect", "stock.safetensors")
    assert everything["kind"] == "a .safetensors file"
    assert everything["identity"] is None
    assert everything["totals"]["stock.safetensors"] == {
        "float32": {"parameters": 3, "bytes": 12}, "bfloat16": {"parameters": 2, "bytes": 4}
    }  # fmt: skip
    shared = torch.ones(4)
    torch.save({"a": shared, "b": shared, "c": torch.ones(4), "d._extra_state": {"n": 1}}, tmp_path / "x.pth")
    everything = told(onym, "inspect", "x.pth")
    assert everything["tensors"]["x.pth"]["a"]["aliases"] == ["b"]
    assert everything["parameters"] == 8
    text = onym("inspect", "x.pth").stdout
    assert "b               = a" in text
    assert "a value, no tensor" in text


def test_names_cannot_play_tricks_on_a_terminal(onym: Run, tmp_path: Path) -> None:
    torch.save({"\x1b[31mred\r\n": torch.ones(1), ".".join("a" * 3000): torch.ones(1)}, tmp_path / "x.pth")
    text = onym("inspect", "x.pth").stdout
    assert "\x1b" not in text
    assert "\\x1b[31mred\\r\\n" in text


def test_no_tensor_is_read(onym: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.save(nn.Linear(2, 1), run_folder / "x.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    for method in ("tensor", "part", "state", "damages", "require_verified"):
        monkeypatch.setattr(TensorFile, method, refuse)
    for arguments in ((run_folder,), (run_folder, "--step", "latest"), (run_folder / "x.safetensors",)):
        assert onym("inspect", *arguments).returncode == 0


@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder", "file"])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_onym_wrote_is_read_without_torch(
    in_fresh_process: Callable[[str], str], run_folder: Path, tmp_path: Path, command: str, kind: str
) -> None:
    """Importing torch takes longer than all the rest."""
    library.save(library.GPT(CONFIG), tmp_path / "folder")
    library.save(library.GPT(CONFIG), tmp_path / "file.safetensors")
    path = {"run": run_folder, "checkpoint": step_of(run_folder, 10)}.get(kind) or next(tmp_path.glob(f"{kind}*"))
    program = f"""
import sys
from onym.cli.main import main
assert main([{command!r}, {str(path)!r}]) == 0
print("torch" in sys.modules)
"""
    assert in_fresh_process(program).splitlines()[-1] == "False"


def test_ten_gigabytes_are_inspected_by_their_header(onym: Run, tmp_path: Path) -> None:
    """A sparse file: reading it would take ten seconds and more memory than allowed."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10_000_000_000)
    counters = Path("/proc/self/io")
    before = counters.read_text() if counters.exists() else ""
    assert told(onym, "inspect", tmp_path / "big.safetensors")["parameters"] == 2_500_000_000
    if before:
        read = [int(text.split("rchar: ")[1].split()[0]) for text in (before, counters.read_text())]
        assert read[1] - read[0] < 50_000_000


def test_remote_runs_are_told_of_too(onym: Run) -> None:
    pytest.importorskip("upath")
    make_run("memory://inspected")
    assert "a run with 3 checkpoints" in onym("inspect", "memory://inspected").stdout
    assert told(onym, "inspect", "memory://inspected", "--step", "keep-me")["step"] == 20
    assert onym("verify", "memory://inspected").stdout.count("good  ") == 3
    assert told(onym, "prune", "memory://inspected", "--keep-last", 1)["deleted"] == [10]


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("prune", "--dry-run"), ("diff", "book.txt")])
def test_a_storage_that_fails_is_a_sentence(
    onym: Run, book: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    memory = pytest.importorskip("fsspec.implementations.memory")
    pytest.importorskip("upath")

    class StorageDown(Exception):
        """Each storage has errors of its own."""

    def fail(*_: object, **__: object) -> None:
        raise StorageDown("no route to host")

    for method in ("info", "ls", "exists", "isdir"):
        monkeypatch.setattr(memory.MemoryFileSystem, method, fail)
    done = onym(command[0], "memory://down/run", *command[1:])
    assert done.returncode == 2
    assert "the storage says 'no route to host'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def layers(*numbers: int, size: int = 1) -> dict[str, str]:
    return {f"b.{number}.{name}": f"[{size}]" for number in numbers for name in ("w", "v")}


def test_only_equal_layers_that_follow_each_other_are_folded() -> None:
    rows = tree({**layers(0, 1, 2), **layers(3, size=9), **layers(4, 5), **layers(7)}, {})
    assert [name for name, _ in rows if name.startswith("b")] == ["b.0 … b.2  (3x)", "b.3", "b.4 … b.5  (2x)", "b.7"]


def test_ties_are_shown_and_layers_with_the_same_ties_folded() -> None:
    first = {"b.0.w": "[1]", "b.1.w": "[1]"}
    inside = {"b.0.v": "b.0.w", "b.1.v": "b.1.w"}
    assert tree(first, inside) == [("b.0 … b.1  (2x)", ""), ("  w", "[1]"), ("  v", "= b.0.w")]
    across = {"b.1.v": "b.0.w"}
    assert tree(first, across) == [("b.0.w", "[1]"), ("b.1", ""), ("  w", "[1]"), ("  v", "= b.0.w")]
    assert tree({"a": "[1]", "a.b": "[2]"}, {}) == [("a", "[1]"), ("  b", "[2]")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("absent",), "nothing at 'absent': check the path"),
        (("run", "--step", "77"), "no step 77; it has 10, 20, 30; pinned are keep-me"),
        (("book.txt",), "'book.txt' is no weight file"),
        (("x" * 300,), "cannot be read"),
    ],
)
def test_bad_input_is_a_sentence(onym: Run, run_folder: Path, book: Path, arguments: tuple[str, ...], says: str) -> None:
    done = onym("inspect", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
