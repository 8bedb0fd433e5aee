"""``onym convert``, as it is typed, and the stories that they are there for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import onym as library
from onym.data.tokenizer import Tokenizer
from tests.conftest import TINY_RUN, Run
from tests.convert import peers
from tests.convert.peers import logits, tokens

TEXT = "some words and some more words, all of them short, and some of them longer than others; " * 40


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(Tokenizer.train([TEXT], 280).to_json())
    return path


def told(onym: Run, *arguments: object) -> dict[str, object]:
    done = onym(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_i_trained_with_torch_compile_and_model_pth_wont_load(onym_process: Run, tmp_path: Path, tokenizer: Path) -> None:
    """The story that Onym began with: two commands from the broken file to text."""
    model = peers.book(vocab_size=280)
    compiled = torch.compile(model)
    torch.save(compiled.state_dict(), tmp_path / "model.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        peers.book(vocab_size=280).load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    done = onym_process("convert", tmp_path / "model.pth", "--in-place")
    assert done.returncode == 0, done.stderr
    assert "_orig_mod. in 47 names" in done.stdout
    done = onym_process("generate", tmp_path / "model.pth", "--prompt", "some words", "--max-new-tokens", "5", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("some words")
    assert len(done.stdout) > len("some words\n")
    assert "1 attention heads were assumed" in done.stderr
    peers.book(vocab_size=280).load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))


def test_the_report_says_what_was_found_and_done(onym: Run, tmp_path: Path) -> None:
    torch.save(torch.compile(peers.book()).state_dict(), tmp_path / "model.pth")
    done = onym("convert", "model.pth", "hf", "--to", "huggingface")
    assert done.returncode == 0, done.stderr
    for said in (
        "the book's GPTModel, a file of torch.save",
        "_orig_mod. in 47 names",
        "renamed 38, transposed 12, given zeros 3",
        "trf_blocks.*.att.mask (nothing learned)",
        "38 tensors read back, bitwise identical",
        "1 attention heads were assumed",
        'AutoModelForCausalLM.from_pretrained("hf")',
    ):
        assert said in done.stdout, said
    assert told(onym, "convert", "model.pth", "again.pth")["rules"] == {"renamed": 47}
    done = onym("convert", "model.pth", "x", "--to", "huggingface", "--dry-run")
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "x").exists()


def test_a_file_of_nanogpt_and_a_folder_of_transformers_are_compared(onym: Run, tmp_path: Path) -> None:
    peers.nanogpt(tmp_path / "ckpt.pt", bias=True)
    assert onym("convert", "ckpt.pt", "hf", "--to", "huggingface").returncode == 0
    done = onym("diff", "ckpt.pt", "hf")
    assert done.returncode == 0, done.stdout
    assert "The same weights" in done.stdout
    assert "A is nanoGPT's GPT" in done.stdout
    assert "B is transformers' GPT-2" in done.stdout
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text().replace('"activation_function": "gelu"', '"activation_function": "gelu_new"'))
    assert "config: gelu is erf in A, tanh in B" in onym("diff", "ckpt.pt", "hf").stdout
    one = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    one["model"]["transformer.h.1.mlp.c_fc.weight"] += 1
    torch.save(one, tmp_path / "other.pt")
    done = onym("diff", "other.pt", "hf")
    assert done.returncode == 1
    assert "trf_blocks.1.ff.layers.0.weight" in done.stdout


def test_inspect_and_verify_know_them(onym: Run, tmp_path: Path) -> None:
    torch.save({"model_state_dict": torch.compile(peers.book()).state_dict(), "epoch": 3}, tmp_path / "model.pth")
    text = onym("inspect", "model.pth").stdout
    for said in ("the book's GPTModel", "_orig_mod. in 47 names", "\n  _orig_mod\n", "as ours", "--in-place"):
        assert said in text, said
    everything = told(onym, "inspect", "model.pth")
    assert everything["found"]["rules"] == {"renamed": 23, "joined": 3}  # type: ignore[index]
    assert everything["config"]["n_layers"] == 3  # type: ignore[index]
    done = onym("verify", "model.pth")
    assert done.returncode == 0
    assert "checksums of its zip" in done.stdout
    content = bytearray((tmp_path / "model.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.pth").write_bytes(content)
    assert onym("verify", "model.pth").returncode == 1
    peers.huggingface().save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert onym("verify", "hf").returncode == 0
    assert "transformers' GPT-2" in onym("inspect", "hf").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("model.pth", "model.pth"), "something at 'model.pth' already"),
        (("absent", "x"), "nothing at 'absent'"),
        (("model.pth", "x", "--to", "huggingfase"), "no format 'huggingfase' (did you mean 'huggingface'?)"),
        (("model.pth", "x.bin"), "'.bin' does not say which format is wanted"),
        (("model.pth", "x", "--to", "book"), "end 'x' in .pth or .pt"),
        (("model.pth", "x.pth", "--drop", "gelu"), "writes every tensor as it is"),
        (("model.pth", "x", "--to", "huggingface", "--shard-size", "big"), "'big' is no size"),
        (("model.pth", "x.pt", "--to", "nanogpt"), "--drop gelu"),
        (("model.pth", "x", "--n-heads", "7"), "cannot be split over n_heads=7"),
        (("model.pth", "s3://bucket/x"), "is remote: convert to this machine"),
    ],
)
def test_bad_input_is_a_sentence(onym: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    torch.save(peers.book().state_dict(), tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    done = onym("convert", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == before


def start(text: Path, *more: str) -> list[str]:
    shape = {"--preset", "--n-layers", "--emb-dim", "--n-heads", "--context-length", "--vocab-size"}
    kept = [part for pair in zip(TINY_RUN[::2], TINY_RUN[1::2], strict=True) if pair[0] not in shape for part in pair]
    return ["--data", str(text), *kept, "--compile", "off", *more]


def test_training_goes_on_from_nanogpts_file(onym: Run, tmp_path: Path, book: Path) -> None:
    """Its weights, its optimizer's moments, its count of steps, and a vocabulary without its padding."""
    tokenizer = Tokenizer.train([book.read_text()], 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    padded = -(-tokenizer.vocab_size // 64) * 64
    assert padded > tokenizer.vocab_size
    peers.nanogpt(tmp_path / "ckpt.pt", vocab_size=padded, steps=6, compiled=True)
    options = start(book, "--from", "ckpt.pt", "--tokenizer", "tokenizer.json", "--name", "on")
    done = onym("train", *options, "--steps", "6")
    assert done.returncode == 2
    assert "has 6 steps behind it" in done.stderr
    done = onym("train", *options, "--steps", "7", "--learning-rate", "1e-30", "--weight-decay", "0")
    assert done.returncode == 0, done.stderr
    assert "Continuing after step 6 of 7." in done.stdout
    kept = library.open_checkpoint(tmp_path / "runs" / "on")
    assert kept.config is not None
    assert (kept.config["gelu"], kept.config["bias"]) == ("erf", False)
    theirs = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(kept.tensor("trf_blocks.1.att.qkv.weight"), theirs["model"][f"_orig_mod.{name}"])
    assert kept.tensor("tok_emb.weight").shape[0] == tokenizer.vocab_size
    moments = kept.tensors("optimizer.safetensors")
    step = next(name for name in moments.names if name.startswith("state.step"))
    assert moments.tensor(step) == 7
    assert onym("generate", "runs/on", "--prompt", "the lamp", "--max-new-tokens", "2").returncode == 0


def test_training_starts_from_the_books_file(onym: Run, tmp_path: Path, book: Path) -> None:
    tokenizer = Tokenizer.train([book.read_text()], 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    torch.save(torch.compile(peers.book(vocab_size=tokenizer.vocab_size)).state_dict(), tmp_path / "model.pth")
    done = onym("train", *start(book, "--from", "model.pth", "--name", "on", "--steps", "2"))
    assert done.returncode == 0, done.stderr
    assert library.open_checkpoint(tmp_path / "runs" / "on").manifest.step == 2


def test_an_onym_run_becomes_everybodys(onym: Run, tmp_path: Path, book: Path) -> None:
    done = onym("train", "--data", book, *TINY_RUN, "--compile", "off", "--steps", "2", "--name", "mine")
    assert done.returncode == 0, done.stderr
    model = library.load_model(tmp_path / "runs" / "mine")
    ids = tokens(200)
    for to, end in (("huggingface", "hf"), ("book", "a.pth"), ("book-fast", "b.pth"), ("safetensors", "c.safetensors")):
        done = onym("convert", "runs/mine", end, "--to", to)
        assert done.returncode == 0, done.stderr
        heads = 2 if end.endswith("pth") else None
        assert torch.allclose(logits(library.load_model(tmp_path / end, n_heads=heads), ids), logits(model, ids), atol=1e-5)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = AutoTokenizer.from_pretrained(tmp_path / "hf")("the lamp", return_tensors="pt")
    assert theirs.generate(**text, max_new_tokens=3, do_sample=False).shape[1] > 3
