"""Options from a file, from the run itself, and from another run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import onym as library
from onym.cli.config import arguments_of
from onym.cli.main import main
from onym.errors import ConfigError
from onym.train.finetune_options import FinetuneOptions
from onym.train.options import DataOptions, OptimizationOptions, RunOptions
from onym.train.run_folder import CHANGEABLE
from tests.cli.test_train import EAGER, metrics
from tests.conftest import Run


def test_a_file_holds_any_of_them_and_flags_go_before_it(onym: Run, book: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'data = ["book.txt"]\nsteps = 9\npreset = "nano"\n[model]\nn-layers = 2\nemb_dim = 32\n'
        "n_heads = 2\ntie-embeddings = true\n"
        "context-length = 32\n[run]\ncompile = 'off'\nname = 'filed'\n[optimization]\nlearning-rate = 1e-3\nbatch-size = 4\n"
    )
    done = onym("train", "--config", "run.toml", "--steps", 4, "--vocab-size", 300)
    assert done.returncode == 0, done.stderr
    options = json.loads((tmp_path / "runs/filed/run.json").read_text())["options"]
    assert options["optimization"]["steps"] == 4
    assert options["optimization"]["learning_rate"] == 1e-3
    assert options["model"]["tie_embeddings"] is True
    assert options["run"]["compile"] == "off"
    again = onym("train", "--name", "filed", "--steps", 5)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepz = 3", "has 'stepz' (did you mean 'steps'?), which is no option"),
        ("[optimisation]\nsteps = 3", "has a table [optimisation] (did you mean 'optimization'?)"),
        ("[run]\nsteps = 3", "has 'steps', which is no option"),
        ("steps = [[1]]", "'steps' in 'x.toml' has to be"),
        ("steps", "'x.toml' is no TOML file"),
        ("steps = 'many'", "'steps' in 'x.toml' has to be a whole number, not 'many'"),
        ("steps = 3.5", "'steps' in 'x.toml' has to be a whole number, not 3.5"),
        ("weight_decay = true", "'weight_decay' in 'x.toml' has to be a number, not True"),
        ("deterministic = 1", "'deterministic' in 'x.toml' has to be true or false, not 1"),
        ("compile = 'sometimes'", "'compile' in 'x.toml' has to be one of auto, whole, blocks, off, not 'sometimes'"),
    ],
)
def test_what_a_file_has_wrong_is_named(onym: Run, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    done = onym("train", "--config", "x.toml")
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(ConfigError):
        arguments_of(tmp_path / "x.toml")


def test_a_length_takes_the_place_of_another(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 5).returncode == 0
    longer = onym("train", "--name", "book", "--tokens", 10 * 4 * 32)
    assert longer.returncode == 0, longer.stderr
    assert "--steps was 5, is not given; --tokens was not given, is 1280" in longer.stdout.replace(
        ".\nChanged since the run was started: ", "; "
    )
    assert metrics(tmp_path / "runs/book")[-1]["step"] == 10
    both = onym("train", "--data", book, *EAGER, "--steps", 5, "--epochs", 1)
    assert both.returncode == 2
    assert "--steps and --epochs each say how long to train: give one of them" in both.stderr


@pytest.mark.parametrize(
    ("text", "flags", "tokens_per_step", "steps"),
    [
        ("epochs = 9", ("--steps", 3), 256, 3),
        ("steps = 9", ("--tokens", 512), 256, 2),
        ("[optimization]\ntokens-per-step = '1k'\nsteps = 2", ("--batch_size=2",), 64, 2),
        ("batch_size = 8\nsteps = 2", ("--tokens-per-step", 64), 64, 2),
    ],
)
def test_a_flag_in_one_unit_goes_before_the_file_in_another(
    onym: Run, book: Path, tmp_path: Path, text: str, flags: tuple[object, ...], tokens_per_step: int, steps: int
) -> None:
    shape = ("--preset", "nano", "--emb-dim", 32, "--n-heads", 2, "--context-length", 32, "--vocab-size", 300)
    (tmp_path / "x.toml").write_text(text)
    command = ("train", "--data", book, "--compile", "off", *shape, "--config", "x.toml", *flags)
    for _ in range(2):  # a run that exists, too
        done = onym(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    last = metrics(tmp_path / "runs/book")[-1]
    assert (last["step"], last["tokens"]) == (steps, steps * tokens_per_step)


def test_two_units_in_one_place_are_refused(onym: Run, book: Path, tmp_path: Path) -> None:
    both = onym("train", "--data", book, *EAGER, "--tokens-per-step", "1k")
    assert both.returncode == 2
    assert "--batch-size and --tokens-per-step each say how much goes into a step: give one of them" in both.stderr
    (tmp_path / "x.toml").write_text("steps = 3\n[optimization]\nepochs = 2\n")
    both = onym("train", "--data", book, "--config", "x.toml")
    assert both.returncode == 2
    assert "'x.toml': --steps and --epochs each say how long to train: give one of them" in both.stderr


def test_what_may_change_is_as_the_guide_says() -> None:
    text = (Path(__file__).parents[2] / "docs/resume.md").read_text()
    table = text[text.index("| may change |") : text.index("| may not change |")]
    told = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)`", table)}
    assert told == CHANGEABLE
    row = text[text.index("| may not change |") : text.index(": this would be another run")]
    fixed = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)`", row)}
    subjects = (DataOptions, OptimizationOptions, RunOptions, FinetuneOptions)  # the model's are its kind and shape
    assert told | fixed == {field.name for subject in subjects for field in dataclasses.fields(subject)}
    assert not told & fixed


def test_a_changed_text_is_accepted_once(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 5).returncode == 0
    book.write_text(book.read_text() + "One more line.\n")
    refused = onym("train", "--name", "book", "--steps", 10)
    assert refused.returncode == 2
    assert "or continue with --data-changed accept" in refused.stderr
    accepted = onym("train", "--name", "book", "--steps", 10, "--data-changed", "accept")
    assert accepted.returncode == 0, accepted.stderr
    assert "The text has changed; continuing with the new one" in accepted.stdout
    book.write_text(book.read_text() + "And one more.\n")
    assert onym("train", "--name", "book", "--steps", 15).returncode == 2, "it was for that time"


def test_other_surroundings_are_told(onym: Run, book: Path, tmp_path: Path) -> None:
    import torch

    assert onym("train", "--data", book, *EAGER, "--steps", 5).returncode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        longer = onym("train", "--name", "book", "--steps", 8)
    finally:
        torch.set_num_threads(threads)
    assert longer.returncode == 0, longer.stderr
    assert "Not bitwise identical to a run without the interruption: machine was " in longer.stdout
    assert f"{threads} threads" in longer.stdout
    assert f"{threads + 1} threads" in longer.stdout


def test_a_new_run_starts_from_old_weights(onym: Run, book: Path, tmp_path: Path) -> None:
    assert onym("train", "--data", book, *EAGER, "--steps", 20).returncode == 0
    fine = (
        "train",
        "--data",
        book,
        "--from",
        "runs/book",
        "--name",
        "fine",
        "--steps",
        3,
        "--compile",
        "off",
        "--drop-rate",
        0.1,
    )
    done = onym(*fine, "--context-length", 16, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    first = metrics(tmp_path / "runs/fine")[0]
    assert first["val_loss"] < metrics(tmp_path / "runs/book")[0]["val_loss"] - 0.5, "not from new weights"
    model = library.load_model(tmp_path / "runs/fine")
    assert model.config.context_length == 16  # type: ignore[union-attr]
    assert model.config.n_layers == 2  # type: ignore[union-attr]
    again = onym(*fine, "--steps", 5)
    assert again.returncode == 0, again.stderr
    assert "Continuing after step 3 of 5" in again.stdout
    library.save(library.load_model(tmp_path / "runs/book"), tmp_path / "model.safetensors")
    for options, says in (
        (("--from", "runs/book", "--n-layers", 3), "'runs/book' has n_layers=2, and --n-layers 3 was given: leave it out"),
        (("--from", "runs/book", "--context-length", 64), "leave it out or take a smaller one"),
        (("--from", "gone"), "There is nothing at 'gone'"),
        (("--from", "model.safetensors"), "holds no tokenizer: give the one it was trained with as --tokenizer"),
    ):
        refused = onym("train", "--data", book, "--compile", "off", "--steps", 2, "--name", "other", *options)
        assert refused.returncode == 2
        assert says in refused.stderr
        assert not (tmp_path / "runs/other").exists()


def test_a_tokenizer_of_another_size_does_not_fit(onym: Run, book: Path, tmp_path: Path) -> None:
    from onym.data.tokenizer import Tokenizer

    assert onym("train", "--data", book, *EAGER, "--steps", 2).returncode == 0
    (tmp_path / "small.json").write_text(Tokenizer.train([book.read_text()], 280).to_json(), encoding="utf-8")
    done = onym(
        "train", "--data", book, "--from", "runs/book", "--name", "other", "--tokenizer", "small.json", "--compile", "off"
    )
    assert done.returncode == 2
    assert "has a vocabulary of 300 tokens, and the tokenizer has 280" in done.stderr


def test_training_stops_when_it_gets_no_better(onym: Run, book: Path, tmp_path: Path) -> None:
    run = (*EAGER, "--steps", 200, "--learning-rate", 0.5, "--patience", 1, "--warmup-steps", 1, "--eval-every", 5)
    done = onym("train", "--data", book, *run)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Stopped after step \d+: 1 evaluations without a better held-out loss", done.stdout)
    assert metrics(tmp_path / "runs/book")[-1]["step"] < 200
    again = onym("train", "--data", book, *run)
    assert "finished already: nothing to do" in again.stdout
    more = onym("train", "--name", "book", "--patience", 0, "--steps", 60)
    assert more.returncode == 0, more.stderr


def test_a_run_on_a_relative_path_goes_on_from_another_folder(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onym("train", "--data", "book.txt", *EAGER, "--steps", 3).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--name", "book", "--runs-dir", "../runs", "--steps", "4"]) == 0
    assert metrics(tmp_path / "runs/book")[-1]["step"] == 4
    again = onym("train", "--data", "./book.txt", "--steps", 5)
    assert again.returncode == 0
    assert "--data was" not in again.stdout, "the same file"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--zero-init", "--from", "runs/other"), "--zero-init is about first weights, and --from brings others"),
        (("--optimizer", "adamw", "--muon-momentum-warmup", 5), "--muon-momentum-warmup is Muon's"),
        (("--optimizer", "adamw", "--muon-learning-rate", 1e-3), "--muon-learning-rate is Muon's"),
        (("--arch", "llama", "--drop-rate", 0.1), "--drop-rate is of --arch gpt2, and this model is of llama"),
        (("--arch", "gpt2", "--rope-base", 1e4), "--rope-base is of --arch llama or qwen3, and this model is of gpt2"),
        (("--arch", "gpt2", "--preset", "llama3.2-1b"), "A GPT-2 has no preset 'llama3.2-1b'"),
        (("--preset", "nanno"), "There is no preset 'nanno' (did you mean 'nano'?)"),
        (("--n-kv-groups", 3), "n_heads=4 cannot share n_kv_groups=3"),
        (("--head-dim", 31), "head_dim=31 is odd"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(onym: Run, options: tuple[object, ...], says: str) -> None:
    refused = onym("train", *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1
