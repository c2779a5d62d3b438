"""Counts, thresholds and the rule of inference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_fast.selection import (
    NonFiniteScores,
    check_finite,
    hard_count,
    quantile_threshold,
    select_below,
    select_hardest,
)


def test_counts_of_the_original_experiment():
    train = [128_000]
    val = [12_800]
    for _ in range(3):
        train.append(hard_count(0.9, train[-1]))
        val.append(hard_count(0.9, val[-1]))
    assert train[1:] == [115_200, 103_680, 93_312]
    assert val[1:] == [11_520, 10_368, 9_331]


def test_counts_are_of_the_decimal_number_as_written():
    assert hard_count(0.29, 101) == 30  # 0.29 * 100 is 28.999... in binary
    assert [hard_count(r, 1) for r in (0.01, 0.5, 1.0)] == [1, 1, 1]
    assert hard_count(1.0, 77) == 77
    assert hard_count(0.5, 0) == 0


@given(n=st.integers(1, 300), r=st.integers(1, 1000).map(lambda i: i / 1000), seed=st.integers(0, 1000))
def test_selection_is_the_quantile_rule(n, r, seed):
    scores = torch.randperm(4 * n, generator=torch.Generator().manual_seed(seed))[:n].float() / 7
    selection = select_hardest(scores, r)
    expected = torch.quantile(scores.double(), r)
    assert selection.threshold == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(selection.index_K, select_below(scores, selection.threshold))
    assert len(selection.index_K) == hard_count(r, n)


def test_ties_take_the_lowest_index_so_that_the_count_holds():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    selection = select_hardest(scores, 0.5)  # floor(0.5 * 4) + 1 = 3
    assert selection.index_K.tolist() == [0, 1, 2]
    assert selection.threshold == 1.0


def test_threshold_never_reaches_the_next_score():
    one = torch.tensor(1.0)
    following = torch.nextafter(one, torch.tensor(2.0)).item()  # nothing lies between in float32
    assert quantile_threshold(1.0, following, hard_ratio=0.9, n=10) == 1.0


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="1 of 3 are not finite, the first at token 1"):
        select_hardest(torch.tensor([0.0, torch.nan, 1.0]), 0.5)
    scores = torch.tensor([0.0, 0.0, torch.inf])
    with pytest.raises(NonFiniteScores, match="sequence 7, position 2"):
        check_finite(scores, torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="scores: empty"):
        select_hardest(torch.empty(0), 0.5)
    with pytest.raises(ValueError, match=r"hard_ratio: 0.0; must be in \(0, 1\]"):
        select_hardest(torch.zeros(3), 0.0)
