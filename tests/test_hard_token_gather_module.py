"""HardTokenGather as a module: pickle, copy, repr, errors; and its page of the documentation."""

import copy
import math
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from hard_token_cases import as_given, hidden

from cascade_fast.hard_token_gather import HardTokenGather


@pytest.mark.parametrize(
    "gather",
    [
        HardTokenGather(0.6, backend="reference"),
        HardTokenGather(hard_ratio=0.25, scope="sequence", criterion="entropy"),
        HardTokenGather(threshold=0.1178, criterion=as_given),
    ],
    ids=["ratio", "entropy", "threshold"],
)
def test_pickle_deepcopy_repr_and_state(gather):
    h_in, h_out = hidden(3, 8)
    logits = torch.randn(3, 8, 20)
    hard = gather(h_in, h_out, logits=logits)
    here, there = multiprocessing.Pipe()  # what takes a module to a worker process pickles it
    there.send(gather)
    for other in (copy.deepcopy(gather), here.recv()):
        assert repr(other) == repr(gather)
        again = other(h_in, h_out, logits=logits)
        assert torch.equal(again.index_K, hard.index_K)
        assert torch.equal(again.threshold, hard.threshold)
    assert gather.state_dict() == {}
    assert not list(gather.parameters())
    assert torch.equal(copy.deepcopy(hard).scatter(hard.hidden_KD, into=h_out), h_out)


def test_repr():
    assert repr(HardTokenGather(hard_ratio=0.6)) == (
        "HardTokenGather(hard_ratio=0.6, scope='batch', criterion='cosine', backend='auto')"
    )
    assert repr(HardTokenGather(threshold=0.1178, scope="sequence", backend="reference")) == (
        "HardTokenGather(threshold=0.1178, scope='sequence', criterion='cosine', backend='reference')"
    )


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "hard_ratio: None, threshold: None; exactly one"),
        ({"hard_ratio": 0.5, "threshold": 0.1}, "hard_ratio: 0.5, threshold: 0.1; exactly one"),
        ({"hard_ratio": 0.0}, r"hard_ratio: 0.0; must be in \(0, 1\]"),
        ({"hard_ratio": math.nan}, r"hard_ratio: nan; must be in \(0, 1\]"),
        ({"hard_ratio": 1.1}, r"hard_ratio: 1.1; must be in \(0, 1\]"),
        ({"hard_ratio": "most"}, "hard_ratio: 'most'; must be a number"),
        ({"threshold": math.nan}, "threshold: nan; must not be NaN"),
        ({"threshold": torch.zeros(2)}, r"threshold: tensor\(\[0., 0.\]\); must be a number"),
        ({"hard_ratio": 0.5, "scope": "token"}, "scope: 'token'; must be one of 'batch', 'sequence'"),
        ({"hard_ratio": 0.5, "backend": "gpu"}, "backend: 'gpu'; must be one of 'auto', 'reference'"),
        (
            {"hard_ratio": 0.5, "criterion": "loss"},
            "criterion: 'loss'; must be a callable or one of 'cosine', 'entropy'",
        ),
    ],
)
def test_settings_that_are_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        HardTokenGather(**settings)


H = torch.zeros(2, 5, 4)
ONES = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((H, H.double()), {}, r"h_out: \(2, 5, 4\) float64 on cpu; must be float32"),
        ((H[0, 0], H[0, 0]), {}, r"h_out: \(4,\) float32 on cpu; must be .*\(B, S, D\) or \(N, D\)"),
        ((H[:1], H), {}, r"h_in: \(1, 5, 4\) float32 on cpu; must have the shape of h_out, \(2, 5, 4\)"),
        ((H.half(), H), {}, "h_out: .*; must have the dtype of h_in"),
        ((H, H, ONES[:, :4]), {}, r"mask: \(2, 4\) bool on cpu; must be bool or integers of shape \(2, 5\)"),
        ((H, H, ONES.float()), {}, r"mask: \(2, 5\) float32 on cpu; must be bool or integers"),
        ((H, H), {"n_real": 10}, "n_real: 10; must only be given with a mask"),
        ((H, H, ONES), {"n_real": 9}, r"n_real: 9; must be the mask's number of real tokens, \[10\]"),
        ((H, H, ONES), {"n_real": [5, 5]}, r"n_real: \[5, 5\]; must be 1 count\(s\) between 0 and 10"),
        ((H, H, ONES), {"n_real": 11}, r"n_real: 11; must be 1 count\(s\) between 0 and 10"),
        ((H, H), {"carry": torch.zeros(2, 5)}, r"carry: a tensor \(2, 5\) float32 on cpu; must be a tuple or list"),
        ((H, H), {"carry": [ONES, ONES[0]]}, r"carry\[1\]: \(5,\) bool on cpu; must have shape \(2, 5\)"),
        ((H, H), {"logits": H[0]}, r"logits: \(5, 4\) float32 on cpu; must have shape \(2, 5, any\)"),
    ],
)
def test_arguments_that_are_wrong(args, options, message):
    with pytest.raises(ValueError, match=message):
        HardTokenGather(0.5)(*args, **options)


def test_other_errors():
    with pytest.raises(ValueError, match="logits: None; criterion 'entropy' needs the logits"):
        HardTokenGather(0.5, criterion="entropy")(H, H)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run cosine_score"):
        HardTokenGather(0.5, backend="cuda")(H, H)
    hard = HardTokenGather(0.5)(H, H)
    with pytest.raises(ValueError, match=r"into: \(10, 4\) float32 on cpu; must have shape \(2, 5, any\)"):
        hard.scatter(hard.hidden_KD, into=H.flatten(0, 1))
    with pytest.raises(ValueError, match=r"rows: \(4, 4\) float32 on cpu; must have shape \(5, 4\)"):
        hard.scatter(hard.hidden_KD[:4], into=H)
    with pytest.raises(ValueError, match=r"rows: .*; must have the dtype of into"):
        hard.scatter(hard.hidden_KD.half(), into=H)


@pytest.mark.usefixtures("own_criteria")
def test_the_page_runs():
    page = Path(__file__).parent.parent / "docs" / "hard-token-gather.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
