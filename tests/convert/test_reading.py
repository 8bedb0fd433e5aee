"""Real checkpoints of other programs, made with those programs: recognised, and the same logits from our GPT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import onym
from onym.convert.opening import open_any
from onym.convert.write import convert
from onym.errors import CheckpointError, ConfigError
from tests.convert import peers
from tests.convert.peers import logits, tokens

CLOSE = 1e-5


def close(path: Path, model: nn.Module, **how: object) -> onym.GPT:
    """See that load_model gives the logits of the model that was saved."""
    ours = onym.load_model(path, **how)  # type: ignore[arg-type]
    assert isinstance(ours, onym.GPT)
    ids = tokens()
    assert (logits(ours, ids) - logits(model, ids)).abs().max() < CLOSE
    return ours


def plain(path: Path, model: nn.Module) -> None:
    """See that convert writes its tensors as they are, under clean names, for every reader of .safetensors."""
    from safetensors.torch import load_file

    end = path.with_name("plain.safetensors")
    convert(path, end)
    written, state = load_file(end), model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in written.items())
    aliases = {name for name in state if name not in written}
    assert {state[name].data_ptr() for name in aliases} <= {state[name].data_ptr() for name in written}
    end.unlink()


@pytest.fixture(autouse=True)
def _heads_are_assumed() -> None:
    import warnings

    warnings.filterwarnings("ignore", message=".*attention heads were assumed")


@pytest.mark.parametrize("variant", [peers.book, peers.book_fast, peers.book_without_masks])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_books_models(tmp_path: Path, variant: object, qkv_bias: bool, ending: str) -> None:
    model = variant(qkv_bias=qkv_bias)  # type: ignore[operator]
    path = tmp_path / f"model.{ending}"
    if ending == "pth":
        torch.save(model.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    assert close(path, model).config.qkv_bias == qkv_bias


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model._forward_module."]
)
def test_the_books_model_polluted(tmp_path: Path, prefix: str) -> None:
    model = peers.book()
    torch.save({f"{prefix}{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.pth")
    close(tmp_path / "model.pth", model)
    origin = open_any(tmp_path / "model.pth").checkpoint.origin
    assert list(origin.wrappers)
    assert set(origin.wrappers) == set(prefix[:-1].split("."))


def test_wrappers_in_the_middle_of_names_and_in_some_of_them(tmp_path: Path) -> None:
    model = peers.book()
    kept = model.state_dict()
    for layer in (0, 2):
        model.trf_blocks[layer] = torch.compile(model.trf_blocks[layer])
    model.trf_blocks[1].ff = nn.DataParallel(model.trf_blocks[1].ff)
    torch.save(torch.compile(model).state_dict(), tmp_path / "model.pth")
    plain = peers.book()
    plain.load_state_dict(kept)
    close(tmp_path / "model.pth", plain)


def test_the_books_file_with_its_optimizer(tmp_path: Path) -> None:
    model = peers.book()
    optimizer = torch.optim.AdamW(model.parameters())
    logits_of = model(tokens())
    logits_of.sum().backward()
    optimizer.step()
    torch.save(
        {"model_state_dict": torch.compile(model).state_dict(), "optimizer_state_dict": optimizer.state_dict()},
        tmp_path / "model_and_optimizer.pth",
    )
    close(tmp_path / "model_and_optimizer.pth", model.eval())


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict", "module", "net", "ema"])
def test_a_state_dict_inside_of_something_else(tmp_path: Path, key: str) -> None:
    model = peers.book()
    torch.save({"epoch": 3, key: model.state_dict(), "args": {"lr": 0.1}}, tmp_path / "x.pt")
    close(tmp_path / "x.pt", model)
    torch.save({"state": {"inner": {key: model.state_dict()}}, "seed": torch.tensor(1)}, tmp_path / "deep.pt")
    close(tmp_path / "deep.pt", model)


def test_a_file_with_an_average_beside_the_model(tmp_path: Path) -> None:
    """As timm keeps them; and an AveragedModel, which has a counter."""
    model, average = peers.book(), AveragedModel(peers.book(qkv_bias=False))
    with torch.no_grad():
        average.module.tok_emb.weight.add_(1)
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "x.pth")
    close(tmp_path / "x.pth", model)
    close(tmp_path / "x.pth", average.module, part="state_dict_ema")
    with pytest.raises(CheckpointError, match=r"no part 'state_dict_em' \(did you mean 'state_dict_ema'\?\)"):
        onym.load_model(tmp_path / "x.pth", part="state_dict_em")


def test_how_many_heads_is_assumed_aloud_or_given(tmp_path: Path) -> None:
    model = peers.book(n_heads=4)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.warns(UserWarning, match="1 attention heads were assumed, of size 64"):
        onym.load_model(tmp_path / "model.pth")
    close(tmp_path / "model.pth", model, n_heads=4)
    narrow = peers.book(emb_dim=48, n_heads=4)
    torch.save(narrow.state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(CheckpointError, match="width of 48 is no multiple of 64: say it"):
        onym.load_model(tmp_path / "narrow.pth")
    close(tmp_path / "narrow.pth", narrow, n_heads=4)
    with pytest.raises(ConfigError, match="cannot be split over n_heads=7"):
        onym.load_model(tmp_path / "narrow.pth", n_heads=7)


@pytest.mark.parametrize("how", ["folder", "file", "sharded", "bin", "without a prefix", "polluted", "index file"])
def test_transformers_gpt2(tmp_path: Path, how: str) -> None:
    model = peers.huggingface()
    heads: dict[str, int] = {}
    path = tmp_path / "hf"
    if how == "bin":
        path.mkdir()
        model.config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    elif how == "without a prefix":
        path, heads = tmp_path / "gpt2.bin", {"n_heads": 4}
        torch.save(model.transformer.state_dict(), path)
    elif how == "polluted":
        path, heads = tmp_path / "gpt2.bin", {"n_heads": 4}
        torch.save(torch.compile(model).state_dict(), path)
    else:
        model.save_pretrained(path, max_shard_size="100KB" if how in ("sharded", "index file") else "5GB")
    if how == "file":
        path = path / "model.safetensors"
    if how == "index file":
        path = path / "model.safetensors.index.json"
    config = close(path, model, **heads).config
    assert (config.tie_embeddings, config.qkv_bias, config.gelu) == (True, True, "tanh")


def test_transformers_gpt2_with_a_head_of_its_own_and_exact_gelu(tmp_path: Path) -> None:
    model = peers.huggingface(tie_word_embeddings=False, activation_function="gelu")
    model.save_pretrained(tmp_path / "hf")
    config = close(tmp_path / "hf", model).config
    assert (config.tie_embeddings, config.gelu) == (False, "erf")


def test_old_masks_of_transformers_are_left_out(tmp_path: Path) -> None:
    model = peers.huggingface()
    masks = {f"transformer.h.{n}.attn.{name}": torch.ones(1, 1, 24, 24) for n in range(3) for name in ("bias", "masked_bias")}
    torch.save({**model.state_dict(), **masks}, tmp_path / "x.bin")
    close(tmp_path / "x.bin", model, n_heads=4)
    assert len(open_any(tmp_path / "x.bin").checkpoint.origin.dropped) == 6


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"activation_function": "relu"}, "its activation is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 100}, "100 wide"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
    ],
)
def test_what_a_gpt2_of_transformers_can_be_and_ours_is_not(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    peers.huggingface(**changes).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=why):
        onym.load_model(tmp_path / "hf")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_nanogpt(tmp_path: Path, bias: bool, compiled: bool) -> None:
    model = peers.nanogpt(tmp_path / "ckpt.pt", bias=bias, compiled=compiled)
    config = close(tmp_path / "ckpt.pt", model).config
    assert (config.bias, config.qkv_bias, config.gelu, config.tie_embeddings) == (bias, bias, "erf", True)
    assert config.n_heads == 4


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 1e-3})
            self.model = torch.compile(peers.book())

        def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens()), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    close(tmp_path / "last.ckpt", module.model._orig_mod.eval())
    plain(tmp_path / "last.ckpt", module.model._orig_mod)
    assert "a Lightning checkpoint" in open_any(tmp_path / "last.ckpt").checkpoint.origin.kind


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_accelerate(tmp_path: Path, safe: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, _optimizer = accelerator.prepare(torch.compile(peers.book()), torch.optim.AdamW(peers.book().parameters()))
    accelerator.save_state(tmp_path / "state", safe_serialization=safe)
    close(tmp_path / "state", accelerator.unwrap_model(model, keep_torch_compile=False).eval())
    plain(tmp_path / "state", accelerator.unwrap_model(model, keep_torch_compile=False))


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    """As torchtitan and PyTorch's own FSDP write them: .metadata and .distcp files."""
    import torch.distributed.checkpoint as dcp

    model = peers.book()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens()).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": {"state": {"exp_avg": torch.ones(3)}}, "step": 7}
    dcp.save(state, checkpoint_id=tmp_path / "step-7")
    close(tmp_path / "step-7", model.eval())
    plain(tmp_path / "step-7", model)
    dcp.save({**model.state_dict(), "train_state": {"step": 3}}, checkpoint_id=tmp_path / "flat")  # as torchtitan
    close(tmp_path / "flat", model)
    (tmp_path / "outer").mkdir()
    (tmp_path / "step-7").rename(tmp_path / "outer" / "model_and_optim")  # as OLMo-core
    close(tmp_path / "outer", model)


_SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.convert import peers
dist.init_process_group("gloo")
torch.manual_seed(1)
model = peers.book()
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
"""
_SAVED_BY = {
    "torch": """dcp.save({"model": model.state_dict()}, checkpoint_id=sys.argv[1])""",
    # What save_state calls where it trains with FSDP, which it does on GPUs alone.
    "accelerate": """
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_model
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
os.makedirs(sys.argv[1], exist_ok=True)
save_fsdp_model(plugin, Accelerator(cpu=True), model, sys.argv[1])
""",
}
_LEFT = """
dist.barrier()
sys.stdout.flush()
os._exit(0)  # torch itself aborts at its exit now and then
"""


@pytest.mark.parametrize("program", _SAVED_BY)
def test_shards_of_two_processes(tmp_path: Path, program: str) -> None:
    """FSDP's: a tensor is in pieces, in several files."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    (tmp_path / "save.py").write_text(f"{_SHARDED}\n{_SAVED_BY[program]}\n{_LEFT}")
    done = subprocess.run(
        [*launch, str(tmp_path / "save.py"), str(tmp_path / "sharded")],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": ".:src"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "sharded").rglob("*.distcp"))) == 2
    torch.manual_seed(1)
    model = peers.book()
    close(tmp_path / "sharded", model)
    plain(tmp_path / "sharded", model)


def test_litgpt_is_read_and_not_taken_for_ours(tmp_path: Path) -> None:
    from litgpt import Config
    from litgpt.model import GPT

    model = GPT(Config(n_layer=2, n_embd=32, n_head=2, padded_vocab_size=64, block_size=16))
    folder = tmp_path / "final"
    folder.mkdir()
    torch.save({"model": torch.compile(model).state_dict(), "iter_num": 1}, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="its norms are LayerNorm"):
        onym.load_model(folder)
    fresh = GPT(Config(n_layer=2, n_embd=32, n_head=2, padded_vocab_size=64, block_size=16))
    onym.load(folder, into=fresh)
    ids = torch.arange(8)[None]
    assert torch.equal(fresh(ids), model(ids))
    convert(folder, tmp_path / "x.safetensors")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "x.safetensors").keys() == model.state_dict().keys()


def test_nanochat_is_read_and_not_taken_for_ours(tmp_path: Path) -> None:
    names = [f"transformer.h.0.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj")]
    state = {
        f"_orig_mod.{name}": torch.ones(4, 4) for name in ("transformer.wte.weight", "lm_head.weight", "resid_lambdas", *names)
    }
    for step in (100, 200):
        torch.save({**state, "_orig_mod.lm_head.weight": torch.full((4, 4), float(step))}, tmp_path / f"model_{step:06}.pt")
        torch.save({"state": {}, "param_groups": []}, tmp_path / f"optim_{step:06}_rank0.pt")
        (tmp_path / f"meta_{step:06}.json").write_text(json.dumps({"step": step}))
    opened = onym.open_checkpoint(tmp_path)
    assert opened.tensor("lm_head.weight")[0, 0] == 200  # the newest
    assert "nanochat" in opened.origin.kind
    with pytest.raises(CheckpointError, match=r"of which no model can be built here: its positions are rotary"):
        onym.load_model(tmp_path)
    report = convert(tmp_path, tmp_path / "plain.safetensors")
    assert (report.tensors, report.compared, report.rules) == (7, 7, {"renamed": 7})


_TANH = ("book", "book_fast", "book_without_masks", "huggingface")


@pytest.mark.parametrize(
    ("source", "into"), [*((one, other) for one in _TANH for other in (*_TANH, "ours")), ("nanogpt", "ours")]
)
def test_any_gpt_loads_into_any_other(tmp_path: Path, source: str, into: str) -> None:
    path = tmp_path / "x.pt"
    if source == "nanogpt":
        model: nn.Module = peers.nanogpt(path, bias=True, n_head=1)
    else:
        model = getattr(peers, source)(**({"n_head": 1} if source == "huggingface" else {"qkv_bias": True}))
        torch.save(model.state_dict(), path)
    if into == "ours":
        config = onym.GPTConfig(97, 24, 64, 1, 3, qkv_bias=True, gelu="erf" if source == "nanogpt" else "tanh")
        target: nn.Module = onym.GPT(config).eval()
    else:
        # A model that ties its head can be loaded from files alone whose head is the embedding.
        changes = {"n_head": 1, "tie_word_embeddings": source == "huggingface"} if into == "huggingface" else {"qkv_bias": True}
        target = getattr(peers, into)(**changes)
    identities = {name: value.data_ptr() for name, value in target.state_dict().items()}
    onym.load(path, into=target)
    assert identities == {name: value.data_ptr() for name, value in target.state_dict().items()}
    assert (logits(target, tokens()) - logits(model, tokens())).abs().max() < CLOSE


def test_what_no_shape_shows_is_refused(tmp_path: Path) -> None:
    peers.nanogpt(tmp_path / "ckpt.pt", bias=True)
    ours = onym.GPT(onym.GPTConfig(97, 24, 64, 4, 3, qkv_bias=True, tie_embeddings=True))
    with pytest.raises(ConfigError, match="was trained with gelu=erf"):
        onym.load(tmp_path / "ckpt.pt", into=ours)
    ours = onym.GPT(onym.GPTConfig(97, 24, 64, 2, 3, qkv_bias=True, tie_embeddings=True, gelu="erf"))
    with pytest.raises(ConfigError, match="was trained with n_heads=4"):
        onym.load(tmp_path / "ckpt.pt", into=ours)


@pytest.mark.parametrize("kind", ["GPT2ForTokenClassification", "GPT2ForQuestionAnswering"])
def test_another_head_of_transformers_is_said(tmp_path: Path, kind: str) -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=97, n_positions=24, n_embd=64, n_head=4, n_layer=1, bos_token_id=0, eos_token_id=0
    )
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"it has (classifier|qa_outputs)\.\w+, and here a head gives one value"):
        onym.load_model(tmp_path / "hf")
    other = getattr(transformers, kind)(config)
    onym.load(tmp_path / "hf", into=other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    plain(tmp_path / "hf", model)


def test_what_a_checkpoint_of_ours_says_is_not_said_again(tmp_path: Path) -> None:
    onym.save(onym.GPT(onym.GPTConfig(97, 24, 64, 4, 1)), tmp_path / "ours")
    with pytest.raises(ConfigError, match="says n_heads=4, and 2 was given"):
        onym.load_model(tmp_path / "ours", n_heads=2)
    with pytest.raises(ConfigError, match="holds one model: leave part 'ema' out"):
        onym.load_model(tmp_path / "ours", part="ema")
    onym.load_model(tmp_path / "ours", n_heads=4)


def test_a_tokenizer_beside_the_weights_comes_along(tmp_path: Path) -> None:
    from onym.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["some words and some more words, all of them short " * 20], 280)
    peers.huggingface(vocab_size=280).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer.to_json())
    text = onym.open_checkpoint(tmp_path / "hf").text("tokenizer.json")
    assert text is not None
    assert Tokenizer.from_json(text).encode("some words") == tokenizer.encode("some words")
    model = json.loads(tokenizer.to_json())["model"]  # GPT-2's own two files
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    text = onym.open_checkpoint(tmp_path / "hf").text("tokenizer.json")
    assert text is not None
    assert Tokenizer.from_json(text).encode("more words, short") == tokenizer.encode("more words, short")
