"""Plain torch bodies of every operator: the fallback on any device and the oracle of the tests.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows.
"""

import torch
from torch import Tensor

COSINE_EPS = 1e-8


def cosine_score(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """``<a, b> / (|a| |b| + 1e-8)`` per row, all arithmetic in float32. Returns ``(N,)`` float32."""
    a_ND, b_ND = h_in_ND.float(), h_out_ND.float()
    dot_N = (a_ND * b_ND).sum(-1)
    return dot_N / (a_ND.norm(dim=-1) * b_ND.norm(dim=-1) + COSINE_EPS)


def cosine_score_backward(grad_N: Tensor, h_in_ND: Tensor, h_out_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`cosine_score` in the inputs' dtypes; 0 for the norm of a zero row."""
    a_ND, b_ND = h_in_ND.float(), h_out_ND.float()
    norm_a_N1, norm_b_N1 = a_ND.norm(dim=-1, keepdim=True), b_ND.norm(dim=-1, keepdim=True)
    inv_N1 = 1.0 / (norm_a_N1 * norm_b_N1 + COSINE_EPS)
    cos_N1 = (a_ND * b_ND).sum(-1, keepdim=True) * inv_N1
    # d|a|/da = a/|a|, taken as 0 at a = 0 (torch's own subgradient of the norm).
    unit_a_ND = torch.where(norm_a_N1 > 0, a_ND / norm_a_N1, 0.0)
    unit_b_ND = torch.where(norm_b_N1 > 0, b_ND / norm_b_N1, 0.0)
    scale_N1 = grad_N.float().unsqueeze(-1) * inv_N1
    grad_a_ND = scale_N1 * (b_ND - cos_N1 * norm_b_N1 * unit_a_ND)
    grad_b_ND = scale_N1 * (a_ND - cos_N1 * norm_a_N1 * unit_b_ND)
    return grad_a_ND.to(h_in_ND.dtype), grad_b_ND.to(h_out_ND.dtype)


def select_hard(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest scores of each row, see :func:`cascade_fast.ops.select_hard`."""
    ordered_BN, order_BN = scores_BN.sort(dim=-1, stable=True)  # stable: lowest index first among ties; NaN last
    index_BK = order_BN[:, :k].sort(dim=-1).values
    inf_B1 = scores_BN.new_full((scores_BN.shape[0], 1), torch.inf)
    # bounds = (k-th smallest, (k+1)-th smallest), padded with -inf below and +inf above.
    padded = torch.cat([-inf_B1, ordered_BN, inf_B1], dim=-1)
    return index_BK, padded[:, k : k + 2].clone()


def gather_rows(hidden_ND: Tensor, index_K: Tensor, carried: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Rows ``index_K`` of ``hidden_ND`` and the same entries of every carried ``(N,)`` array."""
    return hidden_ND.index_select(0, index_K), [array_N.index_select(0, index_K) for array_N in carried]


def scatter_rows(rows_KD: Tensor, index_K: Tensor, into_ND: Tensor, add: bool) -> Tensor:
    """A copy of ``into_ND`` whose rows ``index_K`` are replaced by (or increased by) ``rows_KD``."""
    if add:
        # Sum in float32 and round once, as the fused bodies do.
        summed_KD = into_ND.index_select(0, index_K).float() + rows_KD.float()
        rows_KD = summed_KD.to(into_ND.dtype)
    return into_ND.index_copy(0, index_K, rows_KD.to(into_ND.dtype))


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """Loss and entropy of each row, in float32; with ``grad`` the logits become the gradient of the summed loss."""
    labels_C1 = labels_C.unsqueeze(1)
    log_probs_CV = logits_CV.float().log_softmax(-1)
    loss_C = -log_probs_CV.gather(1, labels_C1).squeeze(1)
    probs_CV = log_probs_CV.exp()
    entropy_C = -torch.where(probs_CV == 0, 0.0, probs_CV * log_probs_CV).sum(-1)  # not 0 * -inf
    if grad:
        logits_CV.copy_(probs_CV.scatter_add_(1, labels_C1, probs_CV.new_full(labels_C1.shape, -1.0)))
    return loss_C, entropy_C


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``weight * x / rms(x)`` in float32, rounded once to ``dtype``; and ``1 / rms(x)``, ``(N,)`` float32."""
    inv_rms_N1 = torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)
    return (x_ND * inv_rms_N1 * weight_D).to(dtype), inv_rms_N1.squeeze(-1)


def rms_norm_backward(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inv_rms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm` in ``x`` and ``weight``, in their dtype."""
    inv_rms_N1, grad_ND = inv_rms_N.unsqueeze(-1), grad_ND.to(x_ND.dtype)
    unit_ND = x_ND * inv_rms_N1
    grad_unit_ND = grad_ND * weight_D
    grad_x_ND = inv_rms_N1 * (grad_unit_ND - unit_ND * (grad_unit_ND * unit_ND).mean(-1, keepdim=True))
    return grad_x_ND, (grad_ND * unit_ND).sum(0)
