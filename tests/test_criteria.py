"""Criteria: entropy, registered names, and the check of what a criterion returns."""

import math

import pytest
import torch
from hard_token_cases import DTYPES, as_given, hidden
from torch.utils._python_dispatch import TorchDispatchMode

from cascade_fast import criteria, losses
from cascade_fast.criteria import CRITERIA, register_criterion, score_tokens, token_entropy
from cascade_fast.hard_token_gather import HardTokenGather


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_entropy(dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)  # 16 tokens a chunk
    logits = (torch.randn(3, 21, 40) * 3).to(dtype)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(token_entropy(logits).double(), expected.flatten(), rtol=1e-5, atol=1e-6)
    h_in, h_out = hidden(3, 21, dtype=dtype)
    hard = HardTokenGather(0.3, criterion="entropy")(h_in, h_out, logits=logits)
    torch.testing.assert_close(hard.scores, -expected.float(), rtol=1e-5, atol=1e-6)
    flat = HardTokenGather(0.3, criterion="entropy")(
        h_in.flatten(0, 1), h_out.flatten(0, 1), logits=logits.flatten(0, 1)
    )
    assert torch.equal(flat.index_K, hard.index_K)


def test_entropy_ignores_impossible_tokens_and_takes_no_tokens():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]])
    torch.testing.assert_close(token_entropy(logits), torch.tensor([math.log(2), 0.0]))
    assert token_entropy(torch.empty(0, 9)).shape == token_entropy(torch.empty(2, 0, 9)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_entropy_makes_no_second_array_of_the_logits_size(dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # A view has the storage of the logits; what is new has its own.
            new = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != storage
            largest = max(largest, out.numel() if new else 0)
            return out

    logits = torch.randn(4, 65, 50).to(dtype)[:, :-1]  # the usual shift: not contiguous
    storage = logits.untyped_storage().data_ptr()
    with Watch():
        token_entropy(logits)
    assert 0 < largest <= 16 * 50


def test_registering_a_criterion(monkeypatch):
    monkeypatch.setattr(criteria, "CRITERIA", dict(CRITERIA))
    assert register_criterion("first feature")(as_given) is as_given
    h_in, h_out = hidden(2, 5)
    named = HardTokenGather(0.5, criterion="first feature")(h_in, h_out)
    assert torch.equal(named.scores, h_out[..., 0])
    with pytest.raises(ValueError, match="name: 'cosine'; must not be taken"):
        register_criterion("cosine")
    with pytest.raises(ValueError, match="name: ''; must be a string"):
        register_criterion("")


@pytest.mark.parametrize(
    "returned", [torch.zeros(10, 1), torch.zeros(9), torch.zeros(10, dtype=torch.int64), 0.5, torch.zeros(2, 5)]
)
def test_what_a_criterion_returns_is_checked(returned):
    h_in, h_out = hidden(10)
    with pytest.raises(ValueError, match=r"criterion: .* returned .*; must return a float tensor of shape \(10,\)"):
        score_tokens(lambda h_in_ND, h_out_ND, *, logits: returned, h_in, h_out)
