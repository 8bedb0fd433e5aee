"""What is converted opens in the other program, computes the same there, and comes back as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import onym
from onym.convert.opening import open_any
from onym.convert.registry import formats, targets
from onym.convert.write import convert
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError, ConfigError, StorageError
from tests.convert import peers
from tests.convert.peers import NanoGPT, logits, tokens

CLOSE = 1e-5
SIZES = {"vocab_size": 97, "context_length": 24, "emb_dim": 64, "n_heads": 4, "n_layers": 2}


def ours(path: Path, **config: object) -> onym.GPT:
    model = peers.scattered(onym.GPT(onym.GPTConfig(**{**SIZES, **config})))  # type: ignore[arg-type]
    onym.save(model, path)
    assert isinstance(model, onym.GPT)
    return model


BIASES = [{"bias": True, "qkv_bias": False}, {"bias": True, "qkv_bias": True}, {"bias": False, "qkv_bias": False}]


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("shard_bytes", [None, 50_000])
def test_transformers_opens_it(tmp_path: Path, biases: dict[str, bool], tied: bool, gelu: str, shard_bytes: int | None) -> None:
    from transformers import AutoModelForCausalLM

    model = ours(tmp_path / "ours", tie_embeddings=tied, gelu=gelu, drop_rate=0.1, **biases)
    report = convert(tmp_path / "ours", tmp_path / "hf", to="huggingface", shard_bytes=shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (logits(theirs, tokens()) - logits(model, tokens())).abs().max() < CLOSE
    assert report.logits is not None
    assert report.logits < CLOSE
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard_bytes is not None)
    assert not list((tmp_path / "hf").glob("*.py")), "no code is needed"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["n_ctx"] == 24, "llama.cpp's converter reads it"
    assert onym.load_model(tmp_path / "hf").config == model.config  # with the dropout, and without the zeros


def test_transformers_has_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.train(["some words and some more words, all of them short " * 20], 280)
    ours(tmp_path / "ours", vocab_size=tokenizer.vocab_size)
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface", tokenizer=tokenizer.to_json())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("some words, short")["input_ids"] == tokenizer.encode("some words, short")
    assert theirs.eos_token_id == tokenizer.end_of_text
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.end_of_text


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("to", "build"), [("book", peers.book), ("book-fast", peers.book_fast)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_books_classes_load_it_strictly(tmp_path: Path, qkv_bias: bool, to: str, build: object, tied: bool) -> None:
    model = ours(tmp_path / "ours", qkv_bias=qkv_bias, tie_embeddings=tied)
    convert(tmp_path / "ours", tmp_path / "model.pth", to=to)
    theirs: nn.Module = build(n_heads=4, n_layers=2, qkv_bias=qkv_bias)  # type: ignore[operator]
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert (logits(theirs, tokens()) - logits(model, tokens())).abs().max() < CLOSE
    assert onym.load_model(tmp_path / "model.pth", n_heads=4).config == model.config


@pytest.mark.parametrize("biases", BIASES)
def test_nanogpt_resumes_it(tmp_path: Path, biases: dict[str, bool]) -> None:
    model = ours(tmp_path / "ours", tie_embeddings=True, gelu="erf", **biases)
    convert(tmp_path / "ours", tmp_path / "ckpt.pt", to="nanogpt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    theirs = NanoGPT(**checkpoint["model_args"]).eval()  # as its train.py does with init_from=resume
    theirs.load_state_dict(checkpoint["model"])
    theirs.optimizer().load_state_dict(checkpoint["optimizer"])
    assert (checkpoint["iter_num"], checkpoint["best_val_loss"]) == (0, 1e9)
    assert (logits(theirs, tokens()) - logits(model, tokens())).abs().max() < CLOSE


def test_nanogpts_moments_survive_there_and_back(tmp_path: Path) -> None:
    peers.nanogpt(tmp_path / "ckpt.pt", bias=True)
    convert(tmp_path / "ckpt.pt", tmp_path / "again.pt", to="nanogpt")
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("ckpt.pt", "again.pt"))
    assert one["model_args"] == other["model_args"]
    assert one["iter_num"] == other["iter_num"] == 2
    assert one["best_val_loss"] == other["best_val_loss"]
    for number, state in one["optimizer"]["state"].items():
        for slot, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][number][slot]), (number, slot)
    for kept, again in zip(one["optimizer"]["param_groups"], other["optimizer"]["param_groups"], strict=True):
        assert kept == again


def test_a_run_of_ours_goes_to_nanogpt_with_its_moments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = onym.GPT(onym.GPTConfig(**SIZES, tie_embeddings=True, gelu="erf", bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(tokens(), tokens()).backward()
    optimizer.step()
    with onym.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(5, {"model": model, "optimizer": optimizer})
    report = convert(tmp_path / "run", tmp_path / "ckpt.pt", to="nanogpt")
    assert "The optimizer's moments are in it." in report.notes
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    theirs = NanoGPT(**checkpoint["model_args"])
    resumed = theirs.optimizer()
    theirs.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert checkpoint["iter_num"] == 5
    state = resumed.state[theirs.transformer.h[1]["mlp"]["c_fc"].weight]
    assert torch.equal(state["exp_avg"], optimizer.state[model.trf_blocks[1].ff.layers[0].weight]["exp_avg"])
    assert torch.equal(
        resumed.state[theirs.transformer.ln_f.weight]["exp_avg_sq"], optimizer.state[model.final_norm.weight]["exp_avg_sq"]
    )


CONFIGS = st.builds(
    lambda heads, size, layers, vocabulary, context, tied, biases, gelu: onym.GPTConfig(
        vocab_size=vocabulary, context_length=context, emb_dim=heads * size, n_heads=heads, n_layers=layers,
        tie_embeddings=tied, gelu=gelu, **biases,
    ),
    st.integers(1, 3), st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(2, 70), st.integers(1, 9), st.booleans(),
    st.sampled_from([*BIASES, {"bias": False, "qkv_bias": True}]), st.sampled_from(["tanh", "erf"]),
)  # fmt: skip


@settings(deadline=None)
@given(config=CONFIGS, to=st.sampled_from(["huggingface", "book", "book-fast", "nanogpt", "onym", "pth", "safetensors"]))
def test_there_and_back_is_the_identity(tmp_path_factory: pytest.TempPathFactory, config: onym.GPTConfig, to: str) -> None:
    folder = tmp_path_factory.mktemp("there")
    model = peers.scattered(onym.GPT(config))
    onym.save(model, folder / "ours")
    there = folder / ("there" if to in ("huggingface", "onym") else "there.safetensors" if to == "safetensors" else "there.pth")
    try:
        convert(folder / "ours", there, to=to)
    except CheckpointError as error:
        assert "To do without that" in str(error)
        impossible = {"nanogpt": config.gelu == "tanh" or not config.tie_embeddings}
        assert impossible.get(to, config.gelu == "erf")
        return
    back = onym.load_model(there, n_heads=None if to in ("huggingface", "nanogpt", "onym", "safetensors") else config.n_heads)
    assert isinstance(back, onym.GPT)
    exact = {"huggingface", "onym", "safetensors"}
    if to in exact:
        assert back.config == config
    for name, value in back.state_dict().items():
        if name in model.state_dict():
            assert torch.equal(value, model.state_dict()[name]), name
        else:
            assert to not in exact
            assert not value.any(), name  # a bias of zeros that the layout has to have
    assert back.state_dict().keys() >= model.state_dict().keys()


@pytest.mark.parametrize("build", [peers.book, peers.book_fast, peers.huggingface])
def test_theirs_to_ours_and_back_gives_equal_tensors(tmp_path: Path, build: object) -> None:
    model: nn.Module = build()  # type: ignore[operator]
    to = {peers.book: "book", peers.book_fast: "book-fast", peers.huggingface: "huggingface"}[build]
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", to="onym", settings={"n_heads": 4})
    end = tmp_path / ("back" if to == "huggingface" else "back.pth")
    convert(tmp_path / "ours", end, to=to)
    if to == "huggingface":
        from transformers import AutoModelForCausalLM

        state = AutoModelForCausalLM.from_pretrained(end).state_dict()
    else:
        state = torch.load(end, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@st.composite
def _theirs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    return draw(st.sampled_from(["book", "book-fast", "huggingface", "nanogpt"])), {
        "heads": heads,
        "width": heads * size,
        "layers": draw(st.integers(1, 3)),
        "vocabulary": draw(st.integers(2, 70)),
        "padding": draw(st.integers(0, 9)),
        "context": draw(st.integers(1, 9)),
        "tied": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "gelu": draw(st.sampled_from(["gelu_new", "gelu"])),
    }


def _built(to: str, size: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Somebody's model of a size, and what is kept beside its weights."""
    rows = size["vocabulary"] + size["padding"]
    if to == "nanogpt":
        names = ("layers", "heads", "width", "context", "bias")
        arguments = dict(
            zip(("n_layer", "n_head", "n_embd", "block_size", "bias"), (size[name] for name in names), strict=True)
        )
        arguments |= {"vocab_size": rows, "dropout": 0.0}
        return peers.scattered(NanoGPT(**arguments)), arguments
    if to == "huggingface":
        values = {"vocab_size": rows, "n_positions": size["context"], "n_embd": size["width"], "n_head": size["heads"]}
        values |= {"n_layer": size["layers"], "tie_word_embeddings": size["tied"], "activation_function": size["gelu"]}
        return peers.huggingface(**values), values
    build = peers.book if to == "book" else peers.book_fast
    sizes = {"vocab_size": rows, "context_length": size["context"], "emb_dim": size["width"], "n_heads": size["heads"]}
    return build(**sizes, n_layers=size["layers"], qkv_bias=size["bias"]), {}


@settings(deadline=None)
@given(drawn=_theirs())
def test_anybodys_to_ours_and_back_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[str, dict[str, Any]]
) -> None:
    """Any size, biases, head and padding: theirs -> ours -> theirs gives equal tensors and equal settings."""
    to, size = drawn
    folder = tmp_path_factory.mktemp("theirs")
    model, said = _built(to, size)
    source, end = folder / "theirs.pth", folder / "back.pth"
    if to == "huggingface":
        source, end = folder / "theirs", folder / "back"
        model.save_pretrained(source)  # type: ignore[operator]
    else:
        torch.save({"model": model.state_dict(), "model_args": said} if said else model.state_dict(), source)
    convert(source, folder / "ours", to="onym", settings={"n_heads": size["heads"]})
    convert(folder / "ours", end, to=to)
    if to == "huggingface":
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(end)
        state = again.state_dict()
        assert {name: getattr(again.config, name) for name in said} == said
    else:
        content = torch.load(end, weights_only=True)
        state = content["model"] if to == "nanogpt" else content
        assert content["model_args"] == said if to == "nanogpt" else True
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    convert(folder / "ours", folder / "cropped", to="onym", vocab_size=size["vocabulary"])
    short = onym.load_model(folder / "cropped").state_dict()
    whole = onym.load_model(folder / "ours").state_dict()
    for name, value in whole.items():
        cropped = value[: size["vocabulary"]] if name in ("tok_emb.weight", "out_head.weight") else value
        assert torch.equal(short[name], cropped), name


def test_what_transformers_says_besides_is_kept(tmp_path: Path) -> None:
    """From its folder to another of its folders, nothing is lost that the files say: token ids, dropouts, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = Tokenizer.train(["some words and some more words, all of them short " * 20], 280)
    peers.huggingface(
        vocab_size=300, bos_token_id=5, eos_token_id=7, pad_token_id=9, attn_pdrop=0.25, resid_pdrop=0.125
    ).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer.to_json())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 24,
        "eos_token": "<|endoftext|>",
        "pad_token": "s",
    }
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(about))
    report = convert(tmp_path / "hf", tmp_path / "again", to="huggingface")
    assert report.unused == []
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "again"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "attn_pdrop", "resid_pdrop", "embd_pdrop", "n_head"):
        assert getattr(one.config, key) == getattr(other.config, key), key
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token == "s"
    convert(tmp_path / "hf", tmp_path / "fresh", to="huggingface", tokenizer=tokenizer.to_json())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fresh").config.eos_token_id == tokenizer.end_of_text
    assert {"config.json", "tokenizer.json"} <= set(convert(tmp_path / "hf", tmp_path / "x.safetensors").unused)


def test_an_option_that_would_be_passed_over_is_refused(tmp_path: Path) -> None:
    ours(tmp_path / "ours")
    for end, to, options, said in (
        ("x.pth", "book", {"shard_bytes": 1000}, "book is one file: leave --shard-size out"),
        ("x", "onym", {"shard_bytes": 1000}, "onym is one file"),
        ("x.safetensors", "safetensors", {"shard_bytes": 1000}, r"Shards are files in a folder: leave the ending of '.*' away"),
        ("x.pth", "book", {"tokenizer": "{}"}, "book has no place for a tokenizer"),
        ("x.safetensors", "onym", {"tokenizer": "{}"}, "onym has no place for a tokenizer"),
    ):
        with pytest.raises(ConfigError, match=said):
            convert(tmp_path / "ours", tmp_path / end, to=to, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_heads_that_the_books_file_cannot_say_are_told(tmp_path: Path) -> None:
    ours(tmp_path / "ours")
    assert "give n_heads=4 where it is loaded" in convert(tmp_path / "ours", tmp_path / "x.pth", to="book").notes[0]
    ours(tmp_path / "usual", n_heads=1)
    assert convert(tmp_path / "usual", tmp_path / "y.pth", to="book").notes == []


def test_a_padded_vocabulary_is_declared_or_cropped(tmp_path: Path) -> None:
    ours(tmp_path / "ours", vocab_size=128, tie_embeddings=True)
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 128
    report = convert(tmp_path / "ours", tmp_path / "short", to="huggingface", vocab_size=97)
    assert "31 rows of the vocabulary" in report.dropped
    one, other = onym.load_model(tmp_path / "ours"), onym.load_model(tmp_path / "short")
    assert torch.allclose(one(tokens())[..., :97], other(tokens()), atol=CLOSE)
    with pytest.raises(ConfigError, match="vocabulary of 128, which cannot be cropped to 129"):
        convert(tmp_path / "ours", tmp_path / "x", to="onym", vocab_size=129)


def test_what_a_layout_cannot_hold_is_refused_or_dropped_by_name(tmp_path: Path) -> None:
    model = ours(tmp_path / "ours")
    with pytest.raises(
        CheckpointError, match=r"tanh form\. To do without that, which makes it another model, give --drop gelu"
    ):
        convert(tmp_path / "ours", tmp_path / "ckpt.pt", to="nanogpt")
    with pytest.raises(CheckpointError, match=r"a head of its own.* --drop head"):
        convert(tmp_path / "ours", tmp_path / "ckpt.pt", to="nanogpt", drop=["gelu"])
    assert not (tmp_path / "ckpt.pt").exists()
    report = convert(tmp_path / "ours", tmp_path / "ckpt.pt", to="nanogpt", drop=["gelu", "head"])
    assert len(report.dropped) == 2
    assert "It is another model without gelu and head: its logits are up to" in report.notes[0]
    assert torch.equal(onym.open_checkpoint(tmp_path / "ckpt.pt").tensor("tok_emb.weight"), model.tok_emb.weight)
    with pytest.raises(ConfigError, match="--drop mask names nothing that book cannot hold"):
        convert(tmp_path / "ours", tmp_path / "x.pth", to="book", drop=["mask"])


def test_nothing_is_replaced_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    ours(tmp_path / "ours.safetensors")
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match=r"something at '.*there' already"):
        convert(tmp_path / "ours.safetensors", tmp_path / "there")
    before = sorted(tmp_path.iterdir())
    others = {known.name for known in formats() if known.architecture != "gpt"}
    for to in (each for each in targets() if not each.startswith("gguf")):  # which wants a tokenizer: test_gguf.py
        if to in others:
            with pytest.raises(CheckpointError, match="is not a decoder that is known here"):
                convert(tmp_path / "ours.safetensors", tmp_path / ("x.pth" if "book" in to else "x"), to=to, dry_run=True)
            continue
        end = tmp_path / ("x.pth" if to in ("book", "book-fast", "pth", "nanogpt") else "x")
        report = convert(
            tmp_path / "ours.safetensors", end, to=to, dry_run=True, drop=["gelu", "head"] if to == "nanogpt" else ()
        )
        assert report.tensors
        assert not report.compared
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "to"), [("x.pth", "pth"), ("x.pt", "pth"), ("x.safetensors", "safetensors"), ("x", "onym")])
def test_the_ending_tells_the_target(tmp_path: Path, name: str, to: str) -> None:
    ours(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / name)
    assert report.to == to
    assert report.why_to


def test_half_written_things_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is read back; where it is not what was meant, it goes."""
    from onym.format import tensor_writing

    ours(tmp_path / "ours")
    real = tensor_writing.in_memory
    monkeypatch.setattr(
        tensor_writing, "in_memory", lambda tensor: real(tensor) + 1 if tensor.shape == (97, 64) else real(tensor)
    )
    for name, to in (("x", "onym"), ("y", "huggingface"), ("z.pth", "book")):
        with pytest.raises(CheckpointError, match="was written and removed again"):
            convert(tmp_path / "ours", tmp_path / name, to=to)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


_MEASURE = """
import sys, threading, time, re, pathlib
from onym.convert.write import convert
import torch
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
convert("small", "warm" + sys.argv[2][-4:].replace("/big", ""), to=sys.argv[3])
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
done = True; thread.join()
print(most - before)
"""


WAYS = [
    ("book.pth", "hf", "huggingface"),
    ("book.pth", "fast.pth", "book-fast"),
    ("hf.safetensors", "book.out.pth", "book"),
    ("book.pth", "clean.pth", "pth"),
    ("distributed", "dcp.hf", "huggingface"),
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("source", "end", "to"), WAYS)
def test_a_conversion_needs_no_more_than_its_largest_tensor(tmp_path: Path, source: str, end: str, to: str) -> None:
    big = {
        "vocab_size": 20_000,
        "context_length": 64,
        "emb_dim": 512,
        "n_heads": 8,
        "n_layers": 12,
    }  # 233 MB, 41 in the largest
    model = onym.GPT(onym.GPTConfig(**big))
    onym.save(model, tmp_path / "ours")
    onym.save(onym.GPT(onym.GPTConfig(**SIZES)), tmp_path / "small")
    largest = max(value.nbytes for value in model.state_dict().values())
    whole = sum(value.nbytes for value in model.state_dict().values())
    if source == "distributed":
        import torch.distributed.checkpoint as dcp

        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / source)
    del model
    if source == "distributed":
        pass
    elif source == "book.pth":
        convert(tmp_path / "ours", tmp_path / source, to="book")
    else:
        convert(tmp_path / "ours", tmp_path / "made", to="huggingface")
        (tmp_path / "made" / "model.safetensors").rename(tmp_path / source)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, source, end, to],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    needed = int(done.stdout.split()[-1])
    assert whole > 5 * largest
    assert needed < largest + (64 << 20), f"{needed / 1e6:.0f} MB for {whole / 1e6:.0f}, largest {largest / 1e6:.0f}"


def test_every_kind_of_tensor_goes_through_plainly(tmp_path: Path) -> None:
    state = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.tensor(3),
        "c": torch.zeros(0, 4),
        "d.e": torch.ones(2, 2).t(),
    }
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "x.ckpt")
    report = convert(tmp_path / "x.ckpt", tmp_path / "y.safetensors")
    assert (report.tensors, report.compared, report.unused) == (4, 4, ["epoch"])
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())
    with pytest.raises(CheckpointError, match="is not a gpt that is known here"):
        convert(tmp_path / "x.ckpt", tmp_path / "z", to="huggingface")
    assert open_any(tmp_path / "y.safetensors").checkpoint.model.shapes.keys() == loaded.keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_no_file_can_hold_is_refused_and_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    for name, value in {
        "quantized": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        "sparse": torch.eye(2).to_sparse(),
    }.items():
        torch.save({"w": torch.ones(2), "odd": value}, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match="first"):
            convert(tmp_path / f"{name}.pth", tmp_path / f"{name}-out{suffix}")
        assert not (tmp_path / f"{name}-out{suffix}").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_conjugate_is_written_as_the_values_that_it_stands_for(tmp_path: Path, suffix: str) -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    torch.save({"w": value.conj()}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / f"out{suffix}")
    assert torch.equal(onym.open_checkpoint(tmp_path / f"out{suffix}").tensor("w"), value.conj().resolve_conj())
