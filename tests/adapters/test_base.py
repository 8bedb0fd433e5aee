"""A checkpoint of adapters records its base, and opens as the merged model everywhere; another base is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import onym
from onym import GPT, Checkpointer, LoRA
from onym.adapters.merging import MergedCheckpoint, adapter_config, base_of, identity, merged_checkpoint
from onym.convert.opening import open_any
from onym.convert.write import convert
from onym.errors import CheckpointError
from tests.adapters.test_lora import drawn
from tests.conftest import TINY, Run

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["run", "lora.safetensors", "peft"]


@pytest.fixture
def logits(tmp_path: Path, tiny: GPT, tokens: Tensor) -> Tensor:
    """A base, and adapters on it in every kind of file."""
    onym.save(tiny, tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    lora = drawn(LoRA.apply(tiny, rank=4))
    adapter_config(lora, onym.open_checkpoint(tmp_path / "base"), tmp_path / "base")
    for name in KINDS[1:]:
        onym.save(lora, tmp_path / name)
    with Checkpointer(tmp_path / "run") as checkpointer:
        optimizer = torch.optim.AdamW(lora.parameters())
        checkpointer.save(5, {"model": lora, "optimizer": optimizer}, {"val_loss": 2.0}, files={"chat_template.jinja": "{}"})
    return tiny(tokens).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_open_as_the_merged_model(tmp_path: Path, logits: Tensor, tokens: Tensor, kind: str) -> None:
    path = tmp_path / kind
    model: Any = onym.load_model(path)
    assert torch.allclose(model(tokens), logits, atol=1e-5)
    opened = onym.open_checkpoint(path)
    assert isinstance(opened, MergedCheckpoint)
    assert (opened.architecture, opened.config) == ("gpt", TINY.to_dict())
    opened.verify()
    plain: Any = GPT(TINY).eval()
    onym.load(path, into=plain)
    assert torch.allclose(plain(tokens), logits, atol=1e-5)
    raw = open_any(path, complete=False).checkpoint
    assert len(raw.names) == 16
    assert torch.allclose(onym.api.load_checkpoint(merged_checkpoint(raw))(tokens), logits, atol=1e-5)
    convert(path, tmp_path / "hf", to="huggingface")
    assert torch.allclose(onym.load_model(tmp_path / "hf")(tokens), logits, atol=1e-5)


def test_a_run_s_step_and_texts_are_the_adapters_own(tmp_path: Path, logits: Tensor) -> None:
    opened = onym.open_checkpoint(tmp_path / "run")
    assert opened.manifest is not None
    assert (opened.manifest.step, opened.text("chat_template.jinja")) == (5, "{}")
    assert opened.identity is None, "that of the adapters is not the model's"
    stored = json.loads((tmp_path / "run" / "step-000000005" / "config.json").read_text())
    assert (stored["rank"], stored["alpha"], stored["targets"]) == (4, 8, ["all"])
    assert stored["base"]["architecture"] == "gpt"
    assert stored["base"]["identity"] == onym.open_checkpoint(tmp_path / "base").identity


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_gone_or_changed_is_named(tmp_path: Path, logits: Tensor, kind: str) -> None:
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"The base of '.*' was at '.*base', and nothing is there now: move it back, or"):
        onym.load_model(tmp_path / kind)
    raw = open_any(tmp_path / kind, complete=False).checkpoint
    assert merged_checkpoint(raw, tmp_path / "moved").config == TINY.to_dict()
    other = GPT(TINY)
    onym.save(other, tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"belongs to the model that was at '.*base' \(identity .*\), and '.*' holds"):
        onym.load_model(tmp_path / kind)
    lora = LoRA.apply(GPT(TINY), rank=4)
    assert len(onym.load(tmp_path / kind, into=lora).loaded) == 16, "the adapters alone need no base"
    adapter_config(lora, onym.open_checkpoint(tmp_path / "base"), tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"belongs to the model '.*', and these adapters to"):
        onym.load(tmp_path / kind, into=lora)


def test_an_adapter_that_names_no_base_says_what_to_do(tmp_path: Path, tiny: GPT) -> None:
    onym.save(LoRA.apply(tiny), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"LoRA adapters of rank 8 \(alpha 16\) for 8 layers alone, and does not say"):
        onym.load_model(tmp_path / "x.safetensors")


def test_damage_in_either_is_found(tmp_path: Path, logits: Tensor) -> None:
    for file in (tmp_path / "base" / "model.safetensors", tmp_path / "peft" / "adapter_model.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="damaged"):
            onym.load_model(tmp_path / "peft")
        file.write_bytes(whole)
    onym.load_model(tmp_path / "peft")


def test_the_identity_of_any_base(tmp_path: Path, logits: Tensor, tiny: GPT) -> None:
    """The stored one, or computed by the same rule: a file without hashes has that of the one with."""
    ours = onym.open_checkpoint(tmp_path / "base")
    onym.save(onym.load_model(tmp_path / "base"), tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth")
    torch.save(state, tmp_path / "y.pth")
    plain = open_any(tmp_path / "y.pth").checkpoint
    assert plain.identity is None
    assert identity(ours) == ours.identity == identity(plain)
    assert identity(onym.open_checkpoint(tmp_path / "peft")) not in (ours.identity, identity(plain))
    recorded = base_of(onym.open_checkpoint(tmp_path / "run"), tmp_path / "run")
    assert recorded["path"].endswith("step-000000005"), "a run's newest step changes"


def test_a_stranger_s_model_and_file(tmp_path: Path) -> None:
    """No architecture that is known: the merged tensors can be loaded, by name."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    onym.save(model, tmp_path / "base.safetensors")
    lora = drawn(LoRA.apply(model, rank=2))
    adapter_config(lora, onym.open_checkpoint(tmp_path / "base.safetensors"), tmp_path / "base.safetensors")
    onym.save(lora, tmp_path / "lora.safetensors")
    other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    onym.load(tmp_path / "lora.safetensors", into=other)
    x = torch.randn(3, 4)
    assert torch.allclose(other(x), model(x), atol=1e-6)


def test_convert_inspect_and_verify_know_adapters(tmp_path: Path, logits: Tensor, tokens: Tensor, onym_: Run) -> None:
    found = json.loads(onym_("inspect", "peft", "--json").stdout)["adapter"]
    assert (found["rank"], found["alpha"]) == (4, 8)
    assert found["base"] == str(tmp_path / "base")
    text = onym_("inspect", "run", "--step", "5").stdout
    assert "LoRA adapters of rank 4 (alpha 8) for 8 layers" in text
    assert onym_("verify", "peft").returncode == onym_("verify", "run").returncode == 0

    assert onym_("convert", "run", "merged", "--merge", "base").returncode == 0
    assert torch.allclose(onym.load_model(tmp_path / "merged")(tokens), logits, atol=1e-5)
    done = onym_("convert", "run", "both", "--unmerged")
    assert "PeftModel.from_pretrained" in done.stdout
    model: Any = onym.load_model(tmp_path / "both")
    LoRA.open(tmp_path / "both" / "adapter", model)
    assert torch.allclose(model(tokens), logits, atol=1e-5)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    for number, source in enumerate(KINDS):
        assert onym_("convert", source, f"peft-of-{number}", "--to", "peft").returncode == 0, "what is recorded suffices"
        assert onym_("verify", source).returncode == 0
    one, *others = (load_file(tmp_path / f"peft-of-{number}" / "adapter_model.safetensors") for number in range(3))
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def onym_(onym: Run) -> Run:
    return onym


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("convert", "base", "x", "--merge", "base"), "'base' holds no adapters alone"),
        (("convert", "base", "x", "--unmerged"), "'base' holds no adapters alone"),
        (("convert", "peft", "x", "--merge", "nothing"), "There is nothing at 'nothing'"),
        (("convert", "peft", "x", "--unmerged", "--to", "nanogpt"), "leave --to nanogpt out"),
        (("convert", "peft", "x", "--to", "peft", "--drop", "gelu"), "--drop has no effect with --to peft"),
        (("convert", "peft", "x.pth", "--to", "peft"), "cannot be written as peft, which is a folder"),
        (("convert", "peft", "x", "--to", "book-lora"), "which is a file of torch.save"),
        (("convert", "peft", "base", "--to", "peft"), "There is something at 'base' already"),
        (("convert", "peft", "x", "--alpha", "3"), "states its alpha itself"),
        (("convert", "peft", "--in-place", "--merge", "base"), "it takes no --merge"),
    ],
)
def test_bad_use_is_one_sentence(tmp_path: Path, logits: Tensor, onym_: Run, arguments: tuple[str, ...], sentence: str) -> None:
    before = sorted(tmp_path.iterdir())
    done = onym_(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_guide_prints_what_its_comments_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its programs are one, and each print is followed by a comment with its output."""
    text = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    claimed = re.findall(r"^print\(.*\)\n# (.*)$", program, re.MULTILINE)
    assert len(claimed) == program.count("print(") >= 4
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    assert printed.getvalue().splitlines() == claimed


def test_an_adapter_of_a_head_that_is_the_embedding_cannot_be_merged(tmp_path: Path) -> None:
    onym.save(GPT(replace(TINY, tie_embeddings=True)), tmp_path / "tied")
    onym.save(LoRA.apply(GPT(TINY), targets="out_head"), tmp_path / "x.safetensors")
    raw = open_any(tmp_path / "x.safetensors", complete=False).checkpoint
    with pytest.raises(CheckpointError, match=r"The weight of out_head is tok_emb.weight too in '.*tied', and the adapter in"):
        merged_checkpoint(raw, tmp_path / "tied")
