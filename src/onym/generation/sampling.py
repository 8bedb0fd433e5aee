"""From logits to the next token.

Everything is done to one row at a time, and each draw takes one number of the request's own generator: what a text becomes
does not depend on what is written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onym.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIXES = (512, 4096)
"""How many of the likeliest tokens a nucleus is looked for among on a CPU, before all are ordered: 0.1, 0.7 and 3.7 ms of
50,257. On a GPU each look would wait for it, and ordering all takes less."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8
    """Below 1 sharper, above 1 more varied; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (nucleus sampling); 1 for all."""
    min_p: float = 0.0
    """Choose among tokens at least this many times as likely as the likeliest; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and text become less likely: their logits are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that was written already, however often."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of each token, as often as it was written already."""

    def check(self) -> None:
        """Raise a ConfigError for a value out of its range."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature must be 0 or more, not {self.temperature}.")
        if self.top_k < 0:
            raise ConfigError(f"--top-k must be 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min-p must be from 0 to 1, not {self.min_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"--repetition-penalty must be above 0 (1 for none), not {self.repetition_penalty}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(value := getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')} must be a number, not {value}.")

    @property
    def penalises(self) -> bool:
        """Whether it matters what was written before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def penalised(
    logits: Tensor, sampling: Sampling, prompt: Iterable[int], written: Mapping[int, int], bias: Mapping[int, float]
) -> Tensor:
    """Logits after penalties and biases.

    Args:
        logits: [vocab]; not changed.
        prompt: its tokens, for the repetition penalty alone.
        written: how often each token was written so far.
        bias: added to the logits of these tokens.

    Returns:
        [vocab]; ``logits`` themselves where nothing is to be done, else none of them is NaN or inf.
    """
    import torch

    if not bias and not sampling.penalises:
        return logits
    logits = logits.clone()
    if bias:
        logits[list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    if sampling.repetition_penalty != 1 and (seen := sorted({*prompt, *written})):
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if written and (sampling.presence_penalty or sampling.frequency_penalty):
        times = torch.tensor(list(written.values()), device=logits.device)
        logits[list(written)] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return logits.nan_to_num_(nan=-math.inf, posinf=torch.finfo(logits.dtype).max, neginf=-math.inf)


def choose(logits: Tensor, sampling: Sampling, uniform: float) -> Tensor:
    """Draw one token, a 0-d int64 tensor where the logits are: nothing waits for a GPU.

    Args:
        logits: [vocab] fp32; the result of one that is NaN or infinite has no meaning.
        sampling: how.
        uniform: from [0, 1), which decides; of no matter at temperature 0.
    """
    largest, likeliest = logits.max(dim=-1)
    if sampling.temperature == 0:
        return likeliest
    tokens, weights = _candidates(logits, largest, sampling)
    reached = weights.cumsum(dim=-1)
    # Towards the first token whose sum is above: one of weight 0 is never taken.
    wanted = (reached[-1].double() * uniform).long().minimum(reached[-1] - 1)
    index = (reached <= wanted).sum().clamp(max=len(weights) - 1)  # which it is above for a NaN alone
    return index if tokens is None else tokens.gather(0, index[None])[0]


def _candidates(logits: Tensor, largest: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """The tokens among which one is drawn (None: all, in their order) and their probabilities, up to a factor.

    They are whole numbers: their sums are the same in whatever order a GPU adds them. The likeliest token's is as large as
    leaves room for the sum of all in an int64, so that of 50,257 tokens those 7e13 times less likely have none.
    """
    import torch

    unit = 2.0 ** (62 - len(logits).bit_length())
    # Below the largest, so that a tiny temperature leads to 0 and never to a NaN.
    weights = logits.to(torch.float64, copy=True).sub_(largest).div_(max(sampling.temperature, 1e-30)).exp_().mul_(unit)
    limit = sampling.top_k if 0 < sampling.top_k < len(weights) else len(weights)
    least = math.ceil(sampling.min_p * unit)
    if limit == len(weights) and sampling.top_p == 1:
        return None, (weights.where(weights >= least, 0) if least else weights).long()
    looking = [] if logits.device.type != "cpu" else [size for size in _PREFIXES if size < limit == len(weights)]
    for size in [*looking, limit]:
        values, tokens = weights.topk(size)
        ordered = values.long()
        reached = ordered.cumsum(dim=-1)
        enough = ((reached[-1] if size == limit else weights.long().sum()).double() * sampling.top_p).ceil().long()
        if size == limit or bool(reached[-1] >= enough):
            break
    # A token stays when those before it have not reached top_p yet; so the first one always does.
    stays = (reached - ordered < enough) & (ordered >= least)
    return tokens, ordered.where(stays, 0)
