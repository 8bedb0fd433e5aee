"""lm-evaluation-harness: the figures of its own ``hf`` class on the exported folder, on tasks made of local files."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its libraries are imported

import lm_eval
import lm_eval.tasks
import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import onym
from onym import GPT, Decoder, DecoderConfig
from onym.convert.write import convert
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.generation.sampling import Sampling
from onym.tools.lm_eval import OnymLM, _how, main
from tests.conftest import TINY, WORDS

LINES = [f"The {a} was the {n}th thing, and the {b} knew it well." for n, (a, b) in enumerate(itertools.pairwise(WORDS))]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/choice.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/rolling.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
GENERATING = """
task: local_generating
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/generating.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = {"local_choice": CHOICE, "local_rolling": ROLLING, "local_generating": GENERATING}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, trained for a moment, as we save them and as transformers reads them, and the tasks' files."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = Tokenizer.train(LINES * 9, 320)
    (folder / "t.json").write_text(tokenizer.to_json())
    questions = [
        {
            "question": line.rpartition(" the ")[0],
            "choices": [f" the {word} knew" for word in WORDS[n : n + 3]],
            "answer": n % 3,
        }
        for n, line in enumerate(LINES[:9])
    ]
    asked = [questions[0], *questions[4:], {"question": " ".join(LINES), "choices": ["x"], "answer": 0}]
    (folder / "generating.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    questions.append({"question": "", "choices": ["The lamp", "window"], "answer": 0})  # an empty context
    questions.append({"question": " ".join(LINES), "choices": [" The lamp", " window"], "answer": 0})  # more than fits
    (folder / "choice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    texts = [" ".join(LINES), LINES[0], "x", f"{LINES[1]}\n\n{LINES[2]} "]
    (folder / "rolling.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", folder.as_posix()))
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.vocab_size, "context_length": 48, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    for name, model in (("gpt2", GPT(dataclasses.replace(TINY, **shape))), ("decoder", Decoder(DecoderConfig(**shape)))):
        tokens = torch.tensor([tokenizer.encode(" ".join(LINES))])[:, :49]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
        onym.save(model, folder / f"{name}.safetensors")
        convert(folder / f"{name}.safetensors", folder / f"{name}-hf", to="huggingface", tokenizer=tokenizer.to_json())
    return folder


def evaluated(model: str, arguments: dict[str, Any], folder: Path, batch_size: int) -> dict[str, Any]:
    """What lm-eval says of the tasks."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
        model, arguments, tasks=list(TASKS), batch_size=batch_size, task_manager=manager, bootstrap_iters=0, device="cpu"
    )


def responses(results: dict[str, Any], task: str) -> list[Any]:
    return [each["resps"] for each in sorted(results["samples"][task], key=lambda each: each["doc_id"])]


@pytest.mark.parametrize("kind", ["gpt2", "decoder"])
def test_figures_are_those_of_its_own_class_on_the_exported_folder(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = evaluated("onym", {"path": str(folder / f"{kind}.safetensors"), "tokenizer": str(folder / "t.json")}, folder, 3)
    theirs = evaluated("hf", {"pretrained": str(folder / f"{kind}-hf"), "dtype": "float32"}, folder, 2)
    for task in TASKS:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    one, other = (responses(results, "local_choice") for results in (ours, theirs))
    assert len(one) == 11
    for mine, its in zip(one, other, strict=True):
        for (value, greedy), (expected, is_greedy) in zip((each[0] for each in mine), (each[0] for each in its), strict=True):
            assert value == pytest.approx(expected, abs=1e-4)
            assert greedy == is_greedy
    flat = [[value for each in responses(results, "local_rolling") for value in each[0]] for results in (ours, theirs)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-4)
    assert len(flat[0]) == 4
    written = responses(ours, "local_generating")
    assert written == responses(theirs, "local_generating")
    assert any(each[0][0] for each in written)


def test_the_command_knows_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # It looks through 10,000 tasks of its own for those that are asked for, which takes ten seconds.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    given = ["--model", "onym", "--include_path", str(folder), "--tasks", "local_choice"]
    arguments = f"path={folder / 'gpt2.safetensors'},tokenizer={folder / 't.json'}"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *given, "--model_args", arguments])
    assert main() == 0
    assert "local_choice" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lm-eval", *given, "--model_args", f"path={folder / 'gone'}"])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("onym: There is nothing at ")


def test_it_is_the_registered_model_and_reads_what_tasks_ask_for() -> None:
    assert get_model("onym") is OnymLM
    assert _how({"until": "\n", "do_sample": False, "temperature": 0.7}, 256) == (Sampling(0.0), ["\n"], 256)
    asked = {"until": ["a", ""], "max_gen_toks": 5, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    assert _how(asked, 256) == (Sampling(0.5, 3, 0.9), ["a"], 5)
    assert _how({"max_new_tokens": 7, "temperature": 0.3}, 256) == (Sampling(0.3), [], 7)
    with pytest.raises(ConfigError, match="generate with num_beams, which onym's model does not know"):
        _how({"num_beams": 4}, 256)


def test_generation_stops_at_the_first_of_several_sequences(folder: Path) -> None:
    model = OnymLM(str(folder / "gpt2.safetensors"), tokenizer=str(folder / "t.json"))

    def written(**how: Any) -> str:
        (text,) = model.generate_until([SimpleNamespace(args=("The lamp", {"max_gen_toks": 30, **how}))], disable_tqdm=True)
        return text

    whole = written()
    middle, end = whole[len(whole) // 2 :][:3], whole[-3:]
    assert written(until=[end, middle]) == whole.split(middle)[0].split(end)[0]
    assert written(max_gen_toks=100).startswith(whole), "past the context it goes on"
    torch.manual_seed(3)
    sampled = written(do_sample=True, temperature=2.0)
    torch.manual_seed(3)
    assert written(do_sample=True, temperature=2.0) == sampled != whole
