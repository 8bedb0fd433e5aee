"""The output head and the cross-entropy in one, without all the logits at once.

For 2,048 tokens and a vocabulary of 50,304, logits take 200 MB in bf16 and 400 MB more in fp32, and a step walks over them
several times. Here they exist for a few hundred tokens at a time:

    for each chunk of tokens:
        logits = x W^T                      into one buffer, again and again
        loss, and logits := softmax(logits) - onehot(targets)       in place, one kernel where compiled
        dx = logits W,  dW += logits^T x    dW is summed up in the weight's own dtype

The gradients are made on the way forward, because the loss needs nothing from what follows: backward only scales them. So the
logits are computed once, not twice as with checkpointing. The idea is that of Liger's and Apple's fused linear cross-entropy
(Hsu et al., 2024; Wijmans et al., 2024).

It is an opaque custom op: Inductor would otherwise materialise all chunks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_TARGET = -100
"""A target that does not count in the loss; PyTorch's own default."""

# Logits that exist at once. Fewer would stay in the cache, but dW is read and written once a chunk: at 64 MiB that is 3 % of
# the products' time on two cores. A GPU needs more rows to be busy.
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_ON_GPUS = 512 << 20
_BLOCK_ROWS = 4096  # of dW at once on a CPU: a product's result is in the cache when it is added
# fp16 has no room for a probability divided by all tokens: gradients are kept at this size instead, where sums over a chunk fit
# too, and divided on the way back, together with the factor of the gradient scaler.
_SHARE_IN_FP16, _SUM_IN_FP16 = 2.0**-4, 2.0**9
_EAGER_ROWS = {"cpu": 64}  # of a chunk, where no kernel was compiled: fp32 copies stay small
_EAGER_ROWS_ON_GPUS = 1024  # of which fewer would be small kernels by the thousand


def chunk_rows(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose logits exist at once: all of them where they are few, else an even share.

    >>> chunk_rows(2048, 50304, torch.bfloat16, torch.device("cpu"))
    512
    """
    most = max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ON_GPUS) // (vocabulary * dtype.itemsize))
    if tokens <= most:
        return tokens
    # A divisor, so that all chunks have one shape, and a kernel for it is compiled once.
    return next(rows for rows in range(most, 0, -1) if tokens % rows == 0 or 2 * rows <= most)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, padded_to: int) -> Tensor:
    """Mean cross-entropy of ``x W^T``, in nats, a 0-d fp32 tensor (fp64 of fp64).

    Args:
        x: [tokens, emb], of the dtype that products are computed in.
        weight: [vocab, emb], of any floating dtype; its gradient has the same.
        targets: [tokens] int64; -100 does not count.
        padded_to: rows of the weight in a product, the further ones zeros.
    """
    rows = chunk_rows(x.shape[0], padded_to, x.dtype, x.device)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        wanted = weight.requires_grad
        loss: Tensor = _loss_and_gradients(x, weight, targets, rows, padded_to, wanted, torch.compiler.is_compiling())[0]
        return loss
    product = _padded(weight, padded_to, x.dtype)
    total = x.new_zeros((), dtype=_of_sums(x.dtype))
    for chunk, goals in zip(x.split(rows), targets.split(rows), strict=True):
        logits = F.linear(chunk, product)[:, : weight.shape[0]]
        total += F.cross_entropy(logits.to(total.dtype), goals, ignore_index=IGNORED_TARGET, reduction="sum")
    return total / (targets != IGNORED_TARGET).sum()


@torch.library.custom_op("onym::head_loss", mutates_args=())
def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, padded_to: int, of_weight: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dx, dW where ``of_weight`` (else empty, which saves a third of the work), and the factor of both."""
    vocabulary, on_cpu = weight.shape[0], x.device.type == "cpu"
    product = _padded(weight, padded_to, x.dtype)
    block = _BLOCK_ROWS if on_cpu else vocabulary
    dx, dw = torch.empty_like(x), _gradient_of(weight, of_weight)
    logits = x.new_empty((rows, padded_to))
    share = 1 / (targets != IGNORED_TARGET).sum().to(_of_sums(x.dtype))  # infinite, as the mean of nothing, where none counts
    small, factor = share, torch.ones_like(share)
    if x.dtype == torch.float16:
        kept = min(_SHARE_IN_FP16, _SUM_IN_FP16 / rows)
        # Where no target counts, all gradients are zero.
        small, factor = torch.full_like(share, kept), torch.where(share.isinf(), 1.0, share / kept)
    total = torch.zeros_like(share)
    step = _compiled_step() if compiled else _eager_step
    for start in range(0, x.shape[0], rows):
        chunk, goals = x[start : start + rows], targets[start : start + rows]
        part = logits[: chunk.shape[0]]
        torch.mm(chunk, product.t(), out=part)
        total += step(part[:, :vocabulary], goals, small)
        torch.mm(part, product, out=dx[start : start + rows])
        for row in range(0, vocabulary if of_weight else 0, block):
            summand = part[:, row : min(row + block, vocabulary)].t() @ chunk
            if start == 0:
                dw[row : row + block].copy_(summand)
            else:
                dw[row : row + block].add_(summand)
    return total * share, dx, dw, factor


@_loss_and_gradients.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, padded_to: int, of_weight: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=_of_sums(x.dtype))
    return loss, torch.empty_like(x), _gradient_of(weight, of_weight), torch.empty_like(loss)


def _gradient_of(weight: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return weight.new_empty(0)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.of_weight = inputs[5]
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, factor = ctx.saved_tensors
    factor = of_loss * factor

    def scaled(gradient: Tensor) -> Tensor:
        # A GPU would round a factor of 65536 to fp16 first, where it is infinite.
        wide = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
        result: Tensor = (gradient.to(wide) * factor).to(gradient.dtype)
        return result

    return scaled(dx), scaled(dw) if ctx.of_weight else None, None, None, None, None, None


_loss_and_gradients.register_autograd(_scale, setup_context=_keep)


def _of_sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padded(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The weight as a product takes it: cast, with rows of zeros after the last."""
    if rows == weight.shape[0]:
        return weight.detach().to(dtype)
    padded = weight.new_zeros((rows, weight.shape[1]), dtype=dtype)
    padded[: weight.shape[0]] = weight.detach()
    return padded


def _step(logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """Logits [rows, vocab] become, in place, their loss's gradient; returns the sum of the rows' losses."""
    exact = logits.to(share.dtype)
    log_sums = exact.logsumexp(dim=1, keepdim=True)
    counts = targets[:, None] != IGNORED_TARGET
    wanted = exact.gather(1, targets[:, None].clamp(min=0))
    loss = torch.where(counts, log_sums - wanted, 0).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device)[None, :] == targets[:, None]
    gradient = torch.where(counts, ((exact - log_sums).exp() - is_target.to(exact.dtype)) * share, 0)
    logits.copy_(gradient)
    return loss


def _eager_step(logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    rows = _EAGER_ROWS.get(logits.device.type, _EAGER_ROWS_ON_GPUS)
    return torch.stack([_step(*part, share) for part in zip(logits.split(rows), targets.split(rows), strict=True)]).sum()


_compiled: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []


def _compiled_step() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Made when it is first wanted: importing the compiler takes a second."""
    if not _compiled:
        _compiled.append(torch.compile(_step, dynamic=False))
    return _compiled[0]
