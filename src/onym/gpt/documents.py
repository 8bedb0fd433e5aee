"""Documents in one row that do not see each other: which token belongs to which, their positions, and their attention.

A row of training is a window of the token stream, in which documents follow each other, each with an end-of-text token at its
end. Without a mask a token attends to the documents before its own too. With ``GPT.forward(..., documents=...)`` it attends to
the earlier tokens of its own document alone, at the positions that the document has by itself; so a row gives the losses and
the gradients of its documents computed one by one.

Where the documents of a row are not texts that end with a token of their own (conversations, in which that token may occur
earlier), their boundaries are marked in the inputs: a document's first token is stored as its complement, ``~token``, which is
negative.

Everything here has the shape of the batch, never the number of documents, so a compiled model is compiled once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onym.gpt.head_loss import IGNORED_TARGET

Kernel = Literal["squares", "sdpa", "flex"]
"""How attention is computed; see :func:`kernel_for`."""
# Tokens up to which compiled attention on a CPU multiplies whole squares: PyTorch's flash attention works through tiles there,
# on the way back at a quarter of the machine's speed. At 256 tokens a step takes 10 % less.
_WHOLE_SQUARES = 256
MARKED = -1
"""In place of the token that ends each document: boundaries are marked in the inputs."""
_BLOCK = 128  # tokens in a block of flex_attention's mask; torch's default
_LEAST_HEAD_DIM = 16  # of Inductor's kernel for flex_attention


def documents_of(tokens: Tensor, end_of_text: int) -> Tensor:
    """The number of the document that each token belongs to within its row; an end-of-text token belongs to the one it ends.

    Args:
        tokens: [batch, time] int64.

    Returns:
        [batch, time] int64, from 0, non-decreasing.

    >>> documents_of(torch.tensor([[5, 6, 0, 7, 0, 0, 8]]), end_of_text=0).tolist()
    [[0, 0, 0, 1, 1, 2, 3]]
    """
    ends = (tokens == end_of_text).long()
    return ends.cumsum(dim=1) - ends


def targets_within(tokens: Tensor, targets: Tensor, end_of_text: int) -> Tensor:
    """The targets less those of end-of-text tokens: what follows is another document's first token, and does not count.

    Args:
        tokens, targets: [batch, time] int64.
    """
    return targets.masked_fill(tokens == end_of_text, IGNORED_TARGET)


def unmarked(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, and the number of the document that each belongs to within its row, from inputs with marked boundaries.

    Args:
        inputs: [batch, time] int64, a document's first token as its complement.

    Returns:
        Both [batch, time] int64, the second non-decreasing.

    >>> unmarked(torch.tensor([[~5, 6, ~0, 7]]))
    (tensor([[5, 6, 0, 7]]), tensor([[1, 1, 2, 2]]))
    """
    first = inputs < 0
    return torch.where(first, ~inputs, inputs), first.long().cumsum(dim=1)


def separated(inputs: Tensor, targets: Tensor, separator: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, the targets that count, and the documents of a batch; arguments as of :func:`loss_of`."""
    if separator is None:
        return inputs, targets, None
    if separator == MARKED:
        tokens, documents = unmarked(inputs)
        return tokens, targets, documents
    return inputs, targets_within(inputs, targets, separator), documents_of(inputs, separator)


def counted(inputs: Tensor, targets: Tensor, separator: int | None) -> Tensor:
    """How many targets count, a 0-d int64 tensor; arguments as of :func:`loss_of`."""
    return (separated(inputs, targets, separator)[1] != IGNORED_TARGET).sum()


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor, separator: int | None) -> Tensor:
    """The mean loss of a batch, a 0-d fp32 tensor.

    Args:
        model: called as a :class:`onym.GPT`.
        inputs, targets: [batch, time] int64.
        separator: the token that ends each document of a row, which are kept apart; :data:`MARKED` where the inputs mark where
            they begin; None where they see each other.
    """
    tokens, targets, documents = separated(inputs, targets, separator)
    loss: Tensor = model(tokens, targets) if documents is None else model(tokens, targets, documents=documents)
    return loss


def positions_of(documents: Tensor) -> Tensor:
    """The position of each token within its document.

    Args:
        documents: [batch, time] int64, as :func:`documents_of` gives them.

    Returns:
        [batch, time] int64.

    >>> positions_of(torch.tensor([[0, 0, 0, 1, 1, 2, 3]])).tolist()
    [[0, 1, 2, 0, 1, 0, 0]]
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def kernel_for(device: str, time: int, head_dim: int, dropout: float, *, compiling: bool, documents: bool) -> Kernel:
    """What computes attention fastest, by the device's type and by whether the compiler is tracing it.

    Returns:
        ``"squares"``: the formula, for the compiler to fuse; ``"sdpa"``: F.scaled_dot_product_attention; ``"flex"``:
        flex_attention, which skips blocks of tokens that do not see each other. It is slow where it is not compiled, and has
        no dropout.
    """
    if compiling and device == "cpu" and time <= _WHOLE_SQUARES:
        return "squares"
    # Of fewer tokens than a block, there is none to skip, and torch takes a kernel that is made for one token.
    if compiling and documents and device == "cuda" and dropout == 0 and head_dim >= _LEAST_HEAD_DIM and time >= _BLOCK:
        return "flex"
    return "sdpa"


def causal_in_documents(documents: Tensor) -> Tensor:
    """Which tokens (last dimension) each token (the one before) attends to.

    Args:
        documents: [batch, time] int64.

    Returns:
        [batch, 1, time, time] bool.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def flex_attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Causal attention within documents by flex_attention; each of [batch, heads, time, head_dim].

    The block mask is made here, from tensors alone, within what the compiler traces: it is a function of the documents like
    any other, also in a block that is compiled by itself or recomputed. torch's create_block_mask looks at each pair of tokens,
    and cannot be traced within torch.utils.checkpoint (torch 2.13).
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # takes a second

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    time = documents.shape[1]
    partial, full = _visible_blocks(documents)
    mask = BlockMask.from_kv_blocks(
        *_in_order(partial), *_in_order(full), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(time, time)
    )
    result: Tensor = flex_attention(q, k, v, block_mask=mask)
    return result


def _visible_blocks(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of keys (last dimension) some, and which all, tokens of a block of queries (the one before) attend to.

    Numbers of documents do not decrease, so the first and the last token of a block say enough.

    Returns:
        partial, full: [batch, 1, blocks, blocks] bool; no block is both.
    """
    time = documents.shape[1]
    starts = torch.arange(0, time, _BLOCK, device=documents.device)
    first, last = documents[:, starts], documents[:, (starts + _BLOCK - 1).clamp(max=time - 1)]  # [batch, blocks]
    index = torch.arange(starts.shape[0], device=documents.device)
    before, diagonal = index[None, :] < index[:, None], index[None, :] == index[:, None]  # [blocks, blocks]
    some = diagonal | (before & (first[:, :, None] == last[:, None, :]))
    complete = (starts + _BLOCK <= time)[:, None]  # a block of queries that the row's end cuts off counts as partial
    every = before & complete & (last[:, :, None] == first[:, None, :])
    return (some & ~every)[:, None], every[:, None]


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers with those first: the format of a BlockMask."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), numbers.int()
