"""A model for EleutherAI's lm-evaluation-harness: ``python -m onym.tools.lm_eval --model onym --model_args path=RUN``.

lm-eval (0.4.13) looks for models in its own registry alone, and has no entry point for those of others. So this module
registers ``onym`` and then runs lm-eval's command, with all of its options; a program of one's own imports the module instead.

Log-likelihoods are those of lm-eval's ``hf`` model on the folder that ``onym convert --to huggingface`` writes, where both take
end-of-text as the prefix of an empty context: the same tokens, the same windows, the last of which is as long as the others.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onym.errors import ConfigError, OnymError
from onym.generation.engine import Engine, Request
from onym.generation.opening import open_model
from onym.generation.sampling import Sampling
from onym.generation.scoring import Progress, log_likelihoods
from onym.generation.write import write

_MISSING = "lm-eval is not installed: pip install 'onym[eval]'."

try:
    import lm_eval.models  # registers its own models, which it later does only where there is none  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(f"onym: {_MISSING}")
    raise ConfigError(_MISSING) from error

_BATCH_SIZE = 8  # for lm-eval's "auto"
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call it, in lm-eval's order


@register_model("onym")
class OnymLM(TemplateLM):  # type: ignore[misc]
    """A GPT that Onym opens, as lm-eval asks it.

    Args:
        path: a run, a checkpoint, a model folder or file, Onym's or another program's.
        step: of a run, ``latest``, a number, or the name of a pinned one.
        tokenizer: a tokenizer.json or hub name, instead of the one in the model's folder.
        part, n_heads, rope_base, context_length: as of ``onym generate``, for what a file does not say.
        batch_size: windows that are computed at once.
        device: cpu, cuda, cuda:1, mps.
    """

    def __init__(
        self,
        path: str,
        step: int | str = "latest",
        tokenizer: str | None = None,
        part: str | None = None,
        n_heads: int | None = None,
        rope_base: float | None = None,
        context_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        settings = {"n_heads": n_heads, "rope_base": rope_base, "context_length": context_length}
        # lm-eval asks for a GPU where no device was given; without one its own class takes the CPU too.
        has_none = str(device).startswith("cuda") and not torch.cuda.is_available()
        self._device = torch.device("cpu" if device is None or has_none else device)
        self._model, self._tokenizer, _ = open_model(
            str(path), step=step, part=part, settings=settings, tokenizer=tokenizer, device=self._device
        )
        self._path = str(path)
        size = str(batch_size)
        self.batch_size = int(size) if size.isdecimal() else _BATCH_SIZE

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and that goes before one."""
        return self._tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return int(self._model.config.context_length)

    @property
    def max_gen_toks(self) -> int:
        """Tokens to write where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its caches by."""
        return self._path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, without any special token."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods([(context, tokens) for _, context, tokens in requests], disable_tqdm)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text; windows do not overlap, as lm-eval has it, but for the last one."""
        texts = [request.args[0] for request in requests]
        pairs = [([self.prefix_token_id], self.tok_encode(text)) for text in texts]
        found = [value for value, _ in self._likelihoods(pairs, disable_tqdm)]
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        with tqdm(total=sum(len(tokens) for _, tokens in pairs), unit=" tokens", disable=quiet) as bar:
            progress: Progress = lambda done, _: bar.update(done - bar.n)  # noqa: E731
            found = log_likelihoods(self._model, pairs, stride=self.max_length, batch_size=self.batch_size, progress=progress)
        return [(each.log_likelihood, each.greedy) for each in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop sequences, which is not part of the text."""
        asked = [self._request(*request.args) for request in requests]
        written = [""] * len(asked)
        with tqdm(total=len(asked), disable=disable_tqdm) as bar:
            for token in write(self._engine, self._tokenizer, asked):
                written[token.request] += token.text
                bar.update(token.finish is not None)
        for request, text in zip(requests, written, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return written

    @functools.cached_property
    def _engine(self) -> Engine:
        # In fp32, as the log-likelihoods, and as lm-eval's hf has it by default on a CPU.
        return Engine(self._model, slots=self.batch_size, dtype="fp32", note=lambda text: print(text, file=sys.stderr))

    def _request(self, context: str, how: Mapping[str, Any]) -> Request:
        sampling, stops, count = _how(how, self.max_gen_toks)
        room = self.max_length - count  # for the context, as lm-eval's hf has it; where nothing is left, the engine slides
        prompt = self.tok_encode(context)[-(room if room > 0 else max(1, self.max_length // 2)) :] or [self.eot_token_id]
        seed = int(torch.randint(2**31, ())) if sampling.temperature else None  # from lm-eval's --seed
        return Request(prompt, count, sampling, seed, stops, (self.eot_token_id,))


def _how(given: Mapping[str, Any], count: int) -> tuple[Sampling, list[str], int]:
    """How to sample, where to stop, and how many tokens to write at most.

    Raises:
        ConfigError: the task asks for something that is not known here.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    counts = [left.pop(name) for name in _COUNTS if left.get(name) is not None]
    temperature, samples = left.pop("temperature", None), left.pop("do_sample", None)
    samples = bool(temperature) if samples is None else samples
    chosen = 0.0 if not samples else 1.0 if temperature is None else float(temperature)
    sampling = Sampling(chosen, int(left.pop("top_k", 0) or 0), float(left.pop("top_p", 1.0)))
    if left:
        raise ConfigError(f"The task asks to generate with {', '.join(sorted(left))}, which onym's model does not know.")
    return sampling, stops, int(counts[0]) if counts else count


def main() -> int:
    """lm-eval's command, which knows ``--model onym``."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OnymError as error:
        print(f"onym: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
