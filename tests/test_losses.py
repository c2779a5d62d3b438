"""Chunked cross-entropy against torch's own over whole logits."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cascade_fast import losses
from cascade_fast.losses import linear_cross_entropy, token_losses
from cascade_fast.runtime.compute import padded_rows


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


def _many_small_probabilities():
    """4,094 of 2.5e-8 each: half of float16's smallest number. Their share of the gradient is in the second column."""
    weight = torch.zeros(4096, 4)
    weight[2:, 0], weight[2:, 1] = -17.5, 1.0
    return torch.eye(1, 4).repeat(20, 1), weight, torch.zeros(20, dtype=torch.int64)


@pytest.mark.parametrize(("scale", "error"), [(1.0, 1.0), (losses.FLOAT16_SCALE, 0.005)])
def test_float16_gradients_keep_small_probabilities(monkeypatch, scale, error):
    """Without the scale they are lost, whose mass is what drives the second column."""
    monkeypatch.setattr(losses, "FLOAT16_SCALE", scale)
    hidden, weight, labels = _many_small_probabilities()
    truth, ours = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    F.cross_entropy(truth @ weight.double().T, labels).backward()
    linear_cross_entropy(ours, weight, labels, dtype=torch.float16).backward()
    found = (ours.grad - truth.grad)[:, 1].norm() / truth.grad[:, 1].norm()
    assert 0.9 * error <= found <= error if scale == 1.0 else found <= error


def test_float16_gradient_of_a_head_does_not_overflow():
    """That of a label that many tokens have: 16 tokens of 600, 9,600 times the scale would be too much."""
    hidden, weight = torch.full((64, 4), 600.0), torch.zeros(8, 4)
    labels = torch.zeros(64, dtype=torch.int64)
    truth, ours = weight.double().requires_grad_(), weight.clone().requires_grad_()
    F.cross_entropy(hidden.double() @ truth.T, labels).backward()
    linear_cross_entropy(hidden, ours, labels, dtype=torch.float16).backward()
    torch.testing.assert_close(ours.grad, truth.grad.float(), rtol=2e-3, atol=0.0)


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
@pytest.mark.parametrize("n", [0, 1, 15, 20, 21, 25, 26, 45, 46, 50, 53])
def test_chunks_are_even_and_fit_or_almost(monkeypatch, n, dtype):
    """A quarter of a chunk too many is no further chunk."""
    hidden, weight, _ = _inputs(n, v=10)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 20 * 10 * dtype.itemsize)  # 20 tokens
    chunks = list(losses._logit_chunks(hidden, weight.to(dtype)))
    sizes = [logits.shape[0] for _, _, logits in chunks]
    assert sum(sizes) == n
    assert len(sizes) == math.ceil((n - 5) / 20) if n > 5 else len(sizes) == n
    assert max(sizes, default=0) <= 25
    assert max(sizes, default=0) - min(sizes, default=0) < max(2, len(sizes))
    assert len({logits.data_ptr() for _, _, logits in chunks}) <= 1


# Of chunks of 64 tokens: one a quarter too long, two of 41 and 40, several and a shorter last one; all padded to 32s.
NEAR_CHUNKS = (1, 31, 65, 79, 81, 145, 301)


def _near_chunks(monkeypatch, n, dtype):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 64 * 101 * dtype.itemsize)
    return _inputs(n)


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", NEAR_CHUNKS)
def test_padded_products_change_no_loss_and_no_gradient(monkeypatch, n, dtype, own_head):
    hidden, weight, labels = _near_chunks(monkeypatch, n, dtype)
    truth, ours = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_(own_head)] for _ in range(2))
    expected = F.cross_entropy(truth[0] @ truth[1].T, labels)
    expected.backward()
    loss = linear_cross_entropy(*ours, labels, dtype=dtype)
    loss.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=eps, atol=eps)
    for one, other in zip(ours[: 1 + own_head], truth, strict=False):
        assert (one.grad - other.grad).norm() <= 2 * eps * other.grad.norm()
        assert (one.grad - other.grad).abs().max() <= 4 * eps * other.grad.abs().max()  # in every row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", NEAR_CHUNKS)
def test_every_token_has_its_own_label_to_the_last_one(monkeypatch, n, dtype):
    hidden, weight, labels = _near_chunks(monkeypatch, n, dtype)
    hidden *= 3  # losses of many sizes
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    rows = []
    loss, _ = token_losses(
        hidden,
        weight,
        labels,
        dtype=dtype,
        score=lambda of, logits, entropy: rows.append((of, logits.shape)) or entropy,
    )
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.1)
    assert [shape for _, shape in rows] == [(of.stop - of.start, 101) for of, _ in rows]  # none of them padding
    assert [of.start for of, _ in rows] == [0, *(of.stop for of, _ in rows[:-1])]
    assert rows[-1][0].stop == n


class _Products(TorchDispatchMode):
    """Rows of every product of two matrices."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            self.rows.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", NEAR_CHUNKS)
def test_products_in_16_bit_have_multiples_of_32_rows(monkeypatch, n, dtype):
    hidden, weight, labels = _near_chunks(monkeypatch, n, dtype)
    with _Products() as products:
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, dtype=dtype)
    both = products.rows[::2], products.rows[1::2]  # logits, and what goes back to the hidden states
    assert both[0] == both[1]
    if dtype == torch.float32:
        assert sum(both[0]) == n
    else:
        assert all(rows % 32 == 0 for rows in products.rows)
        assert n <= sum(both[0]) < n + 32 * len(both[0])


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64])
def test_padded_rows(n):
    x = torch.randn(n, 5, dtype=torch.bfloat16, requires_grad=True)
    padded = padded_rows(x)
    assert padded.shape == (-(-n // 32) * 32, 5)
    assert padded.dtype == x.dtype
    assert torch.equal(padded[:n], x)
    assert torch.equal(padded[n:], torch.zeros_like(padded[n:]))
    grad = torch.randn_like(padded)
    padded.backward(grad)
    assert torch.equal(x.grad, grad[:n])


def _most_memory(hidden, weight, labels, dtype):
    """Asked for at any one time, besides the results."""
    hidden = hidden.detach().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, dtype=dtype)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - hidden.numel() * 4  # the gradient of the hidden states is a result


def test_extra_memory_is_one_chunk():
    """Whatever the batch."""
    hidden, weight, labels = _inputs(n=400, d=24, v=5000)
    many, some = (_most_memory(hidden[:n], weight, labels[:n], torch.float32) for n in (400, 64))
    one_chunk = 16 * 5000 * 4
    assert one_chunk <= many < 1.2 * one_chunk
    assert many < some + 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [512, 525, 640, 641, 1153, 1700])
def test_extra_memory_is_a_chunk_and_a_quarter_at_most(monkeypatch, n, dtype):
    hidden, weight, labels = _inputs(n, d=8, v=5000)
    one_chunk = 512 * 5000 * dtype.itemsize
    monkeypatch.setattr(losses, "CHUNK_BYTES", one_chunk)
    most = _most_memory(hidden, weight.to(dtype), labels, dtype)
    # A chunk's hidden states and losses; and oneDNN's own copy of a 16-bit head, of 8 columns padded to 32.
    beside = 640 * (4 * 8 * 4 + 16) + 32 * 5000 * dtype.itemsize
    assert 0.5 * one_chunk < most <= 1.25 * one_chunk + beside
