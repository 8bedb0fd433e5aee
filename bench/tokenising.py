"""Text to tokens: training a tokenizer, encoding and writing, against nanoGPT's way and Hugging Face datasets' map.

    python bench/tokenising.py [--rounds 3] [--megabytes 200] [--folder DIR]

The text is 200 MB of Python sources, from the standard library and from the packages that are installed, a document a file. All
have the same merges and give the same number of tokens, which is checked. nanoGPT's prepare.py and datasets' map train no
tokenizer: theirs is that of ``tokenizers``. Each runs in a process of its own, with fresh caches, its imports not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from _measure import rounds, save_results

VOCAB_SIZE = 8192
PROCESSES = os.cpu_count() or 1

# Each prints what it measured as JSON. TOKENIZER is what "tokenizers" trained.
ONYM = """
from onym.data.corpus import Corpus
from onym.data.survey import survey
from onym.data.tokenise import tokenise
from onym.data.train_tokenizer import cached_tokenizer
import gigatoken
start = time.perf_counter()
found = survey(Corpus(tuple(PATHS)), 0.05)
surveyed = time.perf_counter()
tokenizer = cached_tokenizer([found], VOCAB_SIZE, Path("cache"))
trained = time.perf_counter()
data = tokenise(found, tokenizer, Path("cache"))
encode = time.perf_counter() - trained + surveyed - start
Path("tokenizer.json").write_text(tokenizer.to_json())
answer(train=trained - surveyed, encode=encode, tokens=len(data.train) + len(data.held_out))
"""
# Onym as it was before this, from the folder that --before names.
BEFORE = """
from onym.data.corpus import Corpus
from onym.data.tokens import cached_tokenizer, survey, tokenise
start = time.perf_counter()
corpus = Corpus(tuple(PATHS))
found = survey(corpus, 0.05)
surveyed = time.perf_counter()
tokenizer = cached_tokenizer(corpus, found, VOCAB_SIZE, Path("cache"))
trained = time.perf_counter()
data = tokenise(corpus, found, tokenizer, Path("cache"))
encode = time.perf_counter() - trained + surveyed - start
answer(train=trained - surveyed, encode=encode, tokens=len(data.train) + len(data.held_out))
"""
# On as much text as Onym trains on.
TRAIN = """
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
start = time.perf_counter()
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], show_progress=False,
                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
tokenizer.train_from_iterator((Path(path).read_text() for n, path in enumerate(PATHS) if n % 20), trainer)
answer(train=time.perf_counter() - start)
"""
# As nanoGPT's data/openwebtext/prepare.py: tiktoken in a map of several processes, then 1,024 pieces into an np.memmap.
NANOGPT = """
import numpy as np, tiktoken
from datasets import Dataset, disable_progress_bars
disable_progress_bars()
content = json.loads(Path("tokenizer.json").read_text())
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(others)}}
ids = {bytes(byte_of[c] for c in token): number for token, number in content["model"]["vocab"].items() if number}
pattern = r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
encoding = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ids, special_tokens={"<|endoftext|>": 0})
def process(example):
    ids = encoding.encode_ordinary(Path(example["path"]).read_text())
    ids.append(0)
    return {"ids": ids, "len": len(ids)}
start = time.perf_counter()
tokenized = Dataset.from_dict({"path": PATHS}).map(process, remove_columns=["path"], num_proc=PROCESSES)
length = np.sum(tokenized["len"], dtype=np.uint64)
written = np.memmap("nano.bin", dtype=np.uint16, mode="w+", shape=(int(length),))
index = 0
pieces = min(1024, len(PATHS))
for number in range(pieces):
    batch = tokenized.shard(num_shards=pieces, index=number, contiguous=True).with_format("numpy")
    part = np.concatenate(batch["ids"])
    written[index : index + len(part)] = part
    index += len(part)
written.flush()
answer(encode=time.perf_counter() - start, tokens=int(length))
"""
DATASETS = """
import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast
disable_progress_bars()
tokenizer = PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", model_max_length=10**12)
def process(batch):
    texts = [Path(path).read_text() + "<|endoftext|>" for path in batch["path"]]
    return {"ids": tokenizer(texts, return_attention_mask=False)["input_ids"]}
start = time.perf_counter()
tokenized = Dataset.from_dict({"path": PATHS}).map(process, batched=True, remove_columns=["path"], num_proc=PROCESSES)
with open("datasets.bin", "wb") as file:
    length = 0
    for batch in tokenized.with_format("numpy").iter(1000):
        part = np.concatenate(batch["ids"]).astype(np.uint16)
        part.tofile(file)
        length += len(part)
answer(encode=time.perf_counter() - start, tokens=length)
"""
"""The end of a document is in its text there."""

PRELUDE = """
import json, time
from pathlib import Path
PATHS, VOCAB_SIZE, PROCESSES = json.loads(Path("paths.json").read_text()), {vocab_size}, {processes}
def answer(**measured):
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({{**measured, "memory": int(peak) / 1024}}))
"""
VARIANTS = {
    "onym": ONYM,
    "tokenizers' trainer": TRAIN,
    "tiktoken and np.memmap, as nanoGPT": NANOGPT,
    "datasets' map, a fast tokenizer": DATASETS,
    "onym before": BEFORE,
}
NEEDS_TRAINER = ("tiktoken and np.memmap, as nanoGPT", "datasets' map, a fast tokenizer")


def sources(size: int) -> tuple[list[str], int]:
    """Python files whose sizes add up, and their bytes."""
    paths, total = [], 0
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            unlike = any(each in text for each in ("\0", "\r", "\ufeff", "<|endoftext|>"))  # what the others read otherwise
            if text.strip() and not unlike and len(text) < min(1 << 20, size // 50):
                paths.append(str(path))
                total += len(text.encode())
            if total >= size:
                return paths, total
    return paths, total


def measure(variant: str, folder: Path, before: Path | None) -> dict[str, float]:
    shutil.rmtree(folder / "cache", ignore_errors=True)
    program = PRELUDE.format(vocab_size=VOCAB_SIZE, processes=PROCESSES) + VARIANTS[variant]
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "cache" / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if variant == "onym before":
        environment["PYTHONPATH"] = str(before)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument(
        "--before", type=Path, default=None, help="the src of a checkout of 1c99582 or earlier, to compare with"
    )
    given = parser.parse_args()
    variants = [name for name in VARIANTS if given.before is not None or name != "onym before"]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as name:
        folder = Path(name)
        paths, size = sources(given.megabytes * 10**6)
        (folder / "paths.json").write_text(json.dumps(paths))
        print(f"{size / 1e6:.0f} MB in {len(paths):,} files, {PROCESSES} cores")
        measure("onym", folder, given.before)  # the files are read once, and the tokenizer is there for the others
        for number in rounds(given.rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                measured[variant].append(measure(variant, folder, given.before))
    counts = {int(run["tokens"]) for runs in measured.values() for run in runs if "tokens" in run}
    assert len(counts) == 1, f"they gave different numbers of tokens: {measured}"
    medians = {
        variant: {what: statistics.median(run.get(what, 0.0) for run in runs) for what in ("train", "encode", "memory")}
        for variant, runs in measured.items()
    }
    for variant in NEEDS_TRAINER:
        medians[variant]["train"] = medians["tokenizers' trainer"]["train"]
    totals = {name: each["train"] + each["encode"] for name, each in medians.items() if each["encode"]}
    print(f"\n{'':<36} {'training':>9} {'encoding, writing':>18} {'together':>9} {'MB/s':>7} {'memory':>9} {'onym is':>12}")
    for name, seconds in totals.items():
        each = medians[name]
        print(
            f"{name:<36} {each['train']:7.1f} s {each['encode']:16.1f} s {seconds:7.1f} s {size / 1e6 / seconds:7.1f} "
            f"{each['memory']:6.0f} MB {seconds / totals['onym']:6.1f}x as fast"
        )
    save_results("tokenising", {"megabytes": size / 1e6, "files": len(paths), "medians": medians, "rounds": measured})


if __name__ == "__main__":
    main()
