"""inspect, verify, diff and prune: what they say is so, and they say it for every kind of file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import origo
from origo.store.layout import MANIFEST
from tests.conftest import Run

CONFIG = origo.GPTConfig(vocab_size=50, context_length=8, emb_dim=8, n_heads=2, n_layers=3, tie_embeddings=True)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Three steps of a small GPT, the second one pinned."""
    model = origo.GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    with origo.Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        for step in (10, 20, 30):
            with torch.no_grad():
                model.trf_blocks[1].norm1.weight.add_(1)
            checkpointer.save(step, {"model": model, "optimizer": optimizer}, {"val_loss": 5 - step / 10})
        checkpointer.pin(20, "keep-me")
    return tmp_path / "run"


def damage(run: Path, step: int) -> None:
    file = run / "checkpoints" / f"step-{step:09d}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


def told(origo: Run, *arguments: object, code: int = 0) -> Any:
    done = origo(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_a_run_is_listed(origo: Run, run_folder: Path) -> None:
    (run_folder / "checkpoints" / "step-000000010" / MANIFEST).write_text("{}")
    text = origo("inspect", run_folder).stdout
    assert "a run with 3 checkpoints" in text
    assert "val_loss 3, pinned as keep-me" in text
    assert "10    ?" in text
    steps = told(origo, "inspect", run_folder)["steps"]
    assert [step["step"] for step in steps] == [10, 20, 30]
    assert "damaged" in steps[0]
    assert steps[2]["metrics"] == {"val_loss": 2.0}
    assert len(steps[2]["identity"]) == 64


def test_a_checkpoint_is_described_with_its_layers_folded(origo: Run, run_folder: Path) -> None:
    for step in ("keep-me", "20"):
        text = origo("inspect", run_folder, "--step", step).stdout
        assert "a checkpoint" in text
        assert "tie_embeddings=True" in text
        assert "goes on from  step 10" in text
        assert "3 x  trf_blocks.*.att.qkv.weight" in text
        assert "tok_emb.weight = out_head.weight" in text
    everything = told(origo, "inspect", run_folder, "--step", "latest")
    assert everything["step"] == 30
    assert everything["tensors"]["model.safetensors"]["tok_emb.weight"] == {
        "dtype": "float32", "shape": [50, 8], "aliases": ["out_head.weight"]
    }  # fmt: skip
    assert everything["parameters"] == sum(parameter.numel() for parameter in origo_model().parameters())


def origo_model() -> nn.Module:
    return origo.GPT(CONFIG)


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_single_models_are_told_apart(origo: Run, tmp_path: Path, ending: str) -> None:
    import origo as library

    library.save(nn.Linear(2, 1), tmp_path / f"x{ending}")
    text = origo("inspect", tmp_path / f"x{ending}").stdout
    says = {".safetensors": "a .safetensors file written by Origo", ".pth": "a .pth state dict", "": "a model folder"}[ending]
    assert says in text
    assert "weight" in text
    assert "float32 [1, 2]" in text


def test_ten_gigabytes_are_inspected_by_their_header(origo: Run, tmp_path: Path) -> None:
    """A sparse file: reading it would take ten seconds and more memory than allowed."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10_000_000_000)
    before = Path("/proc/self/io").read_text() if Path("/proc/self/io").exists() else ""
    assert told(origo, "inspect", tmp_path / "big.safetensors")["parameters"] == 2_500_000_000
    if before:
        after = Path("/proc/self/io").read_text()
        read = [int(text.split("rchar: ")[1].split()[0]) for text in (before, after)]
        assert read[1] - read[0] < 50_000_000


def test_verify_reads_every_step(origo: Run, run_folder: Path) -> None:
    done = origo("verify", run_folder)
    assert done.returncode == 0
    assert done.stdout.count("good  ") == 3
    damage(run_folder, 20)
    done = origo("verify", run_folder)
    assert done.returncode == 1
    assert done.stdout.count("good  ") == 2
    assert "DAMAGED" in done.stdout
    assert "step-000000020/model.safetensors' is damaged: the bytes of" in done.stdout
    result = told(origo, "verify", run_folder, code=1)
    assert not result["good"]
    assert [len(step["damages"]) for step in result["checked"]] == [0, 1, 0]
    assert origo("verify", run_folder, "--step", 30).returncode == 0
    (run_folder / "checkpoints" / "step-000000030" / MANIFEST).unlink()
    assert origo("verify", run_folder, "--step", 10).returncode == 0
    assert origo("verify", run_folder).returncode == 1


def test_verify_says_what_it_could_check(origo: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "stock.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pth")
    assert "structure only: it holds no hashes" in origo("verify", tmp_path / "stock.safetensors").stdout
    assert "checksums of the zip only" in origo("verify", tmp_path / "x.pth").stdout
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(b"\x00\x00\x80\x3f")] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    assert origo("verify", tmp_path / "x.pth").returncode == 1
    assert origo("verify", tmp_path / "absent").returncode == 2


def test_equal_weights_are_told_first(origo: Run, run_folder: Path, tmp_path: Path) -> None:
    import origo as library

    model = library.load_model(run_folder)
    library.save(model, tmp_path / "same.safetensors")
    done = origo("diff", run_folder, "same.safetensors")
    assert (done.returncode, done.stdout.count("The same weights (identity ")) == (0, 1)
    torch.save(torch.compile(model).state_dict(), tmp_path / "polluted.pth")
    done = origo("diff", run_folder, "polluted.pth")
    assert done.returncode == 0, done.stdout
    assert "The same weights: every name" in done.stdout
    assert "Names of B that wrappers had changed were put right" in done.stdout


def test_differences_are_summed_up(origo: Run, run_folder: Path, tmp_path: Path) -> None:
    done = origo("diff", run_folder, run_folder, "--step-a", "10", "--step-b", "30")
    assert done.returncode == 1
    assert "1 tensors have other values" in done.stdout
    assert "trf_blocks.1.norm1.weight  1         2        100.0%" in done.stdout
    import origo as library

    torch.manual_seed(1)
    library.save(
        library.GPT(library.GPTConfig.from_dict({**CONFIG.to_dict(), "n_layers": 2, "emb_dim": 16})), tmp_path / "other"
    )
    done = origo("diff", run_folder, "other")
    assert "config: n_layers is 3 in A, 2 in B" in done.stdout
    assert "Only in A" in done.stdout
    assert "tok_emb.weight: float32 [50, 8] in A, float32 [50, 16] in B" in done.stdout
    result = told(origo, "diff", run_folder, "other", code=1)
    assert result["kinds"]["tok_emb.weight"] == [["float32", [50, 8]], ["float32", [50, 16]]]


def test_prune_says_and_does(origo: Run, run_folder: Path) -> None:
    done = origo("prune", run_folder, "--keep-last", 1, "--dry-run")
    assert "10  " in done.stdout
    assert "would go" in done.stdout
    assert "pinned as 'keep-me'" in done.stdout
    assert "would be free" in done.stdout
    checkpoints = run_folder / "checkpoints"
    assert len(list(checkpoints.glob("step-*"))) == 3
    assert origo("prune", run_folder, "--pin", 10, "--as", "first").returncode == 0
    assert origo("prune", run_folder, "--unpin", "keep-me").returncode == 0
    result = told(origo, "prune", run_folder, "--keep-last", 1)
    assert result["deleted"] == [20]
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-000000010", "step-000000030"]
    assert not (checkpoints / "writer.lease").exists()


def test_prune_does_not_run_against_a_writer_or_a_damaged_successor(origo: Run, run_folder: Path) -> None:
    import origo as library

    with library.Checkpointer(run_folder / "checkpoints") as checkpointer:
        checkpointer.acquire()
        done = origo("prune", run_folder, "--keep-last", 1)
        assert done.returncode == 2
        assert "is being written by another Checkpointer of this program" in done.stderr
    damage(run_folder, 30)
    done = origo("prune", run_folder, "--keep-last", 1)
    assert done.returncode == 2
    assert "does not read back" in done.stderr
    assert len(list((run_folder / "checkpoints").glob("step-*"))) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect", "absent"), "nothing at 'absent': check the path"),
        (("inspect", "run", "--step", "77"), "no step 77; it has 10, 20, 30; pinned are keep-me"),
        (("verify", "absent"), "nothing at 'absent'"),
        (("diff", "run", "absent"), "nothing at 'absent'"),
        (("prune", "absent"), "is no run"),
        (("prune", "run", "--keep-last", "0"), "keep_last is 0"),
        (("prune", "run", "--keep-best", "x:lowest"), "keep_best is"),
        (("prune", "run", "--pin", "10"), "--pin takes a step and --as its name"),
        (("prune", "run", "--pin", "11", "--as", "x"), "no step 11 to pin"),
        (("prune", "run", "--unpin", "x"), "Nothing is pinned as 'x'"),
    ],
)
def test_bad_input_is_a_sentence(origo: Run, run_folder: Path, arguments: tuple[str, ...], says: str) -> None:
    done = origo(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
