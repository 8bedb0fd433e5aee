"""llama.cpp itself, as the wheel xllamacpp: a GGUF file, opened by its server, and asked over HTTP."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A server in this process, on one thread, which computes in fp32 what its default rounds to F16 (the cache, attention)."""

    def __init__(self, path: Path, context: int = 256) -> None:
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path = str(path)
        asked.n_ctx, asked.n_parallel, asked.port = context, 1, 0
        asked.warmup, asked.verbosity, asked.cpuparams.n_threads = False, 0, 1
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(asked)

    def ask(self, where: str, **what: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + where, json.dumps(what).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The tokens that it goes on with."""
        answer = self.ask("/completion", prompt=tokens, n_predict=count, temperature=0, return_tokens=True, ignore_eos=True)
        return answer["tokens"]

    def log_probabilities(self, tokens: list[int], vocabulary: int, ascii_token: int) -> list[float]:
        """Of every token as the next one. ``ascii_token`` is what it goes on with: half a character would be held back."""
        answer = self.ask(
            "/completion", prompt=tokens, n_predict=1, temperature=0, n_probs=vocabulary, logit_bias=[[ascii_token, 1000.0]]
        )
        (position,) = answer["completion_probabilities"]
        found = {each["id"]: each["logprob"] for each in position["top_logprobs"]}
        return [found[token] for token in range(vocabulary)]
