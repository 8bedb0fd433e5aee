"""A trained model that learns to answer, or to tell labels apart: rows, what counts, adapters, frozen weights, resuming."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onym as library
from onym import GPT
from onym.cli.main import main
from onym.data.batches import IGNORED_TARGET
from onym.data.examples import Example, Examples, ExampleSet, ExampleWindows
from onym.gpt.config import GPTConfig
from onym.gpt.documents import MARKED, loss_of, unmarked
from onym.train import loop
from onym.train.evaluate import scores_of
from onym.train.finetune import balanced
from onym.train.options import OptimizationOptions
from onym.train.planned_kill import planned_kill
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests.cli.test_train import EAGER
from tests.conftest import TINY, Run, _proof_in_this_process, write_book
from tests.finetuning import instructions, messages, write_csv, write_json

CPU = Compute(torch.device("cpu"), torch.float32)
LENGTH = ("--compile", "off", "--steps", 10, "--eval-every", 5, "--save-every", 5, "--log-every", 1, "--warmup-steps", 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on text, which the tests only read."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONYM_CACHE_DIR", str(folder / "cache"))
        patch.setattr(loop, "prove", _proof_in_this_process)
        command = ("train", "--data", write_book(folder), "--name", "base", *EAGER, "--context-length", 96, "--steps", 10)
        assert main([str(word) for word in command]) == 0
        yield folder / "runs" / "base"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_json(tmp_path / "rows.json", instructions(40, seed=0))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "spam.csv", messages(60, seed=0))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# -- rows, windows, losses


def example_set(examples: list[Example]) -> ExampleSet:
    starts = np.cumsum([0, *(len(each.tokens) for each in examples)])
    tokens, targets = (np.concatenate([getattr(each, what) for each in examples]) for what in ("tokens", "targets"))
    held_out = np.zeros(len(examples), dtype=bool)
    return ExampleSet(Path("k"), tokens.astype(np.int32), targets.astype(np.int32), starts.astype(np.int64), held_out)


@st.composite
def drawn_examples(draw: st.DrawFn) -> list[Example]:
    found = []
    for _ in range(draw(st.integers(1, 7))):
        tokens = draw(st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=20))
        targets = [draw(st.sampled_from([IGNORED_TARGET, token])) for token in tokens]
        targets[-1] = tokens[0]
        found.append(Example(tokens, targets))
    return found


@settings(max_examples=20)
@given(drawn_examples(), st.booleans())
def test_a_packed_batch_has_the_loss_of_its_examples_one_by_one(examples: list[Example], pack: bool) -> None:
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    windows = ExampleWindows(example_set(examples), np.arange(len(examples)), TINY.context_length, pack=pack)
    inputs, targets = windows.read(np.arange(len(windows)))
    total, counted = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(torch.tensor([example.tokens]))[0]
            wanted = torch.tensor(example.targets)
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            counted += int((wanted != IGNORED_TARGET).sum())
        assert float(loss_of(model, inputs, targets, MARKED)) == pytest.approx(total / counted, abs=1e-5)
    tokens, _ = unmarked(inputs)
    found = sorted(tuple(map(int, row[row != IGNORED_TARGET])) for row in targets)
    assert int((targets != IGNORED_TARGET).sum()) == counted, found
    assert tokens.min() >= 0
    assert len(windows) <= len(examples)


@pytest.mark.parametrize("labels", [(), ("a", "b", "c")])
def test_micro_batches_have_the_gradient_of_the_whole(labels: tuple[str, ...]) -> None:
    draw = np.random.default_rng(0)
    examples = []
    for number in range(8):
        size = int(draw.integers(2, 30))
        tokens = draw.integers(0, TINY.vocab_size, size).tolist()
        counts = draw.random(size) < (0.1 if number % 2 else 0.9)
        targets = [IGNORED_TARGET] * (size - 1) + [number % 3] if labels else np.where(counts, tokens, IGNORED_TARGET).tolist()
        examples.append(Example(tokens, [*targets[:-1], number % 3]))
    batch = ExampleWindows(example_set(examples), np.arange(8), TINY.context_length, pack=False).read(np.arange(8))
    config = GPTConfig(**{**TINY.to_dict(), "labels": labels})

    def gradients(micro_batch: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = GPT(config)
        model.class_weights = torch.tensor([0.5, 1.0, 4.0]) if labels else None
        stepper = Stepper(model, OptimizationOptions(), CPU, separator=MARKED)
        stepper.micro_batch = micro_batch
        stepper._backward(batch)
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    whole = gradients(8)
    for size in (1, 2, 4):
        for name, gradient in gradients(size).items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6, msg=name)


def test_a_part_of_the_held_out_rows_is_like_all_of_them() -> None:
    """The longest rows are put into windows first, so the first windows are no sample."""
    lengths = np.random.default_rng(0).integers(2, TINY.context_length, 400)
    data = example_set([Example([1] * size, [IGNORED_TARGET] * (size - 1) + [size]) for size in lengths.tolist()])
    examples = Examples("rows", dataclasses.replace(data, held_out=np.ones(400, dtype=bool)), TINY.context_length, True)
    means = []
    for limit in (1000, 10):
        ((_, batches),) = examples.held_out_batches(TINY.context_length, 4, limit)
        found = torch.cat([targets[targets != IGNORED_TARGET] for _, targets in batches])
        means.append(float(found.float().mean()))
    assert means[1] == pytest.approx(means[0], rel=0.1)
    assert 40 < len(found) < 200


def test_balanced_weights_give_each_label_the_same_sum() -> None:
    counts = (90, 9, 1)
    sums = [weight * count for weight, count in zip(balanced(counts), counts, strict=True)]
    assert sums == pytest.approx([100 / 3] * 3)


def test_accuracy_and_f1_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    right, answered = draw.integers(0, 4, 200), draw.integers(0, 3, 200)  # of four labels one is never given
    counts = torch.bincount(torch.tensor(right * 4 + answered), minlength=16).view(4, 4)
    found = scores_of(counts)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(right, answered))
    assert found["f1"] == pytest.approx(metrics.f1_score(right, answered, average="macro"))


# -- a run on conversations


def test_a_model_learns_to_answer_and_keeps_its_template(onym: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    done = onym("train", "--from", base, "--sft", rows, *LENGTH)
    assert done.returncode == 0, done.stderr
    assert "40 of instruction, input and output; to train on " in done.stdout
    assert re.search(r"⟦\S.*<\|im_end\|>⟧", done.stdout), "the first row is shown with what counts"
    assert "onym chat runs/rows" in done.stdout
    run = tmp_path / "runs" / "rows"
    losses = [row["train_loss"] for row in metrics(run)]
    assert losses[-1] < losses[0]
    checkpoint = library.open_checkpoint(run)
    assert "<|im_start|>" in json.loads(checkpoint.text("tokenizer_config.json") or "")["chat_template"]


def test_rows_that_are_too_long_are_cut_or_skipped_and_counted(onym: Run, base: Path, tmp_path: Path) -> None:
    asked = [{"prompt": "short", "completion": "yes " * 30}, {"prompt": "long " * 60, "completion": "no"}] * 2
    asked += [{"prompt": "a", "completion": "b"}] * 4
    path = write_json(tmp_path / "asked.json", asked)
    command = ("train", "--from", base, "--sft", path, *LENGTH, "--steps", 1)
    cut = onym(*command, "--name", "cut").stdout
    assert "4 cut to the context; 2 rows without a token that counts within the context, left out" in cut
    assert "6 of prompt and completion" not in cut
    assert "8 of prompt and completion; to train on 5;" in cut
    skipped = onym(*command, "--too-long", "skip", "--name", "skip").stdout
    assert "to train on 3;" in skipped
    assert "4 longer than the context and skipped" in skipped
    short = onym(*command, "--context-length", 8, "--name", "short")
    assert short.returncode == 2
    assert "in 8 nothing that counts is within the context of 8 tokens" in short.stderr


def test_a_base_without_tokens_for_turns_gets_rows_for_them(onym: Run, book: Path, rows: Path, tmp_path: Path) -> None:
    small = ("--vocab-size", 270, "--context-length", 96, "--name", "small")  # too few to reserve any
    assert onym("train", "--data", book, *EAGER, *small, "--steps", 1).returncode == 0
    done = onym("train", "--from", "runs/small", "--sft", rows, *LENGTH)
    assert done.returncode == 0, done.stderr
    assert "2 new rows in its vocabulary, for <|im_start|> and <|im_end|>" in done.stdout
    before, after = (library.load_model(tmp_path / "runs" / name) for name in ("small", "rows"))
    assert (before.config.vocab_size, after.config.vocab_size) == (270, 272)
    refused = onym("train", "--from", "runs/small", "--sft", rows, *LENGTH, "--lora", 2, "--name", "lo")
    assert refused.returncode == 2
    assert "--chat-template alpaca" in refused.stderr


def test_a_run_is_the_same_in_two_processes(onym_process: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    command = ("train", "--from", base, "--sft", rows, *LENGTH, "--steps", 3, "--lora", 2)
    for name, processes in (("one", 1), ("two", 2)):
        done = onym_process(*command, "--name", name, "--processes", processes, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    # The first row is of the first micro-batch before any step, which is another one in two processes.
    assert [row["train_loss"] for row in two[1:]] == pytest.approx([row["train_loss"] for row in one[1:]], abs=1e-4)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=1e-4)


# -- adapters


def test_an_adapter_is_kept_alone_and_opens_as_the_merged_model(onym: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    command = ("train", "--from", base, "--sft", rows, *LENGTH, "--lora", 4, "--lora-targets", "att", "--name", "lo")
    done = onym(*command)
    assert done.returncode == 0, done.stderr
    assert "of them trained" in done.stdout
    run = tmp_path / "runs" / "lo"
    stored = run / "checkpoints" / "step-000000010"
    names = _tensor_names(stored / "model.safetensors")
    assert names
    assert all(".att." in name and "lora_" in name for name in names)
    optimizer, _ = library.stored_optimizer_state(run)
    assert {name.split(".", 2)[2] for name in optimizer if name.startswith("state.exp_avg.")} == set(names)
    merged, before = library.load_model(run), library.load_model(base)
    assert not torch.equal(
        merged.state_dict()["trf_blocks.0.att.qkv.weight"], before.state_dict()["trf_blocks.0.att.qkv.weight"]
    )
    assert torch.equal(merged.state_dict()["out_head.weight"], before.state_dict()["out_head.weight"])
    again = onym(*command)
    assert "finished already" in again.stdout
    for folder, how in (("merged", ()), ("beside", ("--unmerged",))):
        written = onym("convert", run, folder, "--to", "huggingface", *how)
        assert written.returncode == 0, written.stderr
        about = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert "<|im_start|>" in about["chat_template"], "it goes along, whatever the base has"


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_a_base_that_changed_or_went_is_named(onym: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    tokenizer = base / "tokenizer.json"
    library.save(library.load_model(base), own)
    command = ("train", "--from", own, "--tokenizer", tokenizer, "--sft", rows, *LENGTH, "--lora", 2, "--name", "lo")
    assert onym(*command, "--steps", 2).returncode == 0
    model = library.load_model(base)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    library.save(model, own)
    for then in (("train", "--name", "lo", "--steps", 4), ("generate", tmp_path / "runs" / "lo")):
        done = onym(*then)
        assert done.returncode == 2
        assert "own.safetensors" in done.stderr
        assert "other weights" in done.stderr
    own.unlink()
    done = onym("train", "--name", "lo", "--steps", 4)
    assert done.returncode == 2
    assert "nothing is there now" in done.stderr


# -- classifiers


def test_a_classifier_is_trained_on_labels_and_asked_for_them(onym: Run, base: Path, labelled: Path, tmp_path: Path) -> None:
    more = ("--steps", 40, "--learning-rate", 3e-3, "--class-weights", "balanced", "--eval-every", 40)
    done = onym("train", "--from", base, "--classify", labelled, *LENGTH, *more)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    run = tmp_path / "runs" / "spam"
    last = metrics(run)[-1]
    assert {"accuracy", "f1", "val_loss"} <= last.keys()
    model = library.load_model(run)
    assert isinstance(model, GPT)
    assert model.config.labels == ("ham", "spam")
    assert model.out_head.weight.shape == (2, model.config.emb_dim)
    said = onym("classify", run, "win a free prize now", "lunch with the family", "a").stdout.splitlines()
    alone = onym("classify", run, "a").stdout.splitlines()
    assert len(said) == 3
    assert said[-1] == alone[0], "what is beside a text, and padding, change nothing"
    refused = onym("generate", run)
    assert refused.returncode == 2
    assert "onym classify" in refused.stderr
    assert onym("classify", base, "a").returncode == 2


def test_only_the_weights_that_are_named_train(onym: Run, base: Path, labelled: Path, tmp_path: Path) -> None:
    wanted = "trf_blocks.1,final_norm,out_head"
    done = onym("train", "--from", base, "--classify", labelled, *LENGTH, "--train-only", wanted, "--name", "part")
    assert done.returncode == 0, done.stderr
    before, after = (library.load_model(each).state_dict() for each in (base, tmp_path / "runs" / "part"))
    changed = {name for name, tensor in after.items() if tensor.shape != before[name].shape or not tensor.equal(before[name])}
    assert changed == {name for name in after if name.startswith(tuple(wanted.split(",")))}
    optimizer, _ = library.stored_optimizer_state(tmp_path / "runs" / "part")
    assert {name.split(".", 2)[2] for name in optimizer if name.startswith("state.exp_avg.")} == changed


# -- resuming

TASKS: dict[str, tuple[object, ...]] = {
    "conversations": ("--sft", "rows.json", "--loss-on", "all"),
    "an adapter with dropout": ("--sft", "rows.json", "--lora", 3, "--lora-dropout", 0.2),
    "labels, some weights": ("--classify", "spam.csv", "--train-only", "trf_blocks.1,out_head", "--class-weights", "balanced"),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_run_that_stops_continues_with_the_same_bits(
    onym: Run, base: Path, rows: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: tuple[object, ...]
) -> None:
    command = ("train", "--from", base, *task, *LENGTH, "--precision", "bf16", "--micro-batch", 2)
    assert onym(*command, "--name", "straight").returncode == 0

    def crash(step: int) -> None:
        if step == 8:
            raise RuntimeError("as a machine that fails")

    with monkeypatch.context() as patch:
        patch.setattr(planned_kill, "before", crash)
        with pytest.raises(RuntimeError, match="a machine that fails"):
            onym(*command, "--name", "stopped")
    done = onym(*command, "--name", "stopped")
    assert "Continuing after step 5 of 10." in done.stdout, done.stderr
    straight, stopped = (tmp_path / "runs" / name / "checkpoints" / "step-000000010" for name in ("straight", "stopped"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert _values(straight / file) == _values(stopped / file), file
    assert metrics(straight.parents[1])[-1]["val_loss"] == metrics(stopped.parents[1])[-1]["val_loss"]


def _values(path: Path) -> dict[str, bytes]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_rows_may_move_and_labels_may_not_change(onym: Run, base: Path, labelled: Path, tmp_path: Path) -> None:
    command = ("train", "--from", base, "--classify", labelled, *LENGTH, "--name", "x")
    assert onym(*command, "--steps", 2).returncode == 0
    moved = labelled.rename(tmp_path / "moved.csv")
    assert onym("train", "--name", "x", "--steps", 3, "--classify", moved).returncode == 0
    moved.write_text(moved.read_text().replace("ham,", "zzz,"))
    done = onym("train", "--name", "x", "--steps", 4, "--data-changed", "accept")
    assert done.returncode == 2, "its head has learned other labels"
    assert "started with the labels ham, spam, and the rows have spam, zzz now" in done.stderr


# -- bad input

BAD: dict[str, tuple[str, Any, tuple[object, ...], str]] = {
    "no assistant": ("a.jsonl", {"messages": [{"role": "user", "content": "x"}]}, ("--sft",), "no turn by the assistant"),
    "unknown role": ("a.jsonl", {"messages": [{"role": "robot", "content": "x"}]}, ("--sft",), "'robot'"),
    "empty content": ("a.jsonl", {"prompt": "x", "completion": " "}, ("--sft",), "nothing in its field 'completion'"),
    "one row": ("a.jsonl", {"prompt": "x", "completion": "y"}, ("--sft",), "at least two are needed"),
    "no such kind": ("a.jsonl", {"question": "x"}, ("--sft",), "messages, or prompt and completion"),
    "one label": ("a.jsonl", {"text": "x", "label": "y"}, ("--classify",), "the label 'y' alone"),
    "a label once": ("a.csv", "text,label\nx,1\ny,2\nz,2\n", ("--classify",), "occurs once"),
    "no such column": ("a.csv", "txt,label\nx,1\ny,2\n", ("--classify",), "did you mean 'txt'"),
    "an empty text": ("a.csv", "text,label\nx,1\n ,2\n", ("--classify",), "nothing in its field 'text'"),
    "a short line": ("a.csv", "text,label\nx,1\ny\n", ("--classify",), "1 values for 2 columns"),
    "an open quotation": ("a.csv", 'text,label\n"x,1\ny,2\n', ("--classify",), "quotation mark"),
    "no JSON": ("a.jsonl", "{", ("--sft",), "is not JSON"),
    "rank 0": ("a.jsonl", {"prompt": "x", "completion": "y"}, ("--lora", 0, "--sft"), "--lora must be a rank"),
    "a target of nothing": ("rows", None, ("--lora", 2, "--lora-targets", "attn", "--sft"), "matches no linear layer"),
    "a weight of nothing": ("rows", None, ("--train-only", "trf_block", "--sft"), "did you mean 'trf_blocks'"),
    "no template": ("rows", None, ("--chat-template", "nosuch", "--sft"), "nosuch"),
    "text too": ("rows", None, ("--data", "x", "--sft"), "leave it out"),
    "both": ("rows", None, ("--classify", "x", "--sft"), "give one of them"),
    "weights of labels": ("rows", None, ("--class-weights", "balanced", "--sft"), "add --classify"),
    "alpha alone": ("rows", None, ("--lora-alpha", 2, "--sft"), "add --lora RANK"),
}


@pytest.mark.parametrize(("name", "content", "options", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_trained_on_is_one_sentence(
    onym: Run, base: Path, rows: Path, tmp_path: Path, name: str, content: Any, options: tuple[object, ...], words: str
) -> None:
    path = rows
    if name != "rows":
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    done = onym("train", "--from", base, *options, path, *LENGTH)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("onym: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir()), "nothing is left of it"


@pytest.mark.parametrize("option", [("--sft", "x"), ("--classify", "x"), ("--lora", 2), ("--train-only", "out_head")])
def test_what_needs_a_trained_model_says_so(onym: Run, option: tuple[object, ...]) -> None:
    done = onym("train", *option)
    assert done.returncode == 2
    assert "name it with --from" in done.stderr
