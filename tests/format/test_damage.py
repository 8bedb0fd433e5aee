"""Whatever happens to the files of a checkpoint, what is restored is right, or is said to be damaged and passed over."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onym
from onym import Checkpointer
from onym.errors import CheckpointError
from onym.format.manifest import MANIFEST, MODEL, OPTIMIZER, TRAINER, TRAINER_TENSORS
from onym.format.pth import write_pth
from onym.format.reader import read_checkpoint
from onym.format.writer import write_safetensors

PROVE = os.environ.get("ONYM_PROVE") == "1"
FILES = [MODEL, OPTIMIZER, TRAINER, TRAINER_TENSORS, MANIFEST, "config.json", "notes.txt"]
CONFIG = onym.GPTConfig(vocab_size=5, context_length=4, emb_dim=8, n_heads=2, n_layers=1, tie_embeddings=True)

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def objects(seed: int) -> dict[str, Any]:
    """A training after some steps, of which every number depends on the seed."""
    torch.manual_seed(seed)
    model = onym.GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0 + seed)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    for _ in range(seed):
        model(torch.randint(0, 5, (1, 4))).logsumexp(-1).sum().backward()
        optimizer.step()
        schedule.step()
    return {"model": model, "optimizer": optimizer, "scheduler": schedule, "extra": {"seed": seed, "mean": torch.rand(3)}}


def numbers(value: Any) -> list[Any]:
    """All that a state is made of, in a form that compares."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), value.tolist()]
    if isinstance(value, dict):
        return [[str(key), numbers(part)] for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [numbers(part) for part in value]
    return [value]


def seen(live: dict[str, Any]) -> list[Any]:
    return [numbers(part.state_dict() if hasattr(part, "state_dict") else part) for part in live.values()]


class Run:
    """A run with two steps; the second is to be damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.right: dict[int, list[Any]] = {}
        self.draws: dict[int, float] = {}
        with Checkpointer(directory, background=False) as checkpointer:
            for step in (1, 2):
                live = objects(step)
                checkpointer.save(step, live, files={"notes.txt": f"of step {step}\n"})
                self.right[step] = seen(live)
                self.draws[step] = float(torch.rand(()))
        self.live = objects(9)
        self.paths = {step: directory / f"step-{step:09d}" for step in (1, 2)}
        self.whole = {step: {file: (path / file).read_bytes() for file in FILES} for step, path in self.paths.items()}

    def repair_interrupted(self) -> None:
        """As it was. Files are made anew: an earlier reader may have the old ones mapped."""
        for step, path in self.paths.items():
            if path.is_symlink() or path.is_file():
                path.unlink()
            path.mkdir(exist_ok=True)
            for file in path.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            for file, content in self.whole[step].items():
                (path / file).write_bytes(content)

    def put(self, file: str, content: bytes, step: int = 2) -> None:
        (self.paths[step] / file).unlink(missing_ok=True)
        (self.paths[step] / file).write_bytes(content)

    def restored(self, *, verify: bool = True) -> int | None:
        """Which step was restored, rightly; the one before has to be, with a reason, where the last is damaged."""
        restored = Checkpointer(self.directory).restore(self.live, verify=verify)
        assert restored.step in (1, 2)
        assert seen(self.live) == self.right[restored.step], "not as it was"
        assert float(torch.rand(())) == self.draws[restored.step], "the generators are not as they were"
        assert [path for path, _ in restored.skipped] == ([self.paths[2]] if restored.step == 1 else [])
        assert all(self.paths[2].name in reason for _, reason in restored.skipped)
        return restored.step


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def run(shared: Run) -> Iterator[Run]:
    yield shared
    shared.repair_interrupted()


def some(positions: range, wanted: int = 200) -> list[int]:
    """The first and last, and by chance others between; ten times as many in the long version."""
    wanted = wanted * 10 if PROVE else wanted
    if len(positions) <= wanted:
        return list(positions)
    return sorted({positions[0], positions[-1], *random.Random(len(positions)).sample(positions, wanted - 2)})


def test_a_whole_run_is_restored(run: Run) -> None:
    assert run.restored() == 2
    assert run.restored(verify=False) == 2
    assert seen(objects(1)) != seen(objects(2))


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_in_any_byte(run: Run, file: str) -> None:
    """All positions are told; a few of them by the whole way through ``restore``, which takes longer."""
    whole = run.whole[2][file]
    through = set(some(range(len(whole)), 12))
    for position in range(len(whole)) if PROVE else some(range(len(whole))):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        run.put(file, content)
        if position in through:
            assert run.restored() == 1, position
            continue
        with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
            read_checkpoint(run.paths[2]).verify()


@pytest.mark.parametrize("file", FILES)
def test_every_truncation(run: Run, file: str) -> None:
    whole = run.whole[2][file]
    for length in some(range(len(whole)), 40):
        run.put(file, whole[:length])
        expected = (1, 2) if file == MANIFEST and length == len(whole) - 1 else (1,)  # it ends in a line break
        if length % 8 == 0:
            assert run.restored() in expected, length
        assert run.restored(verify=False) in expected, "sizes are looked at in any case"


@pytest.mark.parametrize("file", FILES)
def test_growth_zeros_and_absence(run: Run, file: str) -> None:
    whole = run.whole[2][file]
    for name, content in {
        "grown": whole + b"\0",
        "grown by a space": whole + b" ",
        "doubled": whole * 2,
        "empty": b"",
        "zeros": bytes(len(whole)),
        "text": b"x" * len(whole),
        "reversed": whole[::-1],
    }.items():
        run.put(file, content)
        harmless = file == MANIFEST and name == "grown by a space"
        assert run.restored() in ((1, 2) if harmless else (1,)), name
    for start in some(range(len(whole)), 8):
        zeroed = bytearray(whole)
        zeroed[start : start + 40] = bytes(len(zeroed[start : start + 40]))
        run.put(file, zeroed)
        assert run.restored() == (2 if zeroed == whole else 1), start
    (run.paths[2] / file).unlink()
    assert run.restored() == 1
    assert run.restored(verify=False) == 1
    (run.paths[2] / file).mkdir()
    assert run.restored() == 1
    assert run.restored(verify=False) == 1


@pytest.mark.parametrize("one", FILES)
@pytest.mark.parametrize("other", FILES)
def test_two_files_that_are_swapped(run: Run, one: str, other: str) -> None:
    if one < other:
        run.put(one, run.whole[2][other])
        run.put(other, run.whole[2][one])
        assert run.restored() == 1


@pytest.mark.parametrize("count", range(1, len(FILES)))
def test_files_of_two_steps_that_are_mixed(run: Run, count: int) -> None:
    chance = random.Random(count)
    for _ in range(40 if PROVE else 4):
        foreign = chance.sample(FILES, count)
        if all(file in foreign for file in FILES if run.whole[1][file] != run.whole[2][file]):
            continue  # a whole step in another's place: see below
        for file in foreign:
            run.put(file, run.whole[1][file])
        same = all(run.whole[1][file] == run.whole[2][file] for file in foreign)
        assert run.restored() == (2 if same else 1), foreign
        run.repair_interrupted()


def test_a_step_in_anothers_place(run: Run) -> None:
    """Whole, so nothing in it is wrong: but it is not what its folder's name says."""
    for file in FILES:
        run.put(file, run.whole[1][file])
    restored = Checkpointer(run.directory).restore(run.live)
    assert restored.step == 1
    assert seen(run.live) == run.right[1]


@pytest.mark.parametrize("verify", [True, False])
def test_a_manifest_of_another_step(run: Run, verify: bool) -> None:
    """The files are as large as those it lists, and their headers may be the same."""
    run.put(MANIFEST, run.whole[1][MANIFEST])
    if verify:
        assert run.restored() == 1
        return
    try:
        assert run.restored(verify=False) == 1
    except CheckpointError:
        assert seen(run.live) not in ([], run.right[2]), "nothing to tell it by, until it is read"


def test_no_step_is_left(run: Run) -> None:
    before = seen(run.live)
    for step in (1, 2):
        run.put(MODEL, bytes(len(run.whole[step][MODEL])), step)
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="damaged"):
            Checkpointer(run.directory).restore(run.live, verify=verify)
        assert seen(run.live) == before, "nothing was changed"


@pytest.mark.parametrize("what", ["a file in its place", "an empty folder", "a link to the other", "a broken link"])
def test_a_step_that_is_no_folder_of_its_own(run: Run, what: str) -> None:
    path = run.paths[2]
    shutil.rmtree(path)
    if what == "a file in its place":
        path.write_text("x")
    elif what == "an empty folder":
        path.mkdir()
    else:
        path.symlink_to(run.paths[1] if what == "a link to the other" else "nowhere")
    restored = Checkpointer(run.directory).restore(run.live)
    assert restored.step == 1
    assert seen(run.live) == run.right[1]


def test_damage_without_verification_is_never_taken_for_the_model(run: Run) -> None:
    """``verify=False`` reads no byte in the search; each tensor is checked all the same when it is used."""
    for file in (MODEL, OPTIMIZER, TRAINER_TENSORS, TRAINER):
        whole = run.whole[2][file]
        for position in some(range(len(whole)), 30):
            content = bytearray(whole)
            content[position] ^= 1 << position % 8
            run.put(file, content)
            before = seen(run.live)
            try:
                Checkpointer(run.directory).restore(run.live, verify=False)
            except CheckpointError:
                assert seen(run.live) == before, "nothing was changed"
            else:
                assert seen(run.live) in run.right.values(), (file, position)
        run.repair_interrupted()


# --- what is used by itself -------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "load": lambda path: _loaded(path),
    "load_model": lambda path: onym.load_model(path).state_dict(),
    "tensor": lambda path: {name: onym.open_checkpoint(path).tensor(name) for name in some_names(path)},
    "part": lambda path: {name: onym.open_checkpoint(path).part(name, ...) for name in some_names(path)},
    "state": lambda path: onym.open_checkpoint(path).model.state(),
}


def some_names(path: Path) -> list[str]:
    names = onym.open_checkpoint(path).names
    return names if PROVE else names[::4]


def _loaded(path: Path) -> dict[str, Tensor]:
    model = onym.GPT(CONFIG)
    onym.load(path, into=model)
    return model.state_dict()


@pytest.mark.parametrize("kind", ["a folder", ".safetensors", ".pth"])
@pytest.mark.parametrize("use", USES)
def test_no_use_of_a_damaged_file_gives_wrong_values(tmp_path: Path, use: str, kind: str) -> None:
    model: nn.Module = objects(1)["model"]
    right = model.state_dict()
    path = tmp_path / ("x" if kind == "a folder" else f"x{kind}")
    onym.save(model, path)
    if (use, kind) == ("load_model", ".pth"):
        with pytest.raises(CheckpointError, match="does not say how many attention heads"):
            onym.load_model(path)
        return
    used = USES[use]
    assert all(torch.equal(found, right[name]) for name, found in used(path).items())
    file = path / MODEL if kind == "a folder" else path
    whole = file.read_bytes()
    refused = 0
    for position in some(range(len(whole)), 25):
        for content in (
            whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :],
            whole[:position] + bytes(len(whole[position : position + 30])) + whole[position + 30 :],
            whole[:position],
        ):
            file.unlink()
            file.write_bytes(content)
            try:
                found = used(path)
            except CheckpointError:
                refused += 1
                continue
            assert found.keys() == right.keys() or (use in ("tensor", "part") and found.keys() <= right.keys()), position
            assert all(torch.equal(value, right[name]) for name, value in found.items()), position
    assert refused > 20


def test_all_damage_is_listed(run: Run) -> None:
    opened = read_checkpoint(run.paths[2])
    assert list(opened.damages()) == []
    names = opened.names
    content = bytearray(run.whole[2][MODEL])
    content[-1] ^= 1
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    run.put(MODEL, content)
    run.put("notes.txt", b"of step 7\n")
    found = list(read_checkpoint(run.paths[2]).damages())
    assert [(damage.file, damage.tensor in names) for damage in found] == [(MODEL, True), (MODEL, True), ("notes.txt", False)]
    assert all(damage.reason for damage in found)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_two_files_of_the_same_model_are_not_mixed(tmp_path: Path, ending: str) -> None:
    """The beginning of one and the end of the other, as an interrupted copy leaves it."""
    contents = []
    for step in (1, 2):
        path = tmp_path / f"{step}{ending}"
        (write_safetensors if ending == ".safetensors" else write_pth)(path, objects(step)["model"].state_dict())
        contents.append(path.read_bytes())
    assert len(contents[0]) == len(contents[1])
    right = [onym.open_checkpoint(tmp_path / f"{step}{ending}").model.state() for step in (1, 2)]
    path = tmp_path / f"mixed{ending}"
    for position in some(range(len(contents[0])), 60):
        path.unlink(missing_ok=True)
        path.write_bytes(contents[0][:position] + contents[1][position:])
        try:
            found = onym.open_checkpoint(path).model.state()
        except CheckpointError:
            continue
        assert any(all(torch.equal(found[name], value) for name, value in each.items()) for each in right), position
