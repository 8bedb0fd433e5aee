"""A chat model of ours, exported: transformers and llama.cpp render its template, stop where it stops, and reply the same."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import onym
from onym.convert.opening import open_any
from onym.convert.write import convert
from onym.data.chat_template import ALPACA, CHATML, ChatTemplate
from onym.data.conversations import Message
from onym.data.tokenizer import Tokenizer
from onym.generation.engine import Engine, Request
from onym.generation.sampling import Sampling
from tests.chat_model import TOKENIZER, save, scattered
from tests.convert.llama_cpp import LlamaCpp

ASKED = (Message("system", "Be brief."), Message("user", "the lamp <|im_end|>\n"))
AS_DICTS = [{"role": each.role, "content": each.content} for each in ASKED]
TURN_ENDS = TOKENIZER.special_tokens["<|im_end|>"]


def reply(model: onym.GPT, template: ChatTemplate) -> list[int]:
    request = Request(template.prompt(ASKED), 40, Sampling(temperature=0), stop_ids=template.stop_ids)
    engine = Engine(model, dtype="fp32", compile="off")
    return [event.token for event in engine.run([request]) if event.token is not None]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> tuple[onym.GPT, ChatTemplate, Path]:
    """A model that replies with several tokens and then ends its turn, in a run."""
    folder = tmp_path_factory.mktemp("chatml")
    torch.manual_seed(1)
    model = scattered()
    template = ChatTemplate(CHATML, TOKENIZER)
    written = reply(model, template)
    place = next(place for place in range(5, len(written)) if written[place] not in written[:place])
    with torch.no_grad():  # what it would have written there becomes the end of its turn
        rows = model.out_head.weight
        rows[[written[place], TURN_ENDS]] = rows[[TURN_ENDS, written[place]]]
    save(folder / "run", CHATML, model)
    assert reply(model, template) == written[:place]
    return model, template, folder / "run"


def test_transformers_renders_and_stops_as_we_do(chatml: tuple[onym.GPT, ChatTemplate, Path], tmp_path: Path) -> None:
    model, template, run = chatml
    report = convert(run, tmp_path / "hf", to="huggingface")
    assert "tokenizer_config.json" not in report.unused
    known = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = known.apply_chat_template(AS_DICTS, tokenize=False, add_generation_prompt=True)
    assert text == template.render(ASKED, add_generation_prompt=True)
    assert (known.eos_token, known.eos_token_id) == ("<|im_end|>", TURN_ENDS)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == TURN_ENDS
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([template.prompt(ASKED)])
    written = theirs.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    assert written == [*reply(model, template), TURN_ENDS]


def test_llama_cpp_gives_the_same_reply(chatml: tuple[onym.GPT, ChatTemplate, Path], tmp_path: Path) -> None:
    model, template, run = chatml
    convert(run, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key in ("eos", "eot"):
        assert reader.get_field(f"tokenizer.ggml.{key}_token_id").contents() == TURN_ENDS
    assert reader.get_field("tokenizer.chat_template").contents() == CHATML
    assert (tmp_path / "m.Modelfile").read_text() == (
        'FROM ./m.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        '{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 128\n'
    )
    engine = LlamaCpp(tmp_path / "m.gguf")
    assert engine.ask("/apply-template", messages=AS_DICTS)["prompt"] == template.render(ASKED, add_generation_prompt=True)
    answer = engine.ask("/completion", prompt=template.prompt(ASKED), n_predict=40, temperature=0, return_tokens=True)
    expected = reply(model, template)
    assert len(expected) >= 5
    assert [token for token in answer["tokens"] if token != TURN_ENDS] == expected
    assert answer["stop_type"] == "eos"
    asked = [{"role": "user", "content": "the lamp and the river"}]
    request = template.prompt([Message("user", "the lamp and the river")])
    ours = Engine(model, dtype="fp32", compile="off").run(
        [Request(request, 20, Sampling(temperature=0), stop_ids=template.stop_ids)]
    )
    said = engine.ask("/v1/chat/completions", messages=asked, temperature=0, max_tokens=20)["choices"][0]
    text = TOKENIZER.decode([event.token for event in ours if event.token is not None])
    assert said["message"]["content"].rstrip("\ufffd") == text.rstrip("\ufffd")


def test_an_exported_folder_keeps_its_template(chatml: tuple[onym.GPT, ChatTemplate, Path], tmp_path: Path) -> None:
    _, template, run = chatml
    for number, (source, to) in enumerate(((run, "huggingface"), ("0", "onym"), ("1", "huggingface"), ("2", "onym"))):
        convert(source if source is run else tmp_path / source, tmp_path / str(number), to=to)
        checkpoint = open_any(tmp_path / str(number)).checkpoint
        again = ChatTemplate.of_texts({"tokenizer_config.json": checkpoint.text("tokenizer_config.json") or "{}"}, TOKENIZER)
        assert again is not None
        assert (again.source, again.stop_ids) == (CHATML, template.stop_ids)
    other = Tokenizer.train(["something else, " * 20], 270)
    convert(run, tmp_path / "other", to="huggingface", tokenizer=other.to_json())
    about = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    assert "chat_template" not in about, "another tokenizer may not have its tokens"
    assert about["eos_token"] == "<|endoftext|>"


def test_alpaca_is_written_for_ollama(tmp_path: Path) -> None:
    save(tmp_path / "run", ALPACA, scattered())
    convert(tmp_path / "run", tmp_path / "m.gguf")
    text = (tmp_path / "m.Modelfile").read_text()
    assert text.count('"""') == 2
    assert (
        "{{ if eq $i 0 }}Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n{{ end }}### Instruction:\n{{ $m.Content }}{{ else }}\n\n### Response:\n{{ $m.Content }}<|endoftext|>"
        "\n\n{{ end }}"
    ) in text
    assert text.endswith('{{- end }}\n\n### Response:\n"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 128\n')
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == TOKENIZER.end_of_text
    engine = LlamaCpp(tmp_path / "m.gguf")
    template = ChatTemplate(ALPACA, TOKENIZER)
    asked = [{"role": "user", "content": "Name it."}]
    expected = template.render([Message("user", "Name it.")], add_generation_prompt=True)
    assert engine.ask("/apply-template", messages=asked)["prompt"] == expected
