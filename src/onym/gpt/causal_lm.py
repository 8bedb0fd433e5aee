"""What both models share: the way from token ids through blocks to logits or a loss, and a head that computes with whole tiles.

A model says how tokens are embedded and what its blocks have to know of positions; everything that training, generating and
converting ask of a model is here. Models know nothing of training, files or devices: parameters stay in whatever dtype they
were made (fp32 when training), and the caller chooses the compute dtype with ``torch.autocast``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onym.gpt.attention import Cache, KVCache
from onym.gpt.config import ModelConfig
from onym.gpt.documents import positions_of
from onym.gpt.head_loss import IGNORED_TARGET, chunk_rows, head_loss
from onym.gpt.meta import no_values

# Matrix units work on tiles: on an A100 a head of 50304 rows instead of 50257 trains 14 % faster (the book's ladder).
HEAD_MULTIPLE = 64


class Head(nn.Linear):
    """The output head: a linear layer that computes with its rows padded to a multiple of ``HEAD_MULTIPLE``.

    The padding exists only inside the product. The parameter, its gradient, the optimizer's state and every file have one
    row a token, so nothing downstream needs to know of it; compiled, it is part of the cast to the compute dtype. A few rows
    alone, as in generating, are not worth the copy.
    """

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, emb] -> [batch, time, vocab]
        padding = self.padded_to - self.out_features
        if not padding or x.shape[:-1].numel() < HEAD_MULTIPLE:
            return super().forward(x)
        return F.linear(x, F.pad(self.weight, (0, 0, 0, padding)))[..., : self.out_features]

    @property
    def padded_to(self) -> int:
        """Rows in the product."""
        return -(-self.out_features // HEAD_MULTIPLE) * HEAD_MULTIPLE


def new_head(config: ModelConfig) -> nn.Linear:
    """The head of a language model, with a row for each token, or of a classifier, with one for each label."""
    if config.labels:
        return nn.Linear(config.emb_dim, len(config.labels), bias=config.head_bias)
    return Head(config.emb_dim, config.vocab_size, bias=False)


class CausalLM(nn.Module):
    """A decoder-only transformer: :class:`onym.GPT` or :class:`onym.Decoder`.

    A subclass makes the modules ``tok_emb``, ``trf_blocks``, ``final_norm`` and ``out_head``, calls :meth:`_complete`, and has
    :meth:`embed` and :meth:`reset_parameters`. Its blocks are called as ``block(x, cache, documents, *per_position)``.
    """

    config: Any
    tok_emb: nn.Embedding
    trf_blocks: nn.ModuleList
    final_norm: nn.Module
    out_head: nn.Module
    residual_outputs: ClassVar[tuple[str, ...]]
    """The ends of the names of the layers that write to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        """Whether blocks store their inputs alone for the backward pass: less memory, a third more work."""
        self.class_weights: Tensor | None = None
        """[labels] fp32: how much each label counts in a classifier's loss while it trains; None where all count the same."""

    def _complete(self) -> None:
        self.reset_parameters()
        if self.config.tie_embeddings:
            self.out_head.weight = self.tok_emb.weight
            self.register_load_state_dict_pre_hook(_complete_tie)  # type: ignore[no-untyped-call]

    @classmethod
    def without_values(cls, config: Any) -> Self:
        """A model on the meta device: names and shapes without values, to load into or to count."""
        with no_values():
            return cls(config)

    def reset_parameters(self, part: nn.Module | None = None) -> None:
        """Draw first weights: N(0, 0.02), biases 0, norms 1, and the layers that write to the residual stream scaled down by
        the square root of their number, so that its variance does not grow with depth (GPT-2's initialisation).

        Args:
            part: one of the modules alone, by default all.
        """
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, module in (part or self).named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(self.residual_outputs) else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()

    @torch.no_grad()
    def zero_residual_outputs(self) -> None:
        """Set the layers that write to the residual stream to zero, so that each block begins as the identity."""
        for name, parameter in self.named_parameters():
            if name.endswith(tuple(f"{end}.weight" for end in self.residual_outputs)):
                parameter.zero_()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [batch, time] at positions [time] or [batch, time] -> [batch, time, emb]."""
        raise NotImplementedError

    def per_position(self, positions: Tensor) -> tuple[Any, ...]:
        """What every block has to know of the positions [time] or [batch, time]."""
        return ()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            tokens: [batch, time] int64, time at most ``context_length`` (with a cache: less what it already holds).
            targets: [batch, time] int64, the token that follows each, of a classifier the label of the text that ends there;
                -100 where it does not count.
            cache: keys and values of the tokens before these; extended in place.
            documents: [batch, time] int64, the number of the document that each token belongs to within its row,
                non-decreasing (:func:`onym.gpt.documents.documents_of`): a token attends to its own document alone, at its
                position in that. Not together with a cache, which holds one document.

        Returns:
            Logits [batch, time, vocab] in the compute dtype, of a classifier [batch, time, labels]; with targets, the mean
            cross-entropy in nats, a 0-d fp32 tensor.
        """
        x = self.hidden_states(tokens, cache, documents)
        if targets is None:
            return self.out_head(x)  # type: ignore[no-any-return]
        return self._loss(x.flatten(0, 1), targets.flatten())

    def hidden_states(self, tokens: Tensor, cache: Cache | None = None, documents: Tensor | None = None) -> Tensor:
        """What the head is given: [batch, time, emb], of the arguments of :meth:`forward`."""
        x, known = self._embedded(tokens, cache, documents)
        for block in self.trf_blocks:
            if self.recompute_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, None, documents, *known, use_reentrant=False)
            else:
                x = block(x, cache, documents, *known)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.final_norm(x)  # type: ignore[no-any-return]

    def _embedded(self, tokens: Tensor, cache: Cache | None, documents: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
        if cache is not None:
            if documents is not None:
                raise ValueError("A cache holds one document: pass documents, or a cache, not both.")
            positions = cache.positions(tokens.shape[1])
        elif (end := tokens.shape[1]) > self.config.context_length:
            raise ValueError(
                f"{end} tokens do not fit a context of {self.config.context_length}: "
                "pass the last ones only, or use onym.generate, which slides."
            )
        else:
            positions = torch.arange(end, device=tokens.device) if documents is None else positions_of(documents)
        return self.embed(tokens, positions), self.per_position(positions)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:  # [tokens, emb], [tokens] -> []
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        head = self.out_head  # a classifier's is none of ours
        if isinstance(head, Head) and chunk_rows(x.shape[0], head.padded_to, x.dtype, x.device) < x.shape[0]:
            return head_loss(x, head.weight, targets, head.padded_to)
        weights = self.class_weights if self.training else None
        return F.cross_entropy(head(x).float(), targets, weights, ignore_index=IGNORED_TARGET)

    def new_cache(self, batch_size: int = 1, device: torch.device | None = None, capacity: int | None = None) -> KVCache:
        """An empty cache for ``batch_size`` sequences, in the dtype of the parameters, and where they are by default.

        Args:
            capacity: tokens that it holds, ``context_length`` by default.
        """
        weight = self.tok_emb.weight
        return KVCache(self.config, batch_size, device or weight.device, weight.dtype, capacity)


def _complete_tie(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A tied matrix is stored once, under either name; let a strict load find it under both."""
    embedding, head = f"{prefix}tok_emb.weight", f"{prefix}out_head.weight"
    if embedding in state:
        state.setdefault(head, state[embedding])
    elif head in state:
        state[embedding] = state[head]


_complete_tie.changes_the_dict_alone = True  # type: ignore[attr-defined]  # see onym.state.model
