"""Chunked cross-entropy against torch's own over whole logits."""

import math

import pytest
import torch
from torch.nn import functional as F

from cascade_fast import losses
from cascade_fast.losses import linear_cross_entropy, token_losses


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)  # 16 tokens a chunk: several chunks and a rest


def _inputs(n=53, d=24, v=101):
    hidden = torch.randn(n, d)
    weight = torch.randn(v, d) / d**0.5
    return hidden, weight, torch.randint(0, v, (n,))


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("n", [1, 16, 53])
def test_loss_and_gradients_equal_the_plain_ones(own_head, n):
    hidden, weight, labels = _inputs(n)
    plain = hidden.clone().requires_grad_(), weight.clone().requires_grad_(own_head)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_(own_head)
    F.cross_entropy(plain[0] @ plain[1].T, labels).mul(3.0).backward()
    loss = linear_cross_entropy(*ours, labels)
    loss.mul(3.0).backward()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(hidden @ weight.T, labels))
    torch.testing.assert_close(ours[0].grad, plain[0].grad)
    if own_head:
        torch.testing.assert_close(ours[1].grad, plain[1].grad)
    else:
        assert ours[1].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_torch(dtype):
    hidden, weight, labels = _inputs()
    truth = hidden.double().requires_grad_()
    F.cross_entropy(truth @ weight.double().T, labels).backward()
    plain = hidden.to(dtype).requires_grad_()
    F.cross_entropy((plain @ weight.to(dtype).T).float(), labels).backward()
    ours = hidden.clone().requires_grad_()
    linear_cross_entropy(ours, weight, labels, dtype=dtype).backward()
    allowed = (plain.grad.double() - truth.grad).abs().max() + 1e-6
    assert (ours.grad.double() - truth.grad).abs().max() <= 2 * allowed


def test_float16_gradients_do_not_vanish_in_large_batches():
    """1/N is applied in float32: in float16 the softmax of a big vocabulary divided by N would be all zeros."""
    hidden, weight, labels = torch.randn(64, 8), torch.randn(5000, 8) * 0.01, torch.randint(0, 5000, (64,))
    ours = hidden.clone().requires_grad_()
    linear_cross_entropy(ours, weight, labels, dtype=torch.float16).backward()
    truth = hidden.clone().requires_grad_()
    F.cross_entropy(truth @ weight.T, labels).backward()
    torch.testing.assert_close(ours.grad, truth.grad, rtol=0.02, atol=1e-7)


def test_token_losses_and_entropies():
    hidden, weight, labels = _inputs()
    loss, entropy = token_losses(hidden, weight, labels)
    logits = hidden @ weight.T
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


def test_no_token_has_no_losses():
    loss, entropy = token_losses(torch.empty(0, 4), torch.randn(9, 4), torch.empty(0, dtype=torch.int64))
    assert loss.shape == entropy.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 50, 53])
def test_chunks_are_even_and_fit(monkeypatch, n, dtype):
    hidden, weight, _ = _inputs(n, v=10)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 20 * 10 * dtype.itemsize)  # 20 tokens
    chunks = list(losses._logit_chunks(hidden, weight.to(dtype)))
    sizes = [logits.shape[0] for _, _, logits in chunks]
    assert sum(sizes) == n
    assert len(sizes) == math.ceil(n / 20)
    assert max(sizes, default=0) - min(sizes, default=0) < max(2, len(sizes))
    assert len({logits.data_ptr() for _, _, logits in chunks}) <= 1


def test_extra_memory_is_one_chunk():
    """Whatever the batch: all memory asked for at any one time, besides the results."""
    hidden, weight, labels = _inputs(n=400, d=24, v=5000)

    def most(n):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            linear_cross_entropy(hidden[:n].requires_grad_(), weight, labels[:n])
        held, peak = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak - n * 24 * 4  # the gradient of the hidden states is a result

    one_chunk = 16 * 5000 * 4
    assert one_chunk <= most(400) < 1.2 * one_chunk
    assert most(400) < most(64) + 4096
