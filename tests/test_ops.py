"""Every operator on every backend the CPU has: outputs, gradients, edge cases, determinism, errors.

The oracle is float64 or numpy. A kernel may be off by what plain torch is off at that dtype, plus TOLERANCES.
Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows.
"""

import copy

import numpy as np
import op_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from cascade_fast import ops
from cascade_fast.ops import reference

NATIVE = torch.ops.cascade_fast

# Added to torch's own error. Scores are float32 whatever the input; gradients are rounded to the input's dtype, so
# theirs is half a unit in the last place of a value of about 1.
SCORE_TOLERANCE = 1e-6
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

hypothesis_settings = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(params=["reference", "cpp"])
def backend(request) -> str:
    return cases.need(request.param)


@pytest.fixture(autouse=True)
def _empty_is_filled():
    """torch.empty, from Python and from C++, comes filled with NaN (or the largest integer): no output by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_empty_is_filled():
    assert torch.empty(3).isnan().all()


# --- cosine_score ----------------------------------------------------------------------------------------------------


def assert_no_worse(ours, torchs, truth, tolerance):
    """|ours - truth| <= max |torch - truth| + tolerance, elementwise in ours."""
    if truth.numel() == 0:
        assert ours.shape == truth.shape
        return
    allowed = (torchs.double() - truth).abs().max() + tolerance
    assert (ours.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), cases.SHAPES)
def test_cosine_score(backend, n, d, dtype):
    h_in_ND, h_out_ND = cases.hidden_pair(n, d, dtype)
    scores_N = ops.cosine_score(h_in_ND, h_out_ND, backend=backend)
    assert scores_N.dtype == torch.float32
    assert scores_N.is_contiguous()
    in_float32 = cases.cosine_eager(h_in_ND.float(), h_out_ND.float())
    assert_no_worse(scores_N, in_float32, cases.cosine_truth(h_in_ND, h_out_ND), SCORE_TOLERANCE)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_cosine_score_layouts(backend, layout, dtype):
    h_in_ND, h_out_ND = cases.hidden_pair(21, 67, dtype)
    strided_ND = cases.with_layout(h_in_ND, layout)
    expected_N = ops.cosine_score(strided_ND.contiguous(), h_out_ND, backend=backend)
    atol = 0 if backend == "cpp" else SCORE_TOLERANCE  # torch sums in another order in other layouts
    for pair in ((strided_ND, h_out_ND), (h_out_ND, strided_ND)):
        scores_N = ops.cosine_score(*pair, backend=backend)
        torch.testing.assert_close(scores_N, expected_N, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_cosine_score_special_values(backend, dtype):
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e18
    subnormal = 2.0**-24 if dtype == torch.float16 else 1e-15
    rows = [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (largest, 1.0), (largest, -largest), (torch.inf, 1.0), (torch.nan, 1.0)]
    a_ND = torch.tensor([a for a, _ in rows] + [subnormal]).unsqueeze(1).expand(-1, 40).to(dtype)
    b_ND = torch.tensor([b for _, b in rows] + [1.0]).unsqueeze(1).expand(-1, 40).to(dtype)
    scores_N = ops.cosine_score(a_ND, b_ND, backend=backend)
    truth_N = cases.cosine_truth(a_ND, b_ND).float()  # the last one is not 1: the 1e-8 counts there
    torch.testing.assert_close(scores_N, truth_N, atol=2e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_cosine_score_gradients(backend, wanted, dtype):
    inputs = cases.hidden_pair(17, 45, dtype)
    grad_N = torch.linspace(-1, 1, 17)

    def gradients(score, cast):
        leaves = [cast(t).detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        score(*leaves).backward(cast(grad_N))
        return [leaf.grad for leaf in leaves]

    ours = gradients(lambda a, b: ops.cosine_score(a, b, backend=backend).to(dtype), lambda t: t.to(dtype))
    torchs = gradients(cases.cosine_eager, lambda t: t.to(dtype))
    # The gradient that arrives is rounded to dtype, for ours as for torch's; the truth sees the same one.
    truth = gradients(cases.cosine_truth, lambda t: t.to(dtype).double())
    for our, torch_s, true, is_wanted in zip(ours, torchs, truth, wanted, strict=True):
        assert (our is not None) == is_wanted
        if is_wanted:
            assert our.dtype == dtype
            assert_no_worse(our, torch_s, true, TOLERANCES[dtype] * true.abs().max())


def test_cosine_score_backward_is_the_derivative():
    a_ND, b_ND = (t.double().requires_grad_() for t in cases.hidden_pair(4, 5, torch.float32))
    assert torch.autograd.gradcheck(cases.cosine_truth, (a_ND, b_ND))  # the truth's own gradient, by differences
    grad_N = torch.tensor([1.0, -2.0, 0.5, 0.0])
    truth = torch.autograd.grad(cases.cosine_truth(a_ND, b_ND), (a_ND, b_ND), grad_N.double())
    ours = reference.cosine_score_backward(grad_N, a_ND.detach().float(), b_ND.detach().float())
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our, true.float(), atol=1e-6, rtol=1e-5)


def test_cosine_score_gradient_of_a_zero_row_is_finite(backend):
    a_ND = torch.zeros(2, 6, requires_grad=True)
    b_ND = torch.ones(2, 6, requires_grad=True)
    ops.cosine_score(a_ND, b_ND, backend=backend).sum().backward()
    assert a_ND.grad.isfinite().all()
    assert torch.equal(b_ND.grad, torch.zeros(2, 6))


# --- select_hard -----------------------------------------------------------------------------------------------------


def assert_selects(scores_N, k, backend):
    index_K, bounds_2 = ops.select_hard(scores_N, k, backend=backend)
    cases.assert_selected(index_K[None], bounds_2[None], scores_N[None], k)


@pytest.mark.parametrize("name", cases.score_cases())
def test_select_hard(backend, name):
    scores_N = cases.score_cases()[name]
    n = scores_N.shape[0]
    for k in sorted({0, 1, n // 3, n // 2, n - 1, n} & set(range(n + 1))):
        assert_selects(scores_N, k, backend)


@pytest.mark.parametrize("flush", [False, True], ids=["", "subnormals flushed"])
@pytest.mark.parametrize("shape", [(40, 9), (4, 300), (2, 3001), (1, 270_000)], ids=str)
def test_select_hard_orders_every_kind_of_float(backend, shape, flush):
    scores_BN = cases.special_scores(*shape)
    n = shape[1]
    numbers = n - int(scores_BN[0].isnan().sum())  # the k from which on NaN is taken
    for k in sorted({0, 1, n // 2, numbers - 1, numbers, numbers + 1, n} & set(range(n + 1))):
        torch.set_flush_denormal(flush)
        try:
            index_BK, bounds_B2 = ops.select_hard(scores_BN, k, backend=backend)
        finally:
            torch.set_flush_denormal(False)
        cases.assert_selected(index_BK, bounds_B2, scores_BN, k)


def test_the_oracle_of_the_selection_knows_one_nan():
    scores_N = cases.special_scores(500)
    nan_N = scores_N.isnan()
    assert len(scores_N[nan_N].view(torch.int32).unique()) == 6  # of both signs
    for k in (0, 100, 500 - int(nan_N.sum()), 480, 500):
        index_K, bounds_2 = cases.select_truth(scores_N, k)
        ranked = sorted(range(500), key=lambda i: (bool(nan_N[i]), 0.0 if nan_N[i] else scores_N[i].item(), i))
        assert index_K.tolist() == sorted(ranked[:k])
        one_nan = torch.tensor(torch.nan).view(torch.int32)
        assert (bounds_2.view(torch.int32)[bounds_2.isnan()] == one_nan).all()


@pytest.mark.parametrize("name", ["reference", "cpp"])
@given(data=st.data())
@hypothesis_settings
def test_select_hard_any_floats(name, data):
    cases.need(name)
    any_float = st.floats(width=32, allow_nan=True, allow_infinity=True)
    from_few = st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-45])
    values = data.draw(st.lists(any_float, max_size=80) | st.lists(from_few, max_size=80))
    assert_selects(torch.tensor(values, dtype=torch.float32), data.draw(st.integers(0, len(values))), name)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@given(
    batch=st.integers(0, 5),
    n=st.integers(1, 70_000),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 3, 1000, 10**7]),
)
@settings(hypothesis_settings, max_examples=15)
def test_select_hard_batches(name, batch, n, share, levels):
    cases.need(name)
    k = round(share * n)
    scores_BN = torch.rand(batch, n, generator=torch.Generator().manual_seed(n)).mul(levels).round().div(levels)
    index_BK, bounds_B2 = ops.select_hard(scores_BN, k, backend=name)
    cases.assert_selected(index_BK, bounds_B2, scores_BN, k)


def test_select_hard_strided(backend):
    scores_BN = torch.randn(5, 1001)
    expected = ops.select_hard(scores_BN, 100, backend=backend)
    for strided in (scores_BN.t().contiguous().t(), scores_BN.repeat_interleave(2, 1)[:, ::2]):
        for ours, true in zip(ops.select_hard(strided, 100, backend=backend), expected, strict=True):
            assert torch.equal(ours, true)
    expanded = ops.select_hard(scores_BN[:1].expand(3, -1), 100, backend=backend)[0]
    assert torch.equal(expanded, expected[0][:1].expand(3, -1))


def test_select_hard_takes_more_scores_than_torch_quantile():
    n = 2**24 + 5
    scores_N = torch.rand(n, generator=torch.Generator().manual_seed(0)).mul_(2**20).round_()  # about 16 ties each
    k = n // 3
    index_K, bounds_2 = ops.select_hard(scores_N, k, backend=cases.need("cpp"))
    values = scores_N.numpy()
    kth, following = np.partition(values, (k - 1, k))[k - 1 : k + 1]
    ties = np.flatnonzero(values == kth)[: k - np.count_nonzero(values < kth)]
    chosen = values < kth
    chosen[ties] = True
    assert index_K.shape == (k,)
    assert np.array_equal(index_K.numpy(), np.flatnonzero(chosen))
    assert bounds_2.tolist() == [kth, following]


def test_select_hard_has_no_gradient(backend):
    index_K, bounds_2 = ops.select_hard(torch.randn(9, requires_grad=True), 3, backend=backend)
    assert not index_K.requires_grad
    assert not bounds_2.requires_grad


# --- gather_rows, scatter_rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("k", [0, 1, 11, 23])
def test_gather_rows(backend, k, layout, dtype):
    hidden_ND = cases.with_layout(cases.hidden_pair(23, 37, dtype)[0], layout)
    index_K = cases.some_index(23, k).repeat_interleave(2)[::2]  # a strided index
    carried = cases.carried_arrays(23)
    hidden_KD, gathered = ops.gather_rows(hidden_ND, index_K, carried, backend=backend)
    assert hidden_KD.is_contiguous()
    assert torch.equal(cases.bits(hidden_KD), cases.bits(hidden_ND[index_K]))
    assert len(gathered) == len(carried)
    for ours_K, array_N in zip(gathered, carried, strict=True):
        assert ours_K.dtype == array_N.dtype
        assert torch.equal(cases.bits(ours_K), cases.bits(array_N[index_K]))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("k", [0, 1, 11, 23])
@pytest.mark.parametrize("add", [False, True])
def test_scatter_rows(backend, add, k, layout, dtype):
    base_ND, other_ND = cases.hidden_pair(23, 37, dtype)
    into_ND = cases.with_layout(base_ND, layout)
    rows_KD = cases.with_layout(other_ND[:k], layout) if k else other_ND[:0]
    index_K = cases.some_index(23, k, ascending=False)
    before = into_ND.clone()
    out_ND = ops.scatter_rows(rows_KD, index_K, into_ND, add=add, backend=backend)
    assert torch.equal(into_ND, before)
    assert out_ND.is_contiguous()
    assert torch.equal(cases.bits(out_ND), cases.bits(cases.scatter_truth(rows_KD, index_K, into_ND, add)))


@pytest.mark.parametrize("name", ["reference", "cpp"])
@given(n=st.integers(0, 40), d=st.integers(0, 70), share=st.floats(0, 1), dtype=st.sampled_from(cases.DTYPES))
@hypothesis_settings
def test_gather_then_scatter_is_the_identity(name, n, d, share, dtype):
    cases.need(name)
    hidden_ND, other_ND = cases.hidden_pair(n, d, dtype, seed=n)
    index_K = cases.some_index(n, round(share * n), seed=d)
    rows_KD, (positions_K,) = ops.gather_rows(hidden_ND, index_K, [torch.arange(n)], backend=name)
    assert torch.equal(positions_K, index_K)
    assert torch.equal(ops.scatter_rows(rows_KD, index_K, hidden_ND, backend=name), hidden_ND)
    blank_ND = ops.scatter_rows(rows_KD, index_K, torch.zeros_like(hidden_ND), backend=name)
    assert torch.equal(blank_ND[index_K], rows_KD)
    assert blank_ND.count_nonzero() == rows_KD.count_nonzero()
    added_ND = ops.scatter_rows(rows_KD, index_K, other_ND, add=True, backend=name)
    assert torch.equal(added_ND, cases.scatter_truth(rows_KD, index_K, other_ND, add=True))


def test_gather_and_scatter_reach_beyond_2_to_the_31_elements(backend):
    torch.use_deterministic_algorithms(False)  # filling this much memory would only take time; it stays untouched
    hidden_ND = torch.empty(2**16 + 2, 2**15, dtype=torch.float16)  # 4 GB of addresses
    hidden_ND[-1] = 3.0
    hidden_ND[0] = 1.0
    last_first_KD, _ = ops.gather_rows(hidden_ND, torch.tensor([2**16 + 1, 0]), backend=backend)
    assert last_first_KD.unique(dim=1).flatten().tolist() == [3.0, 1.0]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gather_rows_gradient(backend, dtype):
    hidden_ND = cases.hidden_pair(12, 9, dtype)[0].requires_grad_()
    index_K, grad_KD = cases.some_index(12, 5), cases.hidden_pair(5, 9, dtype, seed=3)[0]
    hidden_KD, (carried_K,) = ops.gather_rows(hidden_ND, index_K, [torch.randn(12)], backend=backend)
    assert not carried_K.requires_grad
    hidden_KD.backward(grad_KD)
    assert torch.equal(hidden_ND.grad, cases.scatter_truth(grad_KD, index_K, torch.zeros_like(hidden_ND), add=False))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_scatter_rows_gradients(backend, wanted, add):
    base_ND, other_ND = cases.hidden_pair(12, 9, torch.float32)
    rows_KD, into_ND = other_ND[:5].clone().requires_grad_(wanted[0]), base_ND.clone().requires_grad_(wanted[1])
    index_K, grad_ND = cases.some_index(12, 5), torch.randn(12, 9).t().contiguous().t()
    ops.scatter_rows(rows_KD, index_K, into_ND, add=add, backend=backend).backward(grad_ND)
    kept_ND = grad_ND if add else grad_ND.index_fill(0, index_K, 0.0)
    assert (rows_KD.grad is None) if not wanted[0] else torch.equal(rows_KD.grad, grad_ND[index_K])
    assert (into_ND.grad is None) if not wanted[1] else torch.equal(into_ND.grad, kept_ND)


def test_gradcheck_of_the_reference():
    hidden_ND, index_K = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0])
    rows_KD = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: reference.gather_rows(h, index_K, [])[0], hidden_ND)
    assert torch.autograd.gradcheck(lambda r, h: reference.scatter_rows(r, index_K, h, False), (rows_KD, hidden_ND))


# --- every op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [*ops.SELECTION_OPS, "adamw8bit"])
def test_runs_and_thread_counts_agree_bit_for_bit(backend, threads, op):
    args, keywords = cases.one_call_of_each(20_011, 24, scores=700_001)[op]
    results = []
    for count in (1, 2, 2, 5):
        threads(count)
        own = copy.deepcopy(args)  # some operators change theirs
        results.append(cases.flat((getattr(NATIVE, op)(*own, **keywords, backend=backend), own)))
    for others in results[1:]:
        assert all(torch.equal(cases.bits(a), cases.bits(b)) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("op", [*ops.SELECTION_OPS, "adamw8bit"])
def test_opcheck(backend, op):
    args, keywords = cases.one_call_of_each(10, 6)[op]
    trainable = [a.clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args]
    opcheck(getattr(NATIVE, op).default, tuple(trainable), {**keywords, "backend": backend})


# Inductor compiles C++ for seconds, and calls the same operators: once is enough.
@pytest.mark.parametrize(
    ("name", "compiler", "dynamic"),
    [
        ("reference", "aot_eager", False),
        ("cpp", "aot_eager", False),
        ("cpp", "aot_eager", True),
        ("cpp", "inductor", True),
    ],
)
def test_compiles_as_one_graph(name, compiler, dynamic):
    backend = cases.need(name)

    def pipeline(h_in_ND, h_out_ND, k):
        scores_N = ops.cosine_score(h_in_ND, h_out_ND, backend=backend)
        index_K, bounds_2 = ops.select_hard(scores_N, k, backend=backend)
        rows_KD, (scores_K,) = ops.gather_rows(h_out_ND, index_K, [scores_N.detach()], backend=backend)
        out_ND = ops.scatter_rows(rows_KD * 2, index_K, h_in_ND, add=True, backend=backend)
        return out_ND.sum() + scores_N.sum(), scores_K, bounds_2

    torch.compiler.reset()
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=dynamic, backend=compiler)
    grads = []
    for run in (pipeline, compiled):
        inputs = [t.requires_grad_() for t in cases.hidden_pair(40, 16, torch.float32)]
        loss, *rest = run(*inputs, 13)
        loss.backward()
        grads.append([loss.detach(), *rest, *(t.grad for t in inputs)])
    for eager, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager)


H, INDEX = torch.zeros(4, 3), torch.tensor([0, 2])
BAD_CALLS = {
    "1-d h_in": (lambda b: ops.cosine_score(H[0], H[0], backend=b), ValueError, r"h_in: \(3,\).*2 dimensions"),
    "shape of h_out": (lambda b: ops.cosine_score(H, H[:2], backend=b), ValueError, r"h_out: \(2, 3\).*\(4, 3\)"),
    "dtype of h_in": (lambda b: ops.cosine_score(H.double(), H.double(), backend=b), ValueError, "h_in: .*float64"),
    "dtype of h_out": (lambda b: ops.cosine_score(H, H.half(), backend=b), ValueError, "h_out: .*float16"),
    "dtype of scores": (lambda b: ops.select_hard(H[0].half(), 1, backend=b), ValueError, "scores: .*float16"),
    "k above N": (lambda b: ops.select_hard(H[0], 4, backend=b), ValueError, "k: 4; .* 3"),
    "k below 0": (lambda b: ops.select_hard(H[0], -1, backend=b), ValueError, "k: -1; .* 3"),
    "dtype of index": (lambda b: ops.gather_rows(H, INDEX.int(), backend=b), ValueError, "index: .*int32"),
    "length of carried": (lambda b: ops.gather_rows(H, INDEX, [H[0]], backend=b), ValueError, r"carried\[0\]: \(3,\)"),
    "shape of rows": (lambda b: ops.scatter_rows(H, INDEX, H, backend=b), ValueError, r"rows: \(4, 3\).*\(2, 3\)"),
    "dtype of rows": (lambda b: ops.scatter_rows(H[:2].half(), INDEX, H, backend=b), ValueError, "rows: .*float16"),
    "index of N, gather": (lambda b: ops.gather_rows(H, INDEX * 2, backend=b), IndexError, None),
    "index below 0, gather": (lambda b: ops.gather_rows(H, INDEX - 1, backend=b), IndexError, None),
    "index of N, scatter": (lambda b: ops.scatter_rows(H[:2], INDEX * 2, H, backend=b), IndexError, None),
    "index below 0, scatter": (lambda b: ops.scatter_rows(H[:2], INDEX - 1, H, backend=b), IndexError, None),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_named(backend, name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call(backend)


def test_cpp_names_the_bad_index():
    with pytest.raises(IndexError, match=r"index: entry 1 is 9; must be in \[0, 4\)"):
        ops.gather_rows(H, torch.tensor([3, 9, -1]), backend=cases.need("cpp"))
