"""Inputs and oracle of ``cross_entropy_``, for the tests of every body: ``op(logits, labels, grad, scale)``.

Shape legend: C tokens, V vocabulary.
"""

import pytest
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def inputs(c, v, dtype, spread=4.0, offset=0):
    """Logits, ``offset`` elements into their memory, and labels that are no neighbours in theirs."""
    generator = torch.Generator().manual_seed(c * 100_003 + v)
    logits = torch.randn(c, v, generator=generator).mul_(spread).to(dtype)
    logits = torch.cat([logits.new_zeros(offset), logits.flatten()])[offset:].view(c, v)
    labels = torch.randint(0, v, (c,), generator=generator)
    return logits, torch.stack([labels, torch.full_like(labels, -7)], 1)[:, 0]


def truth(logits, labels):
    """Loss, entropy and gradient in float64."""
    log_probs = logits.double().log_softmax(-1)
    loss = -log_probs.gather(1, labels[:, None]).squeeze(1)
    probs = log_probs.exp()
    minus_one = -torch.ones_like(probs[:, :1])
    return loss, torch.special.entr(probs).sum(-1), probs.scatter_add(1, labels[:, None], minus_one)


def check(op, logits, labels, scale=1.0, grads=(False, True)):
    loss, entropy, gradient = truth(logits, labels)
    before = logits.clone()
    for grad in grads:
        ours = op(logits, labels, grad, scale)
        assert [x.dtype for x in ours] == [torch.float32] * 2
        torch.testing.assert_close(ours[0], loss.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], entropy.float(), rtol=1e-5, atol=1e-5)
        if not grad:
            assert torch.equal(logits, before)
    if grads[-1]:  # rounded once: half a unit in the last place of the dtype, besides float32's own error
        info = torch.finfo(logits.dtype)
        smallest = info.smallest_normal * (info.eps if logits.dtype == torch.float16 else 1.0)
        gradient *= scale
        room = gradient.abs() * (info.eps / 2 + 1e-5) + smallest
        room.scatter_add_(1, labels[:, None], torch.full_like(room[:, :1], 1e-7 * scale))  # p - 1 cancels
        assert ((logits.double() - gradient).abs() <= room).all()


def check_large(op, device="cpu"):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, -1e4]], device=device)
    loss, entropy = op(logits, torch.tensor([0, 2], device=device), True, 1.0)
    torch.testing.assert_close(loss.cpu(), torch.tensor([0.0, 2e4 + 0.6931]))
    torch.testing.assert_close(entropy.cpu(), torch.tensor([0.0, 0.6931]), rtol=1e-4, atol=1e-6)
    assert torch.equal(logits.cpu(), torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, -1.0]]))


def check_minus_infinity(op, v, device="cpu"):
    """A probability of zero; a row of nothing else has none and is NaN."""
    logits = torch.full((3, v), -torch.inf)
    logits[:2, :2] = 1.0
    logits = logits.to(device)
    loss, entropy = op(logits, torch.tensor([0, v - 1, 0], device=device), True, 1.0)
    nan = torch.nan
    torch.testing.assert_close(loss.cpu(), torch.tensor([0.6931, torch.inf, nan]), rtol=1e-4, atol=0.0, equal_nan=True)
    torch.testing.assert_close(entropy.cpu(), torch.tensor([0.6931, 0.6931, nan]), rtol=1e-4, atol=0.0, equal_nan=True)
    wanted = torch.zeros(3, v)
    wanted[0, :2] = torch.tensor([-0.5, 0.5])
    wanted[1, :2], wanted[1, v - 1], wanted[2] = 0.5, -1.0, nan
    torch.testing.assert_close(logits.cpu(), wanted, equal_nan=True)


def check_not_finite(op, dtype, v=40, device="cpu"):
    """NaN and +inf, wherever they are, make their own row NaN and no other."""
    places = [(at, bad) for at in (0, v // 2, v - 1) for bad in (torch.nan, torch.inf)]
    logits = torch.randn(2 * len(places), v).to(dtype)
    for i, (at, bad) in enumerate(places):
        logits[2 * i, at] = bad
    logits = logits.to(device)
    results = [*op(logits, torch.full((len(logits),), 3, device=device), True, 1.0), logits]
    for result in results:
        bad = result.isnan().view(len(logits), -1)
        assert bad[::2].all()
        assert result[1::2].isfinite().all()


SPECIAL = {
    "large": lambda op: check_large(op),
    "minus infinity": lambda op: check_minus_infinity(op, 3),
    "minus infinity, whole words": lambda op: check_minus_infinity(op, 40),
    "fp32, not finite": lambda op: check_not_finite(op, torch.float32),
    "fp16, not finite": lambda op: check_not_finite(op, torch.float16),
    "bf16, not finite": lambda op: check_not_finite(op, torch.bfloat16, v=41),
}

special = pytest.mark.parametrize("case", SPECIAL.values(), ids=SPECIAL)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
