"""A GGUF file is written completely or not at all, is compared, and needs little memory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch

import onym
from onym.convert.gguf_file import GGUFFile
from onym.convert.write import convert
from onym.data.tokenizer import Tokenizer
from onym.errors import CheckpointError
from onym.format.reader import read_checkpoint

SIZES = {"vocab_size": 300, "context_length": 64, "emb_dim": 64, "n_heads": 2, "n_layers": 2}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """It is ``tokenizer.json`` in ``tmp_path``, and the model beside it ``ours``."""
    made = Tokenizer.train(["some words and some more words " * 20], 280)
    (tmp_path / "tokenizer.json").write_text(made.to_json())
    onym.save(onym.Decoder(onym.DecoderConfig(**SIZES)), tmp_path / "ours")
    return made


def test_a_file_that_is_not_what_was_written_is_found_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tensors = read_checkpoint(tmp_path / "ours").model
    kinds = {name: "Q8_0" if "fc" in name else "F32" for name in tensors.names}
    made = GGUFFile(tensors, kinds, "llama", lambda writer: None)
    made.write(tmp_path / "m.gguf")
    assert "within a step of Q8_0" in made.compare(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    places = {tensor.name: int(tensor.data_offset) for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for place in (places["final_norm.weight"], places["trf_blocks.1.ff.fc3.weight"] + 1, 70):
        (tmp_path / "m.gguf").write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="was written and removed again"):
            made.compare(tmp_path / "m.gguf")


_KILLED = """
import os, signal, sys
from onym.convert.write import convert
def progress(count):
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(28, "No space left on device")
convert("ours", "m.gguf", tokenizer=open("tokenizer.json").read(), progress=progress)
"""


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_conversion_that_does_not_end_leaves_no_file(tmp_path: Path, tokenizer: Tokenizer, how: str) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, how], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 1), done.stderr
    there = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert there == {"ours", "tokenizer.json"}
    convert(tmp_path / "ours", tmp_path / "m.gguf", tokenizer=tokenizer.to_json())
    assert {path.name for path in tmp_path.iterdir()} == {*there, "m.gguf", "m.Modelfile"}  # and what was half there is gone


_MEASURE = """
import re, threading, time, pathlib
from onym.convert.write import convert
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
text = open("tokenizer.json").read()
convert("small", "small.gguf", tokenizer=text, dtype="q8_0")
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
convert("big", "big.gguf", tokenizer=text, dtype="q8_0")
done = True; thread.join()
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_conversion_needs_no_more_memory_than_its_largest_tensor(tmp_path: Path, tokenizer: Tokenizer) -> None:
    big = {"vocab_size": 8000, "context_length": 64, "emb_dim": 512, "n_heads": 8, "n_layers": 15}  # 204 MB, 16 in the largest
    model = onym.Decoder.without_values(onym.DecoderConfig(**big)).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.copy_(torch.arange(parameter.shape[-1]) / 1e3)
    whole = sum(value.nbytes for value in model.parameters())
    largest = max(value.nbytes for value in model.parameters())
    onym.save(model, tmp_path / "big")
    (tmp_path / "ours").rename(tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", _MEASURE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    needed = int(done.stdout.split()[-1])
    assert whole > 200e6
    assert needed < largest + (64 << 20), f"{needed / 1e6:.0f} MB for {whole / 1e6:.0f}, largest {largest / 1e6:.0f}"
