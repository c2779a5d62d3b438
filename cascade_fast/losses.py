"""Cross-entropy over a vocabulary without ever holding all logits.

The logits of a chunk of tokens are made, used for the loss, turned into their own gradient in place and multiplied
back into the gradient of the hidden states before the next chunk is begun; so the extra memory is one chunk's,
whatever the batch. The idea is that of Liger's fused linear cross-entropy and of cut-cross-entropy
(arXiv 2411.09009); softmax and loss are computed in float32.

Shape legend: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # of float32 logits


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens' float32 logits fit in ``CHUNK_BYTES``."""
    return max(16, CHUNK_BYTES // (4 * vocab_size))


def _chunks(n: int, vocab_size: int) -> Iterator[slice]:
    step = chunk_tokens(vocab_size)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, dtype: torch.dtype) -> Tensor:
        n = hidden_ND.shape[0]
        head_VD = weight_VD.detach().to(dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for chunk in _chunks(n, weight_VD.shape[0]):
            hidden_CD, labels_C1 = hidden_ND[chunk].to(dtype), labels_N[chunk, None]
            logits_CV = (hidden_CD @ head_VD.T).float()
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss_sum += (lse_C1 - logits_CV.gather(1, labels_C1)).sum()
            if grad_hidden_ND is None and grad_weight_VD is None:
                continue
            # d loss_sum / d logits = softmax - one_hot, in place. The 1/N of the mean comes in float32 at the end:
            # in float16 it would push small probabilities below the smallest number.
            grad_CV = logits_CV.sub_(lse_C1).exp_()
            grad_CV.scatter_add_(1, labels_C1, grad_CV.new_full(labels_C1.shape, -1.0))
            grad_CV = grad_CV.to(dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[chunk] = grad_CV @ head_VD
            if grad_weight_VD is not None:
                grad_weight_VD += (grad_CV.T @ hidden_CD).to(grad_weight_VD.dtype)
        ctx.grads = grad_hidden_ND, grad_weight_VD
        ctx.n = n
        return loss_sum / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad_hidden_ND, grad_weight_VD = ctx.grads
        scale = grad / ctx.n
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND.mul_(scale)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(scale)
        ctx.grads = None
        return grad_hidden_ND, grad_weight_VD, None, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden @ weight.T)`` against ``labels``, as a float32 scalar.

    Args:
        hidden_ND: ``(N, D)`` float, N >= 1.
        weight_VD: ``(V, D)`` output head; gets a gradient only if it requires one.
        labels_N: ``(N,)`` int64 in ``[0, V)``.
        dtype: of the matrix products.

    The gradients are made in the forward pass and handed out once: a second backward is an error.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, dtype)


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token and entropy of its logits, both ``(N,)`` float32 in nats; logits in chunks."""
    head_VD = weight_VD.to(dtype)
    loss_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    entropy_N = torch.empty_like(loss_N)
    for chunk in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
        logits_CV = (hidden_ND[chunk].to(dtype) @ head_VD.T).float()
        log_probs_CV = logits_CV.log_softmax(-1)
        loss_N[chunk] = -log_probs_CV.gather(1, labels_N[chunk, None]).squeeze(1)
        entropy_N[chunk] = -(log_probs_CV.exp() * log_probs_CV).sum(-1)
    return loss_N, entropy_N
