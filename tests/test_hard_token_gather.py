"""HardTokenGather against plain Python and plain indexing: what is selected, what comes back, gradients."""

import math
from fractions import Fraction

import pytest
import torch
from hard_token_cases import BACKENDS, DTYPES, as_given, hidden, some_mask, with_scores
from op_cases import special_scores

from cascade_fast.hard_token_gather import HardTokenGather
from cascade_fast.selection import hard_count, select_hardest


def expected_rows(scores, mask, ratio, scope):
    """Index and threshold of every selection, in plain Python."""
    s = scores.shape[-1]
    size = s if scope == "sequence" else scores.numel()
    index, thresholds = [], []
    for start in range(0, scores.numel(), size):
        real = [i for i in range(start, start + size) if mask is None or mask.flatten()[i]]
        value = {i: scores.flatten()[i].item() for i in real}
        order = sorted(real, key=lambda i: (math.isnan(value[i]), 0.0 if math.isnan(value[i]) else value[i], i))
        hard = order[: hard_count(ratio, len(real))]
        index += sorted(hard)
        thresholds.append(expected_threshold([value[i] for i in order], len(hard), ratio))
    return torch.tensor(index, dtype=torch.int64), torch.tensor(thresholds)


def expected_threshold(ranked, k, ratio):
    """The quantile where the scores around it are finite; else the k-th score, +inf if that is NaN."""
    if not ranked:
        return -math.inf
    if all(map(math.isfinite, ranked[k - 1 : k + 1])):
        below = Fraction(str(ratio)) * (len(ranked) - 1) - (k - 1)
        return ranked[k - 1] + float(below) * (ranked[min(k, len(ranked) - 1)] - ranked[k - 1])
    return math.inf if math.isnan(ranked[k - 1]) else ranked[k - 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.6, 1.0])
def test_ratio_equals_plain_python(ratio, scope, masked, dtype, backend):
    h_in, h_out = hidden(5, 11, dtype=dtype)
    mask, lengths = some_mask(5, 11) if masked else (None, None)
    label, flag = torch.randint(0, 99, (5, 11)), torch.rand(5, 11) < 0.5
    gather = HardTokenGather(ratio, scope=scope, backend=backend)
    hard = gather(h_in, h_out, mask, carry=(label, flag))
    cosine = torch.cosine_similarity(h_in.float(), h_out.float(), dim=-1)
    torch.testing.assert_close(hard.scores, cosine)
    index, threshold = expected_rows(hard.scores, mask, ratio, scope)
    assert torch.equal(hard.index_K, index)
    assert torch.equal(hard.hidden_KD, h_out.flatten(0, 1)[index])
    assert torch.equal(hard.carried[0], label.flatten()[index])
    assert torch.equal(hard.carried[1], flag.flatten()[index])
    assert hard.threshold.shape == ((5,) if scope == "sequence" else ())
    torch.testing.assert_close(hard.threshold.flatten(), threshold, rtol=1e-6, atol=1e-7, check_dtype=False)
    rows = torch.randn_like(hard.hidden_KD)
    expected = h_out.flatten(0, 1).clone()
    expected[index] = rows
    assert torch.equal(hard.scatter(rows, into=h_out), expected.view_as(h_out))
    if masked:
        counted = gather(h_in, h_out, mask.long(), n_real=lengths if scope == "sequence" else sum(lengths))
        assert torch.equal(counted.index_K, index)
        assert torch.equal(counted.threshold, hard.threshold)


@pytest.mark.parametrize("n", [1, 2, 100, 101, 997])
@pytest.mark.parametrize("ratio", [0.001, 0.29, 1 / 3, 0.6, 0.9, 0.1 + 0.2, 1])
def test_count_and_threshold_are_those_of_the_trainer(ratio, n):
    h_in, h_out = hidden(n)
    hard = HardTokenGather(ratio)(h_in, h_out)
    selection = select_hardest(hard.scores, ratio)
    assert len(hard.index_K) == hard_count(ratio, n)
    assert torch.equal(hard.index_K, selection.index_K)
    assert hard.threshold.item() == selection.threshold


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_threshold_form(scope):
    h_in, h_out = hidden(5, 11)
    mask, _ = some_mask(5, 11)
    gather = HardTokenGather(threshold=0.1178, scope=scope)
    for given in (None, mask, mask.int()):
        hard = gather(h_in, h_out, given)
        wanted = (hard.scores <= 0.1178) & (torch.ones_like(mask) if given is None else mask)
        assert torch.equal(hard.index_K, wanted.flatten().nonzero().squeeze(1))
        assert hard.threshold.shape == ()
        assert hard.threshold.item() == torch.tensor(0.1178).item()


def test_threshold_of_the_ratio_selects_the_same_tokens():
    h_in, h_out = hidden(4, 33)
    for ratio in (0.1, 0.6, 1.0):
        hard = HardTokenGather(ratio)(h_in, h_out)
        assert torch.equal(HardTokenGather(threshold=hard.threshold)(h_in, h_out).index_K, hard.index_K)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_take_the_first_position(backend):
    h = with_scores([1.0, 0.0, 1.0, 1.0, 1.0], [-0.0, 0.0, 0.0, -0.0, 0.0])
    by_sequence = HardTokenGather(0.5, scope="sequence", criterion=as_given, backend=backend)(h, h)
    assert by_sequence.index_K.tolist() == [0, 1, 2, 5, 6, 7]
    assert by_sequence.threshold.tolist() == [1.0, 0.0]
    ragged = HardTokenGather(0.5, scope="sequence", criterion=as_given, backend=backend)(
        h, h, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    )
    assert ragged.index_K.tolist() == [0, 1, 2, 5, 6]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_nan_comes_last_and_padding_never(scope, backend):
    nan, inf = math.nan, math.inf
    h = with_scores([nan, 3.0, -inf, inf, nan, inf, inf, 5.0, nan])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    for ratio, expected, threshold in (
        (0.1, [2], -inf),
        (0.2, [1, 2], 3.0),
        (0.4, [1, 2, 3], inf),
        (0.6, [1, 2, 3, 5], inf),  # the NaN at 0 comes after the +inf at 5
        (0.9, [0, 1, 2, 3, 5], inf),
        (1.0, [0, 1, 2, 3, 4, 5], inf),
    ):
        gather = HardTokenGather(ratio, scope=scope, criterion=as_given, backend=backend)
        for given in ({"mask": mask}, {"mask": mask, "n_real": 6 if scope == "batch" else [6]}):
            hard = gather(h, h, **given)
            assert hard.index_K.tolist() == expected
            assert hard.threshold.item() == threshold
            assert hard.scores.isnan().any()  # as the criterion gave them
        unmasked = gather(h[:, :6], h[:, :6])
        assert unmasked.index_K.tolist() == expected
        assert unmasked.threshold.item() == threshold
    assert HardTokenGather(threshold=inf, criterion=as_given)(h, h, mask).index_K.tolist() == [1, 2, 3, 5]
    assert HardTokenGather(threshold=inf, criterion=as_given)(h, h).index_K.tolist() == [1, 2, 3, 5, 6, 7]
    assert HardTokenGather(threshold=-inf, criterion=as_given)(h, h).index_K.tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_every_kind_of_score_equals_plain_python(scope, dtype, backend):
    """NaN of both signs, infinities, zeros, subnormals; no mask, one of equal lengths, one of different lengths."""
    h = torch.zeros(6, 40, 2)
    h[..., 0] = special_scores(6, 40)
    h = h.to(dtype)
    scattered = torch.stack([torch.randperm(40) < 25 for _ in range(6)])
    for mask in (None, scattered, some_mask(6, 40)[0], torch.rand(6, 40) < 0.6):
        for ratio in (0.05, 0.5, 0.8, 0.9, 1.0):
            hard = HardTokenGather(ratio, scope=scope, criterion=as_given, backend=backend)(h, h, mask)
            index, threshold = expected_rows(h[..., 0].float(), mask, ratio, scope)
            assert torch.equal(hard.index_K, index)
            assert torch.equal(hard.threshold.flatten(), threshold)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_with_a_mask_of_labelled_tokens_context_is_as_if_it_were_not_there(scope, backend):
    """Whatever it scores, NaN and infinities included, it is not selected and has no part in the quantile."""
    labels = torch.full((4, 12), -100)
    counts = (7, 1, 0, 5)  # of tokens with a label, spread over each sequence
    for row, count in enumerate(counts):
        labels[row, torch.randperm(12)[:count]] = 3
    labelled = labels != -100
    h = with_scores(*torch.randn(4, 12).tolist())
    h[0, ~labelled[0], 0] = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -100.0])
    h[2, :, 0] = -math.inf
    h[3, ~labelled[3], 0] = -1e9
    place = labelled.flatten().nonzero().squeeze(1)
    rows = [h.flatten(0, 1)[place]] if scope == "batch" else [h[row, labelled[row]] for row in range(4)]
    for ratio in (0.1, 0.5, 0.9, 1.0):
        hard = HardTokenGather(ratio, scope=scope, criterion=as_given, backend=backend)(h, h, labelled, carry=[labels])
        alone = [HardTokenGather(ratio, criterion=as_given, backend=backend)(one, one) for one in rows]
        assert torch.equal(hard.hidden_KD, torch.cat([one.hidden_KD for one in alone]))
        torch.testing.assert_close(hard.threshold.flatten(), torch.stack([one.threshold for one in alone]))
        assert (hard.carried[0] == 3).all()
        spread = hard.scatter(torch.zeros_like(hard.hidden_KD), into=h)
        torch.testing.assert_close(spread[~labelled], h[~labelled], rtol=0, atol=0, equal_nan=True)
    for threshold in (-math.inf, 0.0, math.inf):
        hard = HardTokenGather(threshold=threshold, scope=scope, criterion=as_given)(h, h, labelled)
        assert torch.equal(hard.index_K, ((h[..., 0] <= threshold) & labelled).flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (1,), (1, 1), (7,), (2, 3, 4)], ids=str)
def test_sizes(shape, scope):
    h_in, h_out = hidden(*shape)
    n = math.prod(shape)
    rows = shape[:-1] if scope == "sequence" else ()
    for mask in (None, torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        hard = HardTokenGather(1.0, scope=scope)(h_in, h_out, mask, carry=[torch.zeros(shape)])
        k = 0 if mask is not None and not mask.any() else n
        assert hard.hidden_KD.shape == (k, 12)
        assert hard.carried[0].shape == (k,)
        assert hard.threshold.shape == rows
        assert k or (hard.threshold == -math.inf).all()
        assert hard.scatter(hard.hidden_KD, into=h_out).shape == h_out.shape
        assert HardTokenGather(threshold=2.0, scope=scope)(h_in, h_out, mask).index_K.shape == (k,)


def test_zero_vectors_score_zero():
    h_in, h_out = torch.zeros(4, 6), torch.randn(4, 6)
    hard = HardTokenGather(threshold=0.0)(h_in, h_out)
    assert hard.scores.tolist() == [0.0] * 4
    assert len(hard.index_K) == 4


def test_any_strides():
    h_in, h_out = torch.randn(9, 5, 24)[..., ::2].transpose(0, 1), torch.randn(12, 5, 9).permute(1, 2, 0)
    mask, label = torch.rand(9, 5).t() < 0.8, torch.randint(0, 9, (9, 5)).t()
    into = torch.randn(9, 5, 7).transpose(0, 1)
    for scope in ("batch", "sequence"):
        gather = HardTokenGather(0.6, scope=scope)
        hard = gather(h_in, h_out, mask, carry=(label,))
        dense = gather(h_in.contiguous(), h_out.contiguous(), mask.contiguous(), carry=(label.contiguous(),))
        assert torch.equal(hard.index_K, dense.index_K)
        assert torch.equal(hard.hidden_KD, dense.hidden_KD)
        assert torch.equal(hard.carried[0], dense.carried[0])
        rows = torch.randn(7, len(hard.index_K)).t()
        assert torch.equal(hard.scatter(rows, into=into), dense.scatter(rows, into=into.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("add", [False, True], ids=["replace", "add"])
def test_gradients_equal_plain_indexing(add, dtype, backend):
    h_in, h_out = hidden(3, 7, dtype=dtype)
    into, weight = torch.randn(3, 7, 12).to(dtype), torch.randn(3, 7, 12).to(dtype)
    ours = h_out.clone().requires_grad_(), into.clone().requires_grad_()
    hard = HardTokenGather(0.4, backend=backend)(h_in, ours[0])
    (hard.scatter(hard.hidden_KD * 2, into=ours[1], add=add) * weight).sum().backward()

    plain = h_out.clone().requires_grad_(), into.clone().requires_grad_()
    index = hard.index_K
    rows = plain[0].flatten(0, 1)[index] * 2
    into_ND = plain[1].flatten(0, 1)
    full = into_ND.index_add(0, index, rows) if add else into_ND.index_put((index,), rows)
    (full.view_as(into) * weight).sum().backward()
    assert torch.equal(ours[0].grad, plain[0].grad)
    assert torch.equal(ours[1].grad, plain[1].grad)
    untouched = torch.ones(21, dtype=torch.bool).index_fill(0, index, False).view(3, 7)
    assert torch.equal(ours[1].grad[untouched], weight[untouched])
    assert torch.equal(ours[1].grad[~untouched], weight[~untouched] if add else torch.zeros_like(weight[~untouched]))


def test_scores_are_differentiable_as_a_router_needs_it():
    h_in, h_out = hidden(2, 5)
    plain = h_out.clone().requires_grad_()
    torch.cosine_similarity(h_in, plain, dim=-1).sum().backward()
    h_out.requires_grad_()
    HardTokenGather(0.5)(h_in, h_out).scores.sum().backward()
    torch.testing.assert_close(h_out.grad, plain.grad)

    class Router(torch.nn.Linear):
        def forward(self, h_in_ND, h_out_ND, *, logits=None):
            return super().forward(h_out_ND).squeeze(1)

    gather = HardTokenGather(0.5, criterion=Router(12, 1))
    hard = gather(h_in, h_out.detach())
    (hard.hidden_KD * hard.scores.flatten()[hard.index_K].unsqueeze(1)).sum().backward()
    assert gather.state_dict().keys() == {"criterion.weight", "criterion.bias"}
    assert gather.criterion.weight.grad.abs().sum() > 0
