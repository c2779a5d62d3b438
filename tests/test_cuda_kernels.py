"""The CUDA kernels of csrc/cuda: emulated on the CPU, compiled, and (``-m gpu``) run on a card.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows, W workspace words.
"""

import subprocess
import sys

import pytest
import torch
from cuda_cases import (
    CSRC,
    DTYPES,
    GRAPH_OR_NOT,
    ROOT,
    WORDS,
    compile_headers,
    cuda_card,
    emulated,
    mangled,
    moved,
    needs_nvcc,
    randn,
    stepped,
    wide,
)
from op_cases import assert_selected, special_scores

from cascade_fast import ops
from cascade_fast.ops import reference

SCORE_TOL = 1e-6  # beyond the reference's own error, for another order of the float32 sums


class Emulator:
    """The launchers of csrc/cuda/*.cu over again, for the emulator. Outputs start poisoned: as never written."""

    def __init__(self):
        lines = []
        for t, size in (("Float32", 4), ("Float16", 2), ("BFloat16", 2)):
            for width in (16, size):
                word = WORDS[width]
                lines.append(
                    f"template __global__ void cosine_score_kernel<{t}, {width}>(const {t}::Bits*, int64_t,"
                    f" const {t}::Bits*, int64_t, float*, int64_t, int);\n"
                    f"template __global__ void scatter_rows_kernel<{t}, {width}>(const {word}*, int64_t, const int*,"
                    f" const {word}*, int64_t, {word}*, int64_t, int, int);"
                )
        for word in WORDS.values():
            lines.append(
                f"template __global__ void gather_rows_kernel<{word}>(const {word}*, int64_t, const int64_t*, {word}*,"
                " int64_t, int, int64_t, CarriedList);"
            )
        self.module = compile_headers(ops.SELECTION_OPS, lines)

    def launch(self, kernel, blocks, threads, args, **options):
        return self.module.launch(kernel, max(int(blocks), 1), threads, args, **options)

    def cosine_score(self, a_ND, b_ND, **options):
        from ptxsim import poison

        n, d = a_ND.shape
        score_N = poison(torch.empty(n))
        width = 16 if wide(a_ND, b_ND) else a_ND.element_size()
        name = f"cosine_score_kernelI{mangled(a_ND.dtype)}Li{width}E"
        args = [a_ND, a_ND.stride(0), b_ND, b_ND.stride(0), score_N, n, d]
        return score_N, self.launch(name, -(-n // 8), 256, args, **options)

    def select_hard(self, scores_BN, k, team_blocks, teams=None, **options):
        from ptxsim import poison

        b, n = scores_BN.shape
        teams = b if teams is None else teams
        index_BK, bounds_B2 = poison(torch.empty(b, k, dtype=torch.int64)), poison(torch.empty(b, 2))
        words = 64 + 3 * 2048 + 2 * team_blocks  # select_work_words
        work_BW = torch.zeros(b, words, dtype=torch.int32) if team_blocks > 1 else None
        args = [scores_BN, scores_BN.stride(0), b, n, k, team_blocks, work_BW, index_BK, bounds_B2]
        blocks = teams * team_blocks
        options = {"resident": blocks} | options  # what a cooperative launch guarantees
        return index_BK, bounds_B2, self.launch("select_hard_kernel", blocks, 512, args, **options)

    def gather_rows(self, hidden_ND, index_K, carried=(), **options):
        from ptxsim import Struct, poison

        k, d = len(index_K), hidden_ND.shape[1]
        hidden_KD = poison(torch.empty(k, d, dtype=hidden_ND.dtype))
        gathered = [poison(torch.empty(k, dtype=array.dtype)) for array in carried]
        arrays = [[a, g, a.stride(0), a.element_size()] for a, g in zip(carried, gathered, strict=True)]
        flat = [field for array in arrays + [[0, 0, 0, 0]] * (8 - len(arrays)) for field in array]
        size = hidden_ND.element_size()
        width = 16 if wide(hidden_ND, hidden_KD) else size
        row_blocks, carried_blocks = -(-k // 8), -(-k // 256) if carried else 0
        args = [hidden_ND, hidden_ND.stride(0) * size // width, index_K, hidden_KD, k, d * size // width, row_blocks]
        name = "gather_rows_kernelI" + {16: "5uint4", 4: "j", 2: "t"}[width]
        args.append(Struct("QQqq" * 8 + "q", *flat, len(arrays)))
        return hidden_KD, gathered, self.launch(name, row_blocks + carried_blocks, 256, args, **options)

    def scatter_rows(self, rows_KD, index_K, into_ND, add, **options):
        from ptxsim import poison

        (n, d), k = into_ND.shape, len(index_K)
        out_ND, slot_N, stats = poison(torch.empty(n, d, dtype=into_ND.dtype)), None, []
        if k > 0:
            slot_N = torch.full((n,), -1, dtype=torch.int32)
            stats = [self.launch("scatter_rows_invert_kernel", -(-k // 256), 256, [index_K, k, slot_N, n], **options)]
        size = into_ND.element_size()
        width = 16 if wide(rows_KD, into_ND, out_ND) else size
        strides = [m.stride(0) * size // width for m in (rows_KD, into_ND)]
        name = f"scatter_rows_kernelI{mangled(into_ND.dtype)}Li{width}E"
        args = [rows_KD, strides[0], slot_N, into_ND, strides[1], out_ND, n, d * size // width, int(add)]
        return out_ND, [*stats, self.launch(name, -(-n // 8), 256, args, **options)]


@pytest.fixture(scope="module")
def emulator():
    return Emulator()


def permutation(n, k, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]


# --- emulated: right answers, no race, nothing out of bounds or uninitialised ----------------------------------------


@emulated
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (9, 64), (13, 576), (5, 577), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_cosine_score(emulator, dtype, shape):
    a_ND, b_ND = randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    a_ND[0] = 0
    score_N, _ = emulator.cosine_score(a_ND, b_ND)
    check_cosine_score(score_N, a_ND, b_ND)


def check_cosine_score(score_N, a_ND, b_ND):
    a_64, b_64 = a_ND.double(), b_ND.double()
    truth_N = (a_64 * b_64).sum(-1) / (a_64.norm(dim=-1) * b_64.norm(dim=-1) + reference.COSINE_EPS)
    allowed_N = (reference.cosine_score(a_ND, b_ND) - truth_N).abs() + SCORE_TOL
    assert score_N.dtype == torch.float32
    assert ((score_N - truth_N).abs() <= allowed_N).all()


@emulated
@pytest.mark.parametrize("layout", ["padded", "shifted", "one-row-repeated", "unaligned-tail"])
def test_cosine_score_reads_strided_rows_in_place(emulator, layout):
    base_a, base_b = randn(6, 128, dtype=torch.float16, seed=1), randn(6, 128, dtype=torch.float16, seed=2)
    views = {
        "padded": lambda x: x[:, :72],  # 16-byte rows with gaps
        "shifted": lambda x: x[:, 3:75],  # rows start in the middle of a word
        "one-row-repeated": lambda x: x[:1, :72].expand(6, 72),  # row stride 0
        "unaligned-tail": lambda x: x[:, :77],  # 16-byte rows that end in the middle of a word
    }
    a_ND, b_ND = views[layout](base_a), views[layout](base_b)
    score_N, _ = emulator.cosine_score(a_ND, b_ND)
    check_cosine_score(score_N, a_ND, b_ND)


@emulated
def test_cosine_score_of_non_finite_rows(emulator):
    a_ND, b_ND = randn(4, 64, seed=1), randn(4, 64, seed=2)
    a_ND[0, 5], a_ND[1, 6], b_ND[2, 7] = torch.nan, torch.inf, -torch.inf
    score_N, _ = emulator.cosine_score(a_ND, b_ND)
    assert score_N.isnan().tolist() == reference.cosine_score(a_ND, b_ND).isnan().tolist() == [True, True, True, False]


def make_scores(kind, b, n, seed=0):
    scores_BN = randn(b, n, seed=seed)
    if kind == "tied":
        return (scores_BN * 2).round() / 2
    if kind == "constant":
        return torch.full((b, n), 0.25)
    if kind == "clustered":  # as cosines are: one sign, one exponent
        return 0.97 + 0.01 * scores_BN.tanh()
    if kind == "special":
        return special_scores(b, n, seed=seed)
    return scores_BN


@emulated
@pytest.mark.parametrize("kind", ["normal", "tied", "constant", "clustered", "special"])
@pytest.mark.parametrize(("n", "team_blocks"), [(1, 1), (33, 1), (2500, 1), (2500, 3), (4100, 2)])
def test_select_hard(emulator, n, team_blocks, kind):
    scores_BN = make_scores(kind, 1, n, seed=n)
    for k in sorted({0, 1, n // 10, n - 1, n}):
        index_BK, bounds_B2, _ = emulator.select_hard(scores_BN, k, team_blocks, seed=k)
        assert_selected(index_BK, bounds_B2, scores_BN, k)


@emulated
@pytest.mark.parametrize("seed", range(4))
def test_select_hard_is_the_same_in_every_order_of_blocks(emulator, seed):
    """More blocks than work in places (the last chunks are empty), interleaved at random every few accesses."""
    scores_BN = make_scores("tied", 2, 130, seed=seed)
    index_BK, bounds_B2, _ = emulator.select_hard(scores_BN, 40, team_blocks=6, seed=seed, switch_every=3)
    assert_selected(index_BK, bounds_B2, scores_BN, 40)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("team_blocks", [1, 3])
def test_select_hard_with_warps_at_different_paces(emulator, team_blocks):
    scores_BN = make_scores("tied", 1, 3000)
    index_BK, bounds_B2, _ = emulator.select_hard(scores_BN, 700, team_blocks, lockstep="warp", uninit_shared=True)
    assert_selected(index_BK, bounds_B2, scores_BN, 700)


@emulated
@pytest.mark.parametrize(("team_blocks", "teams"), [(1, 2), (1, 5), (2, 5)])
def test_select_hard_serves_rows_of_a_strided_batch(emulator, team_blocks, teams):
    scores_BN = make_scores("tied", 5, 400)[:, 7:300]
    index_BK, bounds_B2, _ = emulator.select_hard(scores_BN, 31, team_blocks, teams)
    assert_selected(index_BK, bounds_B2, scores_BN, 31)


@emulated
def test_select_hard_of_nothing(emulator):
    index_BK, bounds_B2, _ = emulator.select_hard(torch.empty(2, 0), 0, team_blocks=1)
    assert index_BK.shape == (2, 0)
    assert bounds_B2.tolist() == [[-torch.inf, torch.inf]] * 2


@emulated
@pytest.mark.parametrize("d", [1, 64, 577])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_gather_rows_with_carried_arrays(emulator, dtype, d):
    n, index_K = 300, permutation(300, 261)
    hidden_ND = randn(n, d, dtype=dtype)
    i_N = torch.arange(n)
    carried = [i_N % 2 == 0, i_N.short(), i_N.int(), i_N, randn(n, 2)[:, 1], i_N.to(torch.complex128)]
    hidden_KD, gathered, _ = emulator.gather_rows(hidden_ND, index_K, carried)
    want_KD, want = reference.gather_rows(hidden_ND, index_K, carried)
    assert torch.equal(hidden_KD, want_KD)
    assert all(torch.equal(x, y) for x, y in zip(gathered, want, strict=True))


@emulated
@pytest.mark.parametrize("k", [0, 1, 20, 37])
@pytest.mark.parametrize("d", [64, 577])
@pytest.mark.parametrize("add", [False, True], ids=["replace", "add"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_scatter_rows(emulator, dtype, add, d, k):
    rows_KD, into_ND, index_K = randn(k, d, dtype=dtype, seed=1), randn(37, d, dtype=dtype, seed=2), permutation(37, k)
    if k > 1:
        rows_KD[0, 0], rows_KD[1, 0] = torch.nan, torch.inf
    before_ND = into_ND.clone()
    out_ND, _ = emulator.scatter_rows(rows_KD, index_K, into_ND, add, seed=k)
    torch.testing.assert_close(
        out_ND, reference.scatter_rows(rows_KD, index_K, into_ND, add), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(into_ND, before_ND)


@emulated
def test_rows_are_moved_from_any_row_stride(emulator):
    base, index_K = randn(9, 100, dtype=torch.float16), permutation(9, 4)
    for view_ND in (base[:, 8:72], base[:, 3:67], base[:1, :64].expand(9, 64)):
        assert torch.equal(emulator.gather_rows(view_ND, index_K)[0], view_ND[index_K])
        rows_KD = base[:4, 5:69]
        out_ND, _ = emulator.scatter_rows(rows_KD, index_K, view_ND, add=False)
        assert torch.equal(out_ND, reference.scatter_rows(rows_KD, index_K, view_ND, add=False))


# --- emulated: memory traffic ----------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("d", [576, 2048, 4096])
def test_bytes_moved_are_what_they_must_be(emulator, d):
    n, k, dtype = 64, 16, torch.float16
    row = d * 2
    a_ND, b_ND, index_K = randn(n, d, dtype=dtype, seed=1), randn(n, d, dtype=dtype, seed=2), permutation(n, k)

    _, score = emulator.cosine_score(a_ND, b_ND)
    assert moved(score) <= 1.05 * (2 * n * row + 4 * n)
    _, _, gather = emulator.gather_rows(a_ND, index_K)
    assert moved(gather) <= 1.05 * (2 * k * row + 8 * k)
    _, scatter = emulator.scatter_rows(b_ND[:k], index_K, a_ND, add=False)
    assert moved(*scatter) <= 1.05 * (2 * n * row + 8 * k)  # N - K rows of `into` and K rows read, N written
    _, scatter_add = emulator.scatter_rows(b_ND[:k], index_K, a_ND, add=True)
    assert moved(*scatter_add) <= 1.05 * ((2 * n + k) * row + 8 * k)
    for stats in (score, gather, scatter[-1], scatter_add[-1]):
        assert stats.loads.efficiency > 0.95  # every byte of a sector is asked for


@emulated
def test_select_hard_reads_the_scores_four_times(emulator):
    n, k, team_blocks = 16384, 1638, 4
    _, _, stats = emulator.select_hard(make_scores("clustered", 1, n), k, team_blocks)
    scores, histograms = 4 * 4 * n, 3 * 2048 * 4 * team_blocks
    assert stats.loads.bytes <= 1.1 * (scores + histograms)  # the rest: counts, and polls at the barriers


# --- compiled --------------------------------------------------------------------------------------------------------


def check_cuda(tmp_path, *arguments):
    command = [sys.executable, ROOT / "tools" / "check_cuda.py", "--cuda-only", "--output", tmp_path / "table.json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
def test_sources_compile_and_fit_on_a_t4(tmp_path):
    """As one translation unit, as most of the time goes into torch's headers."""
    (tmp_path / "all.cu").write_text("".join(f'#include "{source}"\n' for source in sorted(CSRC.glob("*.cu"))))
    check_cuda(tmp_path, "--arch=sm_75", tmp_path / "all.cu")


@needs_nvcc
@pytest.mark.slow
def test_sources_compile_and_fit_on_every_card(tmp_path):
    check_cuda(tmp_path)


# --- on a card -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card():
    return cuda_card("cosine_score"), "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (1000, 577), (0, 64), (4099, 576), (63, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_gpu_cosine_score_and_gradients(card, dtype, shape):
    device, backend = card
    pair = [randn(*shape, dtype=dtype, seed=seed).to(device).requires_grad_() for seed in (1, 2)]
    score_N = ops.cosine_score(*pair, backend=backend)
    check_cosine_score(score_N.detach(), *(x.detach() for x in pair))
    weight_N = randn(shape[0], seed=3).to(device)
    got = torch.autograd.grad(score_N, pair, weight_N)
    want = torch.autograd.grad(ops.cosine_score(*pair, backend="reference"), pair, weight_N)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "tied", "constant", "clustered", "special"])
@pytest.mark.parametrize(("b", "n"), [(1, 1), (1, 2048), (1, 2049), (1, 1_000_003), (3, 70_001), (1500, 300)])
def test_gpu_select_hard(card, b, n, kind):
    device, backend = card
    scores_BN = make_scores(kind, b, n + 3, seed=n).to(device)[:, 3:]  # rows that start on no particular address
    for k in sorted({0, 1, n // 10, n - 1, n}):
        first = ops.select_hard(scores_BN, k, backend=backend)
        assert_selected(*first, scores_BN, k)
        again = ops.select_hard(scores_BN, k, backend=backend)
        assert torch.equal(first[0], again[0])


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1, 577, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_gpu_gather_rows_scatter_rows_and_gradients(card, dtype, d):
    device, backend = card
    n, k = 5000, 777
    hidden_ND = randn(n, d + 8, dtype=dtype, seed=1).to(device)[:, :d].requires_grad_()
    rows_KD = randn(k, d, dtype=dtype, seed=2).to(device).requires_grad_()
    index_K = permutation(n, k).to(device)
    carried = [torch.arange(n, device=device).to(t) for t in (torch.bool, torch.int16, torch.int32, torch.int64) * 3]
    results = []
    for name in (backend, "reference"):
        hidden_KD, gathered = ops.gather_rows(hidden_ND, index_K, carried, backend=name)
        replaced_ND = ops.scatter_rows(rows_KD, index_K, hidden_ND, backend=name)
        added_ND = ops.scatter_rows(rows_KD, index_K, hidden_ND, add=True, backend=name)
        outputs = (hidden_KD, replaced_ND, added_ND)
        grads = [torch.autograd.grad(out, (hidden_ND, rows_KD), out.detach(), allow_unused=True) for out in outputs]
        results.append([*outputs, *gathered, *(g for pair in grads for g in pair if g is not None)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_gpu_opcheck(card):
    device, backend = card
    a_ND, b_ND = (randn(40, 64, seed=s).to(device).requires_grad_() for s in (1, 2))
    index_K, names = permutation(40, 9).to(device), torch.ops.cascade_fast
    check, to = torch.library.opcheck, {"backend": backend}
    check(names.cosine_score.default, (a_ND, b_ND), to)
    check(names.select_hard.default, (randn(2, 40).to(device), 9), to)
    check(names.gather_rows.default, (a_ND, index_K, [torch.arange(40, device=device)]), to)
    check(names.scatter_rows.default, (b_ND[:9], index_K, a_ND), to | {"add": True})


def cascade_step(a_ND, b_ND, backend):
    score_N = ops.cosine_score(a_ND, b_ND, backend=backend)
    index_K, bounds_2 = ops.select_hard(score_N, len(score_N) // 10, backend=backend)
    rows_KD, (position_K,) = ops.gather_rows(
        b_ND, index_K, [torch.arange(len(score_N), device=a_ND.device)], backend=backend
    )
    return ops.scatter_rows(rows_KD * 2, index_K, b_ND, backend=backend), bounds_2, position_K


@pytest.mark.gpu
@GRAPH_OR_NOT
def test_gpu_step(card, how):
    """One step as the trainer does it. Capturing it in a CUDA graph also proves that nothing waits for the device."""
    device, backend = card
    a_ND, b_ND = (randn(20_000, 576, dtype=torch.float16, seed=s).to(device) for s in (1, 2))
    want = cascade_step(a_ND, b_ND, backend)
    got = stepped(how, cascade_step, a_ND, b_ND, backend)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
