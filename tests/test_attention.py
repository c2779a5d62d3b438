"""Attention on the CPU against scaled dot product attention, rotary positions against transformers'."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cascade_fast.stages import attention
from cascade_fast.stages.attention import additive, grouped_attention, rotate

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
