"""Attention on the CPU against scaled dot product attention, rotary positions against transformers', and both written
out at once against their parts."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cascade_fast.stages import attention
from cascade_fast.stages.attention import AttentionInputs, additive, attend, grouped_attention, rotate
from cascade_fast.stages.tokens import PackPlaces, SequencePack

B, H, G, Q, S, E = 3, 6, 2, 11, 17, 8


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, Q, E), (B, G, S, E), (B, G, S, E)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    position = torch.randint(0, S, (B, Q, 1), generator=generator)
    return *tensors, (torch.arange(S) <= position)[:, None], torch.randn(B, H, Q, E, generator=generator).to(dtype)


def _truth(query, key, value, mask):
    key, value = (t.repeat_interleave(H // G, dim=1) for t in (key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


def _with_gradients(function, *inputs, grad):
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, inputs[:3], grad)]


@pytest.mark.parametrize("score_bytes", [1, B * H * S * 4 * 4, 2**30], ids=["one query", "four queries", "whole"])
@pytest.mark.parametrize("as_bool", [True, False], ids=["bool", "additive"])
def test_it_is_masked_attention_in_blocks_or_whole(monkeypatch, score_bytes, as_bool):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    query, key, value, mask, grad = _inputs()
    given = mask if as_bool else additive(mask, torch.float32)
    mine = _with_gradients(grouped_attention, query, key, value, given, grad=grad)
    expected = _with_gradients(_truth, query, key, value, mask, grad=grad)
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_errs_no_more_than_twice_what_torch_does():
    query, key, value, mask, grad = _inputs(torch.bfloat16)
    mine = _with_gradients(grouped_attention, query, key, value, mask, grad=grad)
    torch_s = _with_gradients(_truth, query, key, value, mask, grad=grad)
    exact = [t.detach().float().requires_grad_() for t in (query, key, value)]
    truth = _with_gradients(_truth, *exact, mask, grad=grad.float())
    for one, other, right in zip(mine, torch_s, truth, strict=True):
        allowed = 2 * (other.float() - right).norm() + 2**-9 * right.norm()
        assert (one.float() - right).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_positions_are_llama_s(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, E, generator=generator).to(dtype).requires_grad_()
    half = torch.randn(5, E // 2, generator=generator)
    cos, sin = (torch.cat((f(half), f(half)), dim=-1) for f in (torch.cos, torch.sin))
    grad = torch.randn(5, 3, E, generator=generator).to(dtype)
    expected = apply_rotary_pos_emb(x.float(), x.float(), cos, sin, unsqueeze_dim=1)[0].to(dtype)
    mine = rotate(x, cos[:, None, : E // 2], sin[:, None, : E // 2], dtype)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (mine, expected)))


LENGTHS = {"each its row": (17, 17, 17), "shared rows": (17, 9, 4, 3, 12)}


def _pack(lengths, everyone):
    """Some hard tokens of each sequence, or every token."""
    generator = torch.Generator().manual_seed(1)
    length_C = torch.tensor(lengths)
    places = PackPlaces.from_lengths(length_C)
    position_C = [
        torch.arange(n) if everyone else torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values
        for n in lengths
    ]
    count_C = torch.tensor([len(position) for position in position_C])
    before_C, queries = places.counted(count_C)
    position_K = torch.cat(position_C)
    rank_K = torch.cat([torch.arange(count) for count in count_C.tolist()])
    begin_K, row_K = (of_C.repeat_interleave(count_C) for of_C in (places.column_C, places.row_C))
    return SequencePack(
        torch.empty(len(position_K), 1),
        position_K,
        row_K=row_K * places.width + begin_K + position_K,
        slot_K=row_K * queries + before_C.repeat_interleave(count_C) + rank_K,
        queries=queries,
        kv_BSL2GE=None if everyone else torch.randn(places.rows, places.width, 2, 2, G, E, generator=generator),
        shape=(places.rows, places.width),
        begin_K=begin_K if places.shared else None,
    )


def _attention_inputs(pack, groups, dtype):
    """``(at once, by parts)`` of the second of two layers."""
    if pack.kv_BSL2GE is not None:
        pack = dataclasses.replace(pack, kv_BSL2GE=pack.kv_BSL2GE[..., :1, :].repeat(1, 1, 1, 1, groups, 1))
    angle_KE = (pack.position_K[:, None] * 0.5 ** torch.arange(E // 2)).repeat(1, 2)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        at_once = AttentionInputs.from_pack(pack, H, (2, 2, groups, E), angle_KE.cos(), angle_KE.sin(), leaves=False)
    assert at_once.at_once
    assert at_once.kv_L2PE.dtype == dtype
    return at_once, dataclasses.replace(at_once, at_once=False, mask_B1QS=pack.mask())


def _attended(inputs, tensors, grad, beyond=0):
    """Outputs and gradients of ``attend``; with ``beyond``, of more rows than there are tokens, full of NaN."""
    given = [nn.functional.pad(t, (0, 0, 0, 0, 0, beyond), value=torch.nan).requires_grad_() for t in tensors]
    attended = attend(*given, inputs, 1)
    grad = nn.functional.pad(grad, (0, 0, 0, 0, 0, beyond), value=torch.nan)
    grads = torch.autograd.grad(attended, given, grad)
    count = len(attended) - beyond
    for t in (attended, *grads):
        assert torch.equal(t[count:], torch.zeros_like(t[count:]))
    return [attended[:count].detach(), *(of[:count] for of in grads)]


@pytest.mark.parametrize("beyond", [0, 5])
@pytest.mark.parametrize("groups", [1, G, H])
@pytest.mark.parametrize("everyone", [False, True], ids=["some", "every token"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_at_once_is_by_parts(lengths, everyone, groups, beyond):
    pack = _pack(LENGTHS[lengths], everyone)
    assert (pack.begin_K is not None) == (lengths == "shared rows")
    generator, k = torch.Generator().manual_seed(2), len(pack.position_K)
    tensors = [torch.randn(k, heads, E, generator=generator) for heads in (H, groups, groups)]
    grad = torch.randn(k, H, E, generator=generator)
    at_once, by_parts = _attention_inputs(pack, groups, torch.float32)
    mine = _attended(at_once, tensors, grad, beyond)
    for one, other in zip(mine, _attended(by_parts, tensors, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_is_left_are_rotated_keys_and_values_with_their_gradient():
    pack, generator = _pack(LENGTHS["shared rows"], False), torch.Generator().manual_seed(2)
    _, inputs = _attention_inputs(pack, G, torch.float32)
    k, left = len(pack.position_K), []
    query, key, value = (torch.randn(k, heads, E, generator=generator).requires_grad_() for heads in (H, G, G))
    attended = attend(query, key, value, inputs, 1, left)
    assert torch.equal(attended, attend(query, key, value, inputs, 1))
    cos, sin = (of_KF[:, None] for of_KF in inputs.key_angles)
    assert torch.equal(left[0], torch.stack((rotate(key, cos, sin, torch.float32), value), dim=1))
    grads = torch.autograd.grad(left[0].sum(), (key, value))  # a later stage's, whose tokens attend to them
    assert all(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("everyone", [False, True], ids=["some", "every token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_at_once_errs_in_16_bit_no_more_than_twice_what_its_parts_do(dtype, everyone):
    pack = _pack(LENGTHS["shared rows"], everyone)
    generator, k = torch.Generator().manual_seed(2), len(pack.position_K)
    tensors = [torch.randn(k, heads, E, generator=generator).to(dtype) for heads in (H, G, G)]
    grad = torch.randn(k, H, E, generator=generator).to(dtype)
    at_once, by_parts = _attention_inputs(pack, G, dtype)
    exact = _attention_inputs(pack, G, torch.float32)[1]
    truth = _attended(exact, [t.float() for t in tensors], grad.float())
    mine, parts = _attended(at_once, tensors, grad, 3), _attended(by_parts, tensors, grad)
    for one, other, right in zip(mine, parts, truth, strict=True):
        assert one.dtype == dtype
        allowed = 2 * (other.float() - right).norm() + torch.finfo(dtype).eps / 2 * right.norm()
        assert (one.float() - right).norm() <= allowed
