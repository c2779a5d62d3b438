"""What attention does on a GPU: on the CPU with the same calls, and counted on a pretend card."""

from pathlib import Path

import pytest
import torch
from cuda_cases import needs_pretend_gpu, on_pretend_card
from test_attention import LENGTHS, B, E, G, H, Q, S, _inputs, _pack, _truth, _with_gradients

from cascade_fast.stages import gpu_attention
from cascade_fast.stages.gpu_attention import Masks, added_to_scores, folded_attention, padded_queries, queries_of_mask

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("everyone", [False, True], ids=["some", "every token"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_in_blocks_of_queries_it_is_the_whole(monkeypatch, lengths, everyone):
    pack = _pack(LENGTHS[lengths], everyone)
    mask, queries = pack.mask(), pack.queries
    padded = pack.padded_to(32)
    assert torch.equal(padded.mask()[:, :, :queries], mask)
    assert padded.mask().any(-1).all()
    rows, width = pack.shape
    generator = torch.Generator().manual_seed(1)
    shapes = (rows, H, queries, E), (rows, G, width, E), (rows, G, width, E)
    query, key, value = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    grad = torch.randn(query.shape, generator=generator)
    expected = _with_gradients(_truth, query, key, value, mask, grad=grad)

    def folded(*inputs):
        wide = torch.nn.functional.pad(inputs[0], (0, 0, 0, 32 - queries))
        return folded_attention(wide, *inputs[1:], masks)[:, :, :queries]

    for mask_bytes, blocks in ((2**20, 1), (1, 2)):
        monkeypatch.setattr(gpu_attention, "MASK_BYTES", mask_bytes)
        masks = Masks.from_pack(padded, H // G, torch.float32)
        assert (masks.whole is None, masks.step) == (blocks > 1, 32 // blocks)
        for one, other in zip(_with_gradients(folded, query, key, value, grad=grad), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_masks_are_aligned_and_within_their_bytes():
    mask = _inputs()[3]
    added = added_to_scores(mask, H // G, torch.float16)
    assert added.dtype == torch.float16
    assert added.shape == (B, 1, H // G * Q, S)
    assert [stride % gpu_attention.ALIGNED for stride in added.stride()] == [0, 0, 0, 1]
    assert torch.equal(added == 0, mask.repeat(1, 1, H // G, 1))
    for rows, seq_len, times in ((1, 4096, 3), (8, 4096, 4), (64, 130, 1)):
        step = queries_of_mask((rows, seq_len), times, 2)
        assert step % padded_queries(1) == 0
        assert rows * times * step * seq_len * 2 <= gpu_attention.MASK_BYTES
    assert [padded_queries(n) for n in (1, 16, 17)] == [16, 16, 32]


def test_cudnn_is_not_asked(monkeypatch):
    asked = []

    def attention(query, *_args, **_options):
        cuda = torch.backends.cuda
        asked.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return query

    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    query, key, value, mask, _ = _inputs()
    folded_attention(query, key, value, Masks(None, H // G, query.dtype, Q, added_to_scores(mask, H // G, query.dtype)))
    assert asked == [(False, False, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# Prints operators of a base with grouped heads, and memory of a pack of 4,096 tokens.
PRETEND = """
import collections, json, pretend_gpu
pretend_gpu.install("gpu", card="t4", poison=True)
import torch
from cascade_fast.base.expanded_heads import expanded_heads
from cascade_fast.stages.gpu_attention import MASK_BYTES, Masks, folded_attention
from cascade_fast.stages.tokens import SequencePack
from second_look_cases import family_model

def attention_of(led):
    ops = (k.op.split(".")[1] for k in led.kernels)
    return dict(collections.Counter(op for op in ops if "attention" in op or "softmax" in op))

found = {}
with pretend_gpu.as_cuda():
    base = family_model("qwen3").eval().requires_grad_(False)
    tokens = torch.arange(24).view(2, 12)
    cpu = base.model(tokens).last_hidden_state
    with expanded_heads(base):
        found["cpu"] = torch.equal(base.model(tokens).last_hidden_state, cpu)
    base.to("cuda")
    with pretend_gpu.ledger() as before:
        base.model(tokens.to("cuda"))
    with expanded_heads(base), pretend_gpu.ledger() as after:
        out = base.model(tokens.to("cuda")).last_hidden_state
    found["base"] = (out.cpu() - cpu).abs().max().item()
    found["before"], found["after"] = attention_of(before), attention_of(after)
    found["layers"], found["saved"] = len(base.model.layers), before.launches - after.launches
    pretend_gpu.install("gpu", card="a100")
    with expanded_heads(base):
        found["newer"] = base.config._attn_implementation

    size, place_K = 4096, torch.arange(4096, device="cuda")
    pack = SequencePack(torch.empty(size, 1, device="cuda"), place_K, place_K, place_K, size, None, (1, size))
    given = [torch.randn(1, heads, size, 8, device="cuda", requires_grad=True) for heads in (2, 1, 1)]
    with pretend_gpu.ledger() as led:
        masks = Masks.from_pack(pack, 2, torch.float32)
        folded_attention(*given, masks).sum().backward()
    found["blocks"], found["long"] = size // masks.step, attention_of(led)
    found["peak"] = (led.peak_bytes - sum(t.nbytes for t in given)) / MASK_BYTES
print(json.dumps(found))
"""


@needs_pretend_gpu
def test_kernels_and_memory_on_a_pretend_card():
    found = on_pretend_card(PRETEND)
    efficient, backward = "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"
    assert found["cpu"]
    assert efficient not in found["before"]  # else there is nothing to do
    assert found["after"] == {efficient: found["layers"]}
    assert found["saved"] >= 10 * found["layers"]
    assert found["base"] < 1e-5
    assert found["newer"] == "sdpa"
    assert found["blocks"] == 4
    assert found["long"] == {efficient: 8, backward: 4}
    assert found["peak"] < 2  # a mask of all queries would be 4
