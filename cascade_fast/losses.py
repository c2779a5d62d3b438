"""Cross-entropy over a vocabulary without ever holding all logits.

The logits of a chunk of tokens are made, used for the loss, turned into their own gradient in place and multiplied
back into the gradient of the hidden states before the next chunk is begun; so the extra memory is one chunk's,
whatever the batch. The idea is that of Liger's fused linear cross-entropy and of cut-cross-entropy
(arXiv 2411.09009); softmax and loss are computed in float32 (:func:`cascade_fast.ops.cross_entropy_`).

Shape legend: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cascade_fast import ops
from cascade_fast.runtime.compute import PADDED_TO, padded_rows

LARGEST_LOSS = 700.0  # nats; exp(710) is no float
CHUNK_BYTES = 48 * 2**20  # of logits: 512 tokens of a vocabulary of 49,152 in 16 bit
# Of d loss_sum / d logits in float16, where probabilities below 3e-8 / scale are 0. What is lost has one sign and adds
# up over a batch. Products with the head are at most twice its largest weight times this: finite for weights up to 127.
FLOAT16_SCALE = 256.0
SPARE = 0.25  # of a chunk: on the CPU so many tokens too many go at once all the same, as two halves would take longer


def perplexity(mean_loss: float | Tensor) -> float:
    """``exp`` of a mean cross-entropy in nats, as a number (0-d tensor: float64); above 700 as of 700, NaN as NaN."""
    if isinstance(mean_loss, Tensor):  # torch's exp and Python's may differ in the last bit: each stays what it was
        return mean_loss.clamp(max=LARGEST_LOSS).exp().item()
    return math.exp(min(mean_loss, LARGEST_LOSS))


def chunk_tokens(vocab_size: int, dtype: torch.dtype) -> int:
    """How many tokens' logits fit in ``CHUNK_BYTES``."""
    return max(16, CHUNK_BYTES // (dtype.itemsize * vocab_size))


def _logit_chunks(hidden_ND: Tensor, head_VD: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``(rows, hidden_CD, logits_CV)`` chunk by chunk, in the head's dtype; all chunks use the same memory."""
    n, vocab_size = hidden_ND.shape[0], head_VD.shape[0]
    spare = SPARE if head_VD.device.type == "cpu" else 0.0
    chunks = max(1, math.ceil(n / chunk_tokens(vocab_size, head_VD.dtype) - spare))
    step = max(1, math.ceil(n / chunks))  # chunks of about one size: a last one of two rows would cost as much as many
    room_CV = head_VD.new_empty(min(step, n) + _padding(min(step, n), head_VD), vocab_size)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        hidden_CD = hidden_ND[rows].to(head_VD.dtype)
        padded_CD = padded_rows(hidden_CD) if _padding(len(hidden_CD), head_VD) else hidden_CD
        logits_CV = torch.mm(padded_CD, head_VD.T, out=room_CV[: padded_CD.shape[0]])
        yield rows, hidden_CD, logits_CV[: hidden_CD.shape[0]]


def _padding(rows: int, head_VD: Tensor) -> int:
    """Rows to add, so that products of 16 bit on the CPU have sizes that come again: see :func:`padded_rows`."""
    return -rows % PADDED_TO if head_VD.dtype != torch.float32 and head_VD.device.type == "cpu" else 0


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, dtype: torch.dtype, count: Tensor | None
    ) -> Tensor:
        n = hidden_ND.shape[0] if count is None else count
        left_out_N1 = None
        if count is not None:  # their hidden states of zero leave the head's gradient as it is
            left_out_N1 = (torch.arange(len(hidden_ND), device=hidden_ND.device) >= count)[:, None]
            hidden_ND = hidden_ND.masked_fill(left_out_N1, 0.0)
        head_VD = weight_VD.detach().to(dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        with_grad = grad_hidden_ND is not None or grad_weight_VD is not None
        # A sum over tokens, as the head's gradient is, has no bound that leaves room for a factor.
        scale = FLOAT16_SCALE if dtype == torch.float16 and grad_weight_VD is None else 1.0
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for rows, hidden_CD, logits_CV in _logit_chunks(hidden_ND.detach(), head_VD):
            loss_C, _ = ops.cross_entropy_(logits_CV, labels_N[rows], grad=with_grad, scale=scale)
            if left_out_N1 is not None:
                loss_C = loss_C.masked_fill(left_out_N1[rows, 0], 0.0)
            loss_sum += loss_C.sum()
            # Now scale * d loss_sum / d logits. The 1/N of the mean comes in float32 at the end: in float16 it would
            # push small probabilities below the smallest number.
            grad_CV = logits_CV
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = _times_head(grad_CV, head_VD)
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV.T, hidden_CD, first=rows.start == 0)
        if left_out_N1 is not None and grad_hidden_ND is not None:
            grad_hidden_ND.masked_fill_(left_out_N1, 0.0)
        ctx.grads = grad_hidden_ND, grad_weight_VD
        ctx.divisor = n * scale
        return loss_sum / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad_hidden_ND, grad_weight_VD = ctx.grads
        scale = grad / ctx.divisor
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND.mul_(scale)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(scale)
        ctx.grads = None
        return grad_hidden_ND, grad_weight_VD, None, None, None


def _times_head(grad_CV: Tensor, head_VD: Tensor) -> Tensor:
    """``grad @ head``, with the rows of the memory behind ``grad`` that :func:`_logit_chunks` has padded it by."""
    count = grad_CV.shape[0]
    padded_CV = grad_CV.as_strided((count + _padding(count, head_VD), grad_CV.shape[1]), grad_CV.stride())
    return (padded_CV @ head_VD)[:count]


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``out += a @ b``, or ``out = a @ b`` the first time, without a copy where the dtypes agree."""
    if out.dtype != a.dtype:
        product = (a @ b).to(out.dtype)
        _ = out.copy_(product) if first else out.add_(product)
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    count: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden @ weight.T)`` against ``labels``, as a float32 scalar.

    Args:
        hidden_ND: ``(N, D)`` float, N >= 1.
        weight_VD: ``(V, D)`` output head; gets a gradient only if it requires one.
        labels_N: ``(N,)`` int64 in ``[0, V)``.
        dtype: of the matrix products.
        count: how many of the N count, from the first on, as a 0-dimensional float32 tensor; the others have no
            influence. By default all of them do.

    The gradients are made in the forward pass and handed out once: a second backward is an error.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, dtype, count)


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    score: Callable[[slice, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token and entropy of its logits, both ``(N,)`` float32 in nats; logits in chunks.

    With ``score``, its ``score(rows, logits_CV, entropy_C) -> (C,)`` of every chunk takes the place of the entropy. The
    memory of the logits is used again for the next chunk.
    """
    loss_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    score_N = torch.empty_like(loss_N)
    for rows, _, logits_CV in _logit_chunks(hidden_ND, weight_VD.to(dtype)):
        loss_N[rows], entropy_C = ops.cross_entropy_(logits_CV, labels_N[rows])
        score_N[rows] = entropy_C if score is None else score(rows, logits_CV, entropy_C)
    return loss_N, score_N
