"""Byte-level BPE by ``gigatoken``, which gives what ``tokenizers`` gives, 30 to 100 times faster.

It is a young library, so nothing rests on its word: before it does the work, its result for a part of the corpus is compared
with that of ``tokenizers``, which does the work wherever the two differ or gigatoken does not know the kind of tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onym.data.tokenizer import Tokenizer

Merges = list[tuple[bytes, bytes]]
Warn = Callable[[str], None]

_COMPARED, _COMPARED_BYTES = 64, 8192  # texts on which the two are compared, and bytes of each

SEPARATOR = b"\xff"  # no byte of UTF-8, so it is in no text
_TRAIN = """
import json, sys
import gigatoken
for samples, vocab_size, result in json.loads(sys.argv[1]):
    _, merges = gigatoken.train_bpe(gigatoken.TextFileSource(samples, b"\\xff"), vocab_size, [])
    with open(result, "w") as file:
        json.dump([[left.hex(), right.hex()] for left, right in merges], file)
"""


class Encoder:
    """Token ids of many texts at once.

    Args:
        tokenizer: whose ids.
        sample: texts of the corpus, to compare the two libraries with.
        warn: called once, where they differ.
    """

    def __init__(self, tokenizer: Tokenizer, sample: Sequence[bytes], warn: Warn | None = None) -> None:
        self._tokenizer, self._warn = tokenizer, warn
        self._fast = _open(tokenizer.to_json())
        if self._fast is not None and sample:
            (ids, stops), (right_ids, right_stops) = self(sample), self._slow(sample)
            if not (np.array_equal(ids, right_ids) and np.array_equal(stops, right_stops)):
                self._give_up("gives other tokens than tokenizers for this text")

    @property
    def library(self) -> str:
        """Which library encodes."""
        return "tokenizers" if self._fast is None else "gigatoken"

    def __call__(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode texts.

        Args:
            texts: UTF-8, none of them empty.

        Returns:
            The ids of all, uint32 [tokens], and where each text's end, int64 [texts].
        """
        if self._fast is not None:
            try:
                return self._encode_fast(texts)
            except BaseException as error:
                _raise_if_ours(error)
                self._give_up(f"failed ({type(error).__name__})")
        return self._slow(texts)

    def _encode_fast(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        import gigatoken

        layout = self._fast.encode_batch(gigatoken.BytesSource(SEPARATOR.join(texts), SEPARATOR)).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets)[1:]

    def _slow(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        encoded = [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.encode_batch([text.decode() for text in texts])]
        return np.concatenate(encoded), np.cumsum([len(ids) for ids in encoded], dtype=np.int64)

    def _give_up(self, why: str) -> None:
        self._fast = None
        if self._warn:
            self._warn(f"gigatoken {why}: tokenizers does the work, more slowly, with the right result.")


def _open(tokenizer_json: str):  # type: ignore[no-untyped-def]  # -> gigatoken.Tokenizer | None
    """The same tokenizer in gigatoken, special tokens in a text being text there too; None where it knows no such kind."""
    try:
        import gigatoken
    except ImportError:
        return None
    content = json.loads(tokenizer_json)
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token["special"]]
    try:
        return gigatoken.Tokenizer.from_json(json.dumps(content))
    except BaseException as error:  # whatever it raises says that it does not know this tokenizer
        _raise_if_ours(error)
        return None


def _raise_if_ours(error: BaseException) -> None:
    """Raise what is not the library's; a panic of Rust's is no Exception."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def train_merges(
    samples: Sequence[tuple[Sequence[Path], int]], meanwhile: Callable[[], None] = lambda: None
) -> list[Merges] | None:
    """The merges of byte-level BPEs with GPT-2's pre-tokenizer, in order; None where gigatoken is not there or fails.

    In a process of its own, as gigatoken writes to the terminal while it trains, and so that its memory is given back.

    Args:
        samples: of each the files with its texts, UTF-8, :data:`SEPARATOR` between two, of which two are mapped at a time; and
            how many tokens, bytes included.
        meanwhile: called while it trains, on one core for most of the time.
    """
    results = [paths[0].with_name(paths[0].name + ".merges") for paths, _ in samples]
    request = [[list(map(str, each[0])), each[1], str(result)] for each, result in zip(samples, results, strict=True)]
    try:
        with subprocess.Popen(
            [sys.executable, "-c", _TRAIN, json.dumps(request)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                meanwhile()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            return None
        pairs = [json.loads(result.read_bytes()) for result in results]
    finally:
        for result in results:
            result.unlink(missing_ok=True)
    return [[(bytes.fromhex(left), bytes.fromhex(right)) for left, right in each] for each in pairs]


def some_of(texts: Sequence[bytes]) -> list[bytes]:
    """Beginnings of texts from all over these, for comparing the two libraries on."""
    some = [text[:_COMPARED_BYTES].decode(errors="ignore").encode() for text in texts[:: max(1, len(texts) // _COMPARED)]]
    return [text for text in some if text]
