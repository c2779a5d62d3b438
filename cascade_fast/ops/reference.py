"""Plain torch bodies of every operator: the fallback on any device and the oracle of the tests.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows.
"""

import functools
import math

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


INF_KEY = 0x7F800000  # sort_key of +inf
NAN_KEY = INF_KEY + 1
LARGEST_KEY = 2**31 - 1  # of no score


def sort_key(scores: Tensor) -> Tensor:
    """int32 keys in the order of float32 scores: one key for -0.0 and 0.0, one for every NaN, above +inf's.

    torch.sort on the scores themselves has them in another order where a NaN has its sign set (on a GPU it comes
    first) and where subnormals are flushed (they tie with zero).
    """
    bits = scores.view(torch.int32)
    size = bits & 0x7FFFFFFF
    return torch.where(size > INF_KEY, NAN_KEY, torch.where(bits < 0, -size, size))


def select_hard(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest scores of each row, see :func:`cascade_fast.ops.select_hard`."""
    order_BN = sort_key(scores_BN).sort(dim=-1, stable=True).indices  # stable: lowest index first among ties
    ordered_BN = scores_BN.gather(1, order_BN)
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


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor, grad: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and entropy of each row, in float32; with ``grad`` the logits become ``scale`` times the sum's gradient."""
    labels_C1 = labels_C.unsqueeze(1)
    log_probs_CV = logits_CV.float().log_softmax(-1)
    loss_C = -log_probs_CV.gather(1, labels_C1).squeeze(1)
    probs_CV = log_probs_CV.exp()
    entropy_C = -torch.where(probs_CV == 0, 0.0, probs_CV * log_probs_CV).sum(-1)  # not 0 * -inf
    if grad:
        grad_CV = probs_CV.scatter_add_(1, labels_C1, probs_CV.new_full(labels_C1.shape, -1.0))
        logits_CV.copy_(grad_CV.mul_(scale) if scale != 1.0 else grad_CV)
    return loss_C, entropy_C


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``weight * x / rms(x)`` in float32, rounded once to ``dtype``; and ``1 / rms(x)``, ``(N,)`` float32."""
    inv_rms_N1 = torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)
    return (x_ND * inv_rms_N1 * weight_D).to(dtype), inv_rms_N1.squeeze(-1)


def rms_norm_backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inv_rms_N: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm` in ``x`` and ``weight``, in their dtype; the second empty unless asked for."""
    inv_rms_N1, grad_ND = inv_rms_N.unsqueeze(-1), grad_ND.to(x_ND.dtype)
    unit_ND = x_ND * inv_rms_N1
    grad_unit_ND = grad_ND * weight_D
    grad_x_ND = inv_rms_N1 * (grad_unit_ND - unit_ND * (grad_unit_ND * unit_ND).mean(-1, keepdim=True))
    return grad_x_ND, (grad_ND * unit_ND).sum(0) if weight_grad else weight_D.new_empty(0)


def add_rms_norm(x_ND: Tensor, added_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x + added``, its :func:`rms_norm` in the dtype of ``added``, and ``1 / rms``."""
    sum_ND = x_ND + added_ND
    return sum_ND, *rms_norm(sum_ND, weight_D, eps, added_ND.dtype)


def add_rms_norm_backward(
    grad_sum_ND: Tensor, grad_ND: Tensor, sum_ND: Tensor, weight_D: Tensor, inv_rms_N: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``x``, the same for ``added`` in the dtype of ``grad``, and that of ``weight`` as above."""
    of_norm_ND, grad_weight_D = rms_norm_backward(grad_ND, sum_ND, weight_D, inv_rms_N, weight_grad)
    grad_x_ND = grad_sum_ND + of_norm_ND
    # An operator's results share no memory.
    return grad_x_ND, grad_x_ND.to(grad_ND.dtype, copy=True), grad_weight_D


def scale_into_(into: list[Tensor], values: list[Tensor], scale: float) -> None:
    """``into[i] = values[i] * scale``, rounded once."""
    torch._foreach_copy_(into, torch._foreach_mul(values, scale))


def silu_mul(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32, rounded once."""
    return (torch.nn.functional.silu(gate_NF.float()) * up_NF.float()).to(gate_NF.dtype)


def silu_mul_backward(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`silu_mul` in the inputs' dtype."""
    grad, gate, up = grad_NF.float(), gate_NF.float(), up_NF.float()
    share = gate.sigmoid()
    silu = gate * share
    return (grad * up * (share + silu * (1.0 - share))).to(gate_NF.dtype), (grad * silu).to(up_NF.dtype)


def rotate_rows(x_KHE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, into_PE: Tensor) -> Tensor:
    """A copy of ``into`` with the rotated heads in rows ``index``."""
    turned_KHE = _turned(x_KHE[: len(index_Y) // x_KHE.shape[1]], cos_KF, sin_KF).to(into_PE.dtype)
    return into_PE.index_copy(0, index_Y, turned_KHE.flatten(0, 1))


def rotate_rows_backward(
    grad_PE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, heads: int, tokens: int
) -> Tensor:
    """Gradient of :func:`rotate_rows` in ``x``: the rows, rotated back; zero of the tokens that are not placed."""
    grad_KHE = grad_PE.index_select(0, index_Y).unflatten(0, (-1, heads))
    out_KHE = grad_PE.new_zeros(tokens, heads, grad_PE.shape[1])
    out_KHE[: len(grad_KHE)] = _turned(grad_KHE, cos_KF, -sin_KF)
    return out_KHE


def _turned(x_KHE: Tensor, cos_KF: Tensor, sin_KF: Tensor) -> Tensor:
    if cos_KF.numel() == 0:
        return x_KHE
    first, second = x_KHE.float().chunk(2, dim=-1)
    cos_K1F, sin_K1F = cos_KF[:, None], sin_KF[:, None]
    return torch.cat((first * cos_K1F - second * sin_K1F, second * cos_K1F + first * sin_K1F), dim=-1)


def _at_places(x_KHE: Tensor, token_BN: Tensor, into_BHNE: Tensor) -> Tensor:
    """``(B, H, N, E)``: the heads of the token of each place, of ``into`` where there is none."""
    token_BN = torch.where(token_BN < 0, len(x_KHE), token_BN).long()
    placed_BHNE = torch.cat((x_KHE, x_KHE.new_zeros(1, *x_KHE.shape[1:])))[token_BN].transpose(1, 2)
    return torch.where((token_BN < len(x_KHE))[:, None, :, None], placed_BHNE, into_BHNE).contiguous()


def place_heads(
    query_KHE: Tensor,
    key_KGE: Tensor,
    value_KGE: Tensor,
    cos_KF: Tensor,
    sin_KF: Tensor,
    token_BQ: Tensor,
    token_BS: Tensor,
    keys_PE: Tensor,
    values_PE: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cascade_fast.ops.place_heads`."""
    dtype, (sequences, seq_len), (_, groups, size) = query_KHE.dtype, token_BS.shape, key_KGE.shape
    query_KHE = _turned(query_KHE, cos_KF * scale, sin_KF * scale).to(dtype)
    key_KGE = _turned(key_KGE, cos_KF, sin_KF).to(dtype)
    query_BHQE = _at_places(query_KHE, token_BQ, query_KHE.new_zeros(()))
    rows = query_KHE.shape[1] // groups * token_BQ.shape[1]
    there = (t.view(sequences, groups, seq_len, size) for t in (keys_PE, values_PE))
    key_BGSE, value_BGSE = (_at_places(x, token_BS, into) for x, into in zip((key_KGE, value_KGE), there, strict=True))
    return query_BHQE.view(sequences, groups, rows, size), key_BGSE, value_BGSE


def place_heads_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    cos_KF: Tensor,
    sin_KF: Tensor,
    slot_K: Tensor,
    place_K: Tensor,
    times: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`place_heads` in queries, keys and values."""
    dtype = grad_query.dtype
    query_KHE = _turned(take_heads(grad_query, slot_K, times), cos_KF * scale, -sin_KF * scale).to(dtype)
    key_KGE = _turned(take_heads(grad_key, place_K, 1), cos_KF, -sin_KF).to(dtype)
    return query_KHE, key_KGE, take_heads(grad_value, place_K, 1)


def take_heads(rows_BGRE: Tensor, slot_K: Tensor, times: int) -> Tensor:
    """See :func:`cascade_fast.ops.take_heads`."""
    sequences, groups, rows, size = rows_BGRE.shape
    of_heads = rows_BGRE.reshape(sequences, groups * times, rows // times, size).transpose(1, 2).flatten(0, 1)
    return of_heads[slot_K]


def take_heads_backward(grad_KHE: Tensor, token_BQ: Tensor, times: int) -> Tensor:
    """Gradient of :func:`take_heads`, in memory as ``(B, R, G, E)``."""
    placed_BHQE = _at_places(grad_KHE, token_BQ, grad_KHE.new_zeros(()))
    groups, size = grad_KHE.shape[1] // times, grad_KHE.shape[2]
    folded_BGRE = placed_BHQE.view(len(token_BQ), groups, times * token_BQ.shape[1], size)
    return folded_BGRE.transpose(1, 2).contiguous().transpose(1, 2)


ATTENTION_CHUNK = 32  # keys


def attention_width(keys: int) -> int:
    """Columns of the weights of :func:`attention`."""
    return -(-keys // ATTENTION_CHUNK) * ATTENTION_CHUNK


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`cascade_fast.ops.attention`."""
    scores = torch.bmm(query, key.transpose(1, 2)).float()
    # (B, G, H / G, Q, S): the heads of a sequence all have its mask.
    split = (mask.shape[0], scores.shape[0] // max(mask.shape[0], 1), scores.shape[1] // max(mask.shape[2], 1))
    masked = scores.view(*split, *mask.shape[2:]) + mask.float()[:, None]
    keys = key.shape[1]
    weights = masked.softmax(dim=-1).to(query.dtype).view(scores.shape)
    padded = torch.nn.functional.pad(weights, (0, attention_width(keys) - keys))
    return torch.bmm(weights, value), padded


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cascade_fast.ops.attention_backward`."""
    weights = weights[..., : key.shape[1]]
    of_weights = torch.bmm(grad, value.transpose(1, 2)).float()
    wide = weights.float()
    of_scores = (wide * (of_weights - (of_weights * wide).sum(-1, keepdim=True))).to(query.dtype)
    return (
        torch.bmm(of_scores, key),
        torch.bmm(of_scores.transpose(1, 2), query),
        torch.bmm(weights.transpose(1, 2), grad),
    )


def low_rank(x: Tensor, a: Tensor) -> Tensor:
    """See :func:`cascade_fast.ops.low_rank`."""
    both = x.new_empty(x.shape[0], x.shape[1] + a.shape[0])
    both[:, : x.shape[1]] = x
    if a.shape[0]:
        both[:, x.shape[1] :] = x @ a.t()
    return both


def low_rank_backward(
    grad: Tensor, both: Tensor, a: Tensor, grads: list[Tensor], ranks: list[int], scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See :func:`cascade_fast.ops.low_rank_backward`."""
    d = a.shape[1]
    low_parts, low_grad = both[:, d:].split(ranks, dim=1), grad[:, d:]
    of_x = torch.addmm(grad[:, :d], low_grad, a)
    of_a = (low_grad.t() @ both[:, :d]).float() * scale
    return of_x, of_a, [(one.t() @ low).float() for one, low in zip(grads, low_parts, strict=True)]


# --- 8-bit AdamW -----------------------------------------------------------------------------------------------------

BLOCK = 256  # values that share a scale


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The ``(256,)`` float32 values of the dynamic 8-bit data type (arXiv 2110.02861), ascending: 0, 1 and the seven
    decades below 1, each with twice as many evenly spaced values as the one below it; without a sign twice as fine."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        positive = (10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += positive + [-value for value in positive] * signed
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _code_of_grid_point(signed: bool, device: torch.device) -> Tensor:
    values = dynamic_map(signed).double()
    points = torch.linspace(-1, 1, 65536, dtype=torch.float64)
    return torch.bucketize(points, (values[:-1] + values[1:]) / 2).to(device, torch.uint8)


def _in_blocks(flat_N: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat_N, (0, -len(flat_N) % BLOCK)).view(-1, BLOCK)


def quantize_blockwise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """``(codes, absmax)``: uint8 in the shape of ``values`` and the ``(blocks,)`` float32 scales.

    A value over its block's scale is rounded to the grid ``(2 k - 65535) / 65535``, and that to the nearest of the map,
    as bitsandbytes' CPU code does. NaN is passed over by the scale and gets code 0, as does all of a block of zeros.
    """
    blocks = _in_blocks(values.flatten())
    absmax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
    inverse = torch.where(absmax > 0, (1.0 / absmax).clamp(max=torch.finfo(torch.float32).max), torch.nan)
    scaled = blocks * inverse[:, None]
    grid = ((scaled + 1.0) * 32767.5 + 0.5).nan_to_num(nan=0.0).long().clamp(0, 65535)
    codes = _code_of_grid_point(signed, values.device)[grid]
    return codes.masked_fill(scaled.isnan(), 0).flatten()[: values.numel()].view(values.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values of ``codes``."""
    values = dynamic_map(signed).to(codes.device)[codes.flatten().long()]
    return (_in_blocks(values) * absmax[:, None]).flatten()[: codes.numel()].view(codes.shape)


def adamw8bit(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    steps: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """One step in place, see :func:`cascade_fast.ops.adamw8bit`."""
    if found_inf is not None and found_inf != 0:
        return
    left_out = 0 if skipped is None else int(skipped)
    for i, param in enumerate(params):
        step, grad, coded = steps[i] - left_out, grads[i].float(), state1[i].dtype == torch.uint8
        if grad_scale is not None:
            grad = grad / grad_scale
        m = dequantize_blockwise(state1[i], absmax1[i], True) if coded else state1[i]
        v = dequantize_blockwise(state2[i], absmax2[i], False) if coded else state2[i]
        m = m * beta1 + grad * (1.0 - beta1)
        v = v * beta2 + grad * grad * (1.0 - beta2)
        root = v.sqrt() / math.sqrt(1.0 - beta2**step) + eps
        param.mul_(1.0 - lr * weight_decay).addcdiv_(m, root, value=-lr / (1.0 - beta1**step))
        if coded:
            m, absmax = quantize_blockwise(m, True)
            absmax1[i].copy_(absmax)
            v, absmax = quantize_blockwise(v, False)
            absmax2[i].copy_(absmax)
        state1[i].copy_(m)
        state2[i].copy_(v)


# --- AdamW and the norm of its gradients ------------------------------------------------------------------------------


def grad_norm(grads: list[Tensor], scale: Tensor | None, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cascade_fast.ops.grad_norm`; 1e-6 is that of ``torch.nn.utils.clip_grad_norm_``."""
    norm = torch.nn.utils.get_total_norm([grad.float() for grad in grads])
    if clip == 0:
        factor = torch.ones_like(norm) if scale is None else scale.clone()
    elif scale is None:
        factor = ((norm + 1e-6) / clip).clamp(min=1.0)
    else:
        factor = torch.maximum(scale, torch.add(norm, scale, alpha=1e-6) / clip)
    return norm, factor, (norm - norm).nan_to_num(nan=1.0)  # inf - inf is NaN, too


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_now: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See :func:`cascade_fast.ops.adamw_`."""
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params,
        [grad.to(torch.float32, copy=True) for grad in grads],  # unscaled in place
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr if lr_now is None else lr_now,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
    for param, copy in zip(params, copies, strict=True):
        if copy.numel() > 0:
            copy.copy_(param)
