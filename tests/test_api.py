"""The user's story: compile, train, save, load anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import onym
from onym import GPT, GPTConfig, MismatchError
from onym.errors import CheckpointError, ConfigError
from tests.conftest import TINY

ENDINGS = [".safetensors", ".pth", ""]


def train(model: nn.Module, tokens: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(tokens)  # type: ignore[no-any-return]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("how", ["plain", "wrapped", "in place"])
def test_train_compiled_save_and_load_into_a_plain_instance(tmp_path: Path, tokens: Tensor, how: str, ending: str) -> None:
    model: nn.Module = GPT(TINY)
    trained = torch.compile(model) if how == "wrapped" else model
    if how == "in place":
        model.compile()
    train(trained, tokens)  # type: ignore[arg-type]
    path = tmp_path / f"model{ending}"
    onym.save(trained, path)  # type: ignore[arg-type]

    plain = GPT(TINY)
    report = onym.load(path, into=plain)
    assert torch.equal(outputs(plain, tokens), outputs(model, tokens))
    assert report.renamed == {}
    compiled = torch.compile(GPT(TINY))
    onym.load(path, into=compiled)  # type: ignore[arg-type]
    assert torch.equal(outputs(compiled, tokens), outputs(model, tokens))  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_stock_readers_need_nothing_of_ours_but_the_model_class(
    tmp_path: Path, tokens: Tensor, tied: bool, in_fresh_process: Callable[[str], str]
) -> None:
    model = GPT(GPTConfig(**{**TINY.to_dict(), "tie_embeddings": tied}))
    compiled = torch.compile(model)
    train(compiled, tokens)  # type: ignore[arg-type]
    onym.save(compiled, tmp_path / "model")  # type: ignore[arg-type]
    onym.save(compiled, tmp_path / "model.pth")  # type: ignore[arg-type]
    torch.save((tokens, outputs(model, tokens)), tmp_path / "expected.pt")
    printed = in_fresh_process(
        f"""
import json, sys, torch
from safetensors.torch import load_file
from onym.gpt.gpt2 import GPT, GPTConfig
tokens, expected = torch.load("expected.pt")
config = json.load(open("model/config.json"))
for state in (load_file("model/model.safetensors"), torch.load("model.pth", weights_only=True)):
    model = GPT(GPTConfig(**config)).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
    assert (model.out_head.weight is model.tok_emb.weight) == {tied}
assert "torch._dynamo" not in sys.modules
print("equal")
"""
    )
    assert printed.strip() == "equal"


@pytest.mark.parametrize("ending", [".safetensors", ""])
@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_model_comes_back_without_its_code_path(tmp_path: Path, tokens: Tensor, ending: str, tied: bool) -> None:
    model = GPT(GPTConfig(**{**TINY.to_dict(), "tie_embeddings": tied}))
    train(model, tokens)
    path = tmp_path / f"model{ending}"
    onym.save(torch.compile(model), path)  # type: ignore[arg-type]
    for compile in (False, True):
        back = onym.load_model(path, compile=compile)
        assert isinstance(back, GPT)
        assert back.config == model.config
        assert not back.training
        assert list(back.state_dict()) == list(model.state_dict())
        assert torch.equal(outputs(back, tokens), outputs(model, tokens))


def test_a_compiled_and_a_plain_model_write_the_same_bytes(tmp_path: Path) -> None:
    model = GPT(TINY)
    onym.save(model, tmp_path / "plain.safetensors")
    onym.save(torch.compile(model), tmp_path / "compiled.safetensors")  # type: ignore[arg-type]
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "compiled.safetensors").read_bytes()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_with_polluted_names_loads_and_says_what_was_renamed(tmp_path: Path, prefix: str, ending: str) -> None:
    import safetensors.torch

    model, path = GPT(TINY), tmp_path / f"broken{ending}"
    polluted = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(polluted, path) if ending == ".pth" else safetensors.torch.save_file(polluted, path)
    twin = GPT(TINY)
    report = onym.load(path, into=twin)
    assert report.renamed[f"{prefix}tok_emb.weight"] == "tok_emb.weight"
    assert len(report.renamed) == len(polluted)
    assert f"{len(polluted)} renamed" in str(report)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items())


def test_the_readable_file_of_the_wrong_structure_is_explained(tmp_path: Path) -> None:
    onym.save(GPT(TINY), tmp_path / "m.safetensors")
    deeper = GPT(GPTConfig(**{**TINY.to_dict(), "n_layers": 3}))
    with pytest.raises(MismatchError, match="Saved with n_layers=2; this model has n_layers=3"):
        onym.load(tmp_path / "m.safetensors", into=deeper)


def test_saving_over_the_file_that_the_model_was_loaded_from(tmp_path: Path, tokens: Tensor) -> None:
    path = tmp_path / "m.safetensors"
    onym.save(GPT(TINY), path)
    model = GPT(TINY)
    mapped = onym.open_checkpoint(path).model.state()
    model.load_state_dict(mapped, assign=True)
    before = outputs(model, tokens)
    onym.save(model, path)
    assert torch.equal(outputs(model, tokens), before)
    back = GPT(TINY)
    onym.load(path, into=back)
    assert torch.equal(outputs(back, tokens), before)


def test_a_model_of_ones_own_is_kept_whole(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class PairConfig:
        width: int = 3

    class Pair(nn.Module):
        def __init__(self, config: PairConfig) -> None:
            super().__init__()
            self.config = config
            self.layer = nn.Linear(config.width, config.width)

    model = Pair(PairConfig(5))
    onym.save(model, tmp_path / "before")
    with pytest.raises(CheckpointError, match=r"weights without the structure.*register_architecture"):
        onym.load_model(tmp_path / "before")
    onym.register_architecture("test-pair", Pair, PairConfig)
    onym.save(torch.compile(model), tmp_path / "after")  # type: ignore[arg-type]
    back = onym.load_model(tmp_path / "after")
    assert isinstance(back, Pair)
    assert torch.equal(back.layer.weight, model.layer.weight)
    config = tmp_path / "after" / "config.json"
    assert json.loads(config.read_text()) == {"width": 5}
    with pytest.raises(ConfigError, match="is Pair already"):
        onym.register_architecture("test-pair", GPT, GPTConfig)


def test_endings_that_mean_another_format_are_refused(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.h5", "model.tar", "my.model.tar", "model.tar.gz", "model.zip", "model.pt2"):
        with pytest.raises(ConfigError, match="cannot be saved as '"):
            onym.save(GPT(TINY), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_weight_is_never_loaded_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    onym.save(GPT(TINY), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    model = GPT(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"m\.safetensors' is damaged: the bytes of '.*'"):
        onym.load(path, into=model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    onym.load(path, into=model, verify=False)


def test_an_open_checkpoint_reads_one_tensor(tmp_path: Path) -> None:
    model = GPT(TINY)
    onym.save(model, tmp_path / "m")
    opened = onym.open_checkpoint(tmp_path / "m")
    assert sorted(opened.names) == sorted(model.state_dict())
    assert opened.config == TINY.to_dict()
    assert torch.equal(opened.tensor("pos_emb.weight"), model.pos_emb.weight)
    opened.verify()


def test_a_model_on_the_meta_device_is_given_memory_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, persistent: bool = True) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight
            self.register_buffer("scale", torch.ones(2), persistent=persistent)

    model = Tied()
    with torch.no_grad():
        model.one.weight.fill_(3)
    onym.save(model, tmp_path / "x.safetensors")
    with torch.device("meta"):
        empty, other = Tied(), Tied(persistent=False)
    report = onym.load(tmp_path / "x.safetensors", into=torch.compile(empty))  # type: ignore[arg-type]
    assert len(report.loaded) == 5
    assert empty.one.weight is empty.other.weight
    assert torch.equal(empty.one.weight, model.one.weight)
    assert torch.equal(empty.scale, model.scale)
    with pytest.raises(ConfigError, match="scale is on the meta device and is a buffer that is not stored"):
        onym.load(tmp_path / "x.safetensors", into=other, strict=False)
    more = nn.ModuleDict({"one": Tied().one, "new": nn.Linear(2, 2, device="meta")})
    with pytest.raises(ConfigError, match=r"new\.weight is on the meta device and .* does not have it"):
        onym.load(tmp_path / "x.safetensors", into=more, strict=False)
    with torch.device("meta"):
        wrong = nn.Linear(3, 4)
    with pytest.raises(onym.MismatchError):
        onym.load(tmp_path / "x.safetensors", into=wrong)
    assert wrong.weight.is_meta, "a load that fails has changed nothing"


def test_building_a_gpt_draws_no_values(tmp_path: Path) -> None:
    onym.save(onym.GPT(onym.GPTConfig.preset("nano", vocab_size=100)), tmp_path / "x.safetensors")
    before = torch.get_rng_state()
    model = onym.load_model(tmp_path / "x.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_damaged_step_is_passed_over_and_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with onym.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"model": model})
    file = tmp_path / "step-000000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.warns(UserWarning, match=r"Passed over '.*step-000000002': .* is damaged: the bytes of '(weight|bias)'"):
        onym.load(tmp_path, into=model)
    with pytest.warns(UserWarning, match="Passed over"):
        assert onym.open_checkpoint(tmp_path).path.name == "step-000000001"


def test_loading_needs_no_compiler(tmp_path: Path, tiny: GPT, in_fresh_process: Callable[[str], str]) -> None:
    """What torch does with a model on the meta device imports its compiler and sympy: a second and a half for nothing."""
    onym.save(tiny, tmp_path / "model")
    program = "import sys, onym; onym.load_model('model'); print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    assert in_fresh_process(program).strip() == "[]"


@pytest.mark.parametrize(
    "name", ["m.pth", "m.PT", "m.th", "model_best.pth.tar", "pytorch_model.bin", "epoch.3.pth", "~/m.pth", "~/m"]
)
def test_a_file_of_any_usual_name_is_saved_and_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    model, fresh = nn.Linear(2, 1), nn.Linear(2, 1)
    onym.save(model, name)
    place = home / name[2:] if name.startswith("~") else tmp_path / name
    assert place.is_dir() == (name == "~/m")
    assert not (tmp_path / "~").exists()
    if place.is_file():
        assert list(torch.load(place, weights_only=True)) == ["weight", "bias"]
    onym.load(name, into=fresh)
    assert torch.equal(fresh.weight, model.weight)


def test_a_home_folder_that_nobody_has_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="home folder that is not known"):
        onym.save(nn.Linear(2, 1), "~nobody-of-this-name/m.pth")
