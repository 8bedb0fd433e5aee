"""The commands of the guides are ones that are understood, and those of docs/finetuning.md do what it says."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lm_eval._cli.harness import HarnessCLI

import onym as library
from onym.cli.main import main
from onym.cli.parsing import parse
from onym.data.chat_template import ALPACA
from onym.train import loop
from onym.train.finetune_options import FinetuneOptions
from onym.train.optimizer import with_recipe
from onym.train.options import ModelOptions, TrainOptions
from onym.units import format_size
from tests.cli.test_train import EAGER
from tests.conftest import _proof_in_this_process, write_book
from tests.finetuning import instructions, messages, write_csv, write_json

DOCS = Path(__file__).parents[2] / "docs"


def commands(*guides: str) -> list[list[str]]:
    """What the guides have to be typed, without the files that it reads or writes by redirection."""
    text = "".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in guides)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(re.split(r" [<>] ", line)[0], comments=True) for line in lines]


COMMANDS = commands("evaluating", "generating", "finetuning")
FINETUNING = commands("finetuning")
GUIDE = " ".join((DOCS / "finetuning.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_it_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where no run of such a name supplies options
    if command[0] == "onym":
        given = parse(f"onym {command[1]}", command[1], command[2:])
        if command[1] == "train":
            assert given[0].model.start_from
        elif command[1] == "convert":
            assert given.destination
        else:
            assert given.models if command[1] == "evaluate" else given.model
    else:
        assert command[:3] == ["python", "-m", "onym.tools.lm_eval"]
        monkeypatch.setattr(sys, "argv", command[2:])
        assert HarnessCLI().parse_args().model == "onym"


# -- docs/finetuning.md, with a tiny model in the place of GPT-2

QUICK = {
    "train": ("--steps", "2", "--warmup-steps", "1", "--batch-size", "2", "--eval-batches", "2", "--compile", "off"),
    "chat": ("--max-new-tokens", "4", "--seed", "0", "--dtype", "fp32", "--compile", "off"),
}
TYPED = "You won a prize.\nLunch tomorrow?\n"


class Done(NamedTuple):
    """A folder in which the commands of the guide were run, in their order."""

    folder: Path
    printed: dict[str, str]
    """By the command."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("guide")
    write_json(folder / "instruction-data.json", instructions(16, seed=0))
    write_csv(folder / "spam.csv", messages(40, seed=0))
    shape = ("--context-length", "256", "--emb-dim", "64", "--n-heads", "1")  # heads of 64, as GPT-2's
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONYM_CACHE_DIR", str(folder / "cache"))
        patch.setattr(loop, "prove", _proof_in_this_process)
        base = ("--data", str(write_book(folder)), "--name", "base", *EAGER, *shape, "--steps", "1")
        assert main(["train", *base]) == 0
        assert main(["convert", "runs/base", "gpt2", "--to", "huggingface"]) == 0
        yield Done(folder, {" ".join(words): _run(words) for words in FINETUNING if not _is_of_an_export(words)})


def _run(words: list[str]) -> str:
    """What a command prints; where it reads lines, they are those above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TYPED.encode()), encoding="utf-8"))
        patch.setattr(sys, "stdout", printed := io.StringIO())
        typed = [word.replace("trf_blocks.11", "trf_blocks.1") for word in words[1:]]  # there are two blocks
        assert main([*typed, *QUICK.get(words[1], ())]) == 0, words
    return printed.getvalue()


def _is_of_an_export(words: list[str]) -> bool:
    """Whether it writes or reads a classifier in another program's layout."""
    return not {"spam-hf", "review_classifier.pth"}.isdisjoint(words)


def test_a_model_learns_the_books_prompt_and_takes_its_template_along(done: Done) -> None:
    printed = done.printed["onym train --from gpt2 --sft instruction-data.json --chat-template alpaca"]
    shown = "".join(line.removeprefix("  │ ") + "\n" for line in printed.splitlines())
    row = instructions(16, seed=0)[0]
    asked = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
    assert f"appropriately completes the request.\n\n{asked}⟦{row['output']}<|endoftext|>⟧" in shown
    assert "onym chat runs/instruction-data" in printed
    config = library.open_checkpoint(done.folder / "answers").text("tokenizer_config.json")
    assert json.loads(config or "")["chat_template"] == ALPACA


def test_a_classifier_says_a_label_for_each_text(done: Done) -> None:
    printed = done.printed["onym train --from gpt2 --classify spam.csv --label label"]
    assert re.search(r"accuracy \d+\.\d%, F1 0\.\d+", printed)
    (said,) = done.printed["onym classify runs/spam You won a prize. Call now."].splitlines()
    assert re.fullmatch(r"(ham|spam)\t0\.\d{4}", said)
    rows = [json.loads(line) for line in done.printed["onym classify runs/spam --json"].splitlines()]
    assert [sorted(row["probabilities"]) for row in rows] == [["ham", "spam"]] * 2


def test_the_last_block_the_last_norm_and_the_head_are_trained_alone(done: Done) -> None:
    before = library.load_model(done.folder / "gpt2").state_dict()
    after = library.load_model(done.folder / "runs" / "last-block").state_dict()
    changed = {name for name, tensor in after.items() if tensor.shape != before[name].shape or not tensor.equal(before[name])}
    assert {name.split(".")[0] for name in changed} == {"trf_blocks", "final_norm", "out_head"}
    assert all(name.startswith("trf_blocks.1.") for name in changed if name.startswith("trf_blocks"))


def test_an_adapter_is_merged_written_beside_its_base_and_written_alone(done: Done) -> None:
    merged, opened = (library.load_model(done.folder / name).state_dict() for name in ("merged", "runs/lora"))
    assert all(tensor.equal(opened[name]) for name, tensor in merged.items())
    base = library.load_model(done.folder / "both").state_dict()
    assert not base["trf_blocks.0.att.qkv.weight"].equal(merged["trf_blocks.0.att.qkv.weight"])
    for folder in ("both/adapter", "adapter"):
        model = library.load_model(done.folder / "gpt2")
        library.LoRA.open(done.folder / folder, model).merge()
        found = model.state_dict()["trf_blocks.0.att.qkv.weight"]
        torch.testing.assert_close(found, merged["trf_blocks.0.att.qkv.weight"], rtol=0, atol=1e-6)


def test_a_classifier_goes_to_other_programs_and_is_read_from_there(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.folder)
    printed = [_run(words) for words in FINETUNING if _is_of_an_export(words)]
    assert re.fullmatch(r"\S+\t0\.\d{4}\n", printed[-1])


def test_the_guides_figures_are_those_of_the_code() -> None:
    for preset, *rates in (("gpt2-small", "5e-5", "5e-4"), ("gpt2-medium", "3.75e-5", "3.75e-4")):
        for rank, rate in zip((None, 16), rates, strict=True):
            tuning = FinetuneOptions(sft="rows.json", lora=rank)
            found = with_recipe(TrainOptions(model=ModelOptions(preset, start_from="gpt2"), finetune=tuning)).optimization
            assert found.learning_rate == pytest.approx(float(rate))
            assert (found.optimizer, found.epochs) == ("adamw", 2)
            assert f"| {rate}" in GUIDE
    with torch.device("meta"):
        model = library.GPT(library.GPTConfig.preset("gpt2-small", vocab_size=50257))
        values = sum(parameter.numel() for parameter in library.LoRA.apply(model, rank=16).parameters())
        whole = sum(parameter.numel() for parameter in model.parameters()) - values
    assert f"{values / 1e6:.1f} million values in {format_size(4 * values)}; the model has {4 * whole / 1e6:.0f} MB" in GUIDE
