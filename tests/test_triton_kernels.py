"""The Triton kernels, four ways: Triton's interpreter, a PTX emulator, ahead-of-time compilation, a real GPU.

- ``test_interpreted.py`` runs ``TestInterpreter`` in a process of its own: kernels see TRITON_INTERPRET when defined.
- ``TestEmulator`` runs the PTX compiled for sm_75 if the optional module ``ptxsim`` is on PYTHONPATH.
- ``TestCompile`` compiles every variant in ``launchers.AOT``; sm_80 and sm_90 with ``-m slow``.
- ``TestGpu`` needs a card: ``-m gpu``.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

import loss_cases
from cascade_kernels import scatter_rows, select_hard
from cascade_kernels.launchers import AOT, LAUNCHERS
from op_cases import special_scores
from triton_cases import (
    assert_cosine_score,
    assert_gather_rows,
    assert_scatter_rows,
    assert_select_hard,
    carried_arrays,
    check_gradients,
    check_operators,
    compiled,
    layouts,
    randn,
    some_rows,
)

from cascade_fast import ops
from cascade_fast.ops import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADD = pytest.mark.parametrize("add", [False, True], ids=["replace", "add"])
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty filled with NaN, or with a number that makes no sense, so that what nobody wrote is seen."""
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 77 if x.element_size() == 1 else 0x7BAD)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.usefixtures("poisoned_empty")
class TestInterpreter:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("shape", [(1, 1), (5, 7), (37, 64), (33, 576), (9, 577), (3, 2048)], ids=str)
    @DTYPE
    def test_cosine_score(self, dtype, shape):
        assert_cosine_score(randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1))

    @DTYPE
    def test_cosine_score_layouts(self, dtype):
        a, b = randn(21, 48, dtype=dtype), randn(21, 48, dtype=dtype, seed=1)
        wanted = LAUNCHERS["cosine_score"](a, b)
        for name, view in layouts(a):
            torch.testing.assert_close(LAUNCHERS["cosine_score"](view, b), wanted, rtol=1e-6, atol=1e-6, msg=name)
        assert_cosine_score(a[:1].expand(21, -1), b)

    def test_cosine_score_of_odd_rows(self):
        a, b = randn(6, 33), randn(6, 33, seed=1)
        a[0] = 0  # scores 0
        a[1, 3] = torch.nan
        a[2, 3] = torch.inf
        a[3] *= 1e-30  # its norm is tiny beside eps
        a[4], b[4] = a[4] * 1e15, b[4] * 1e15
        assert_cosine_score(a, b)
        assert LAUNCHERS["cosine_score"](a, b)[0] == 0

    @pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 7), (3, 300), (1, 2049), (1, 4500)], ids=str)
    def test_select_hard(self, shape):
        n = shape[1]
        for k in sorted({0, 1, 2 * n // 3, n}):
            assert_select_hard(special_scores(*shape, seed=k), k)
        assert_select_hard(randn(*shape), n // 2)

    def test_select_hard_between_the_zeros(self):
        scores = torch.tensor([-0.0, 0.0, -1.0, 0.0, -0.0, 1.0, 0.0, -0.0, -1.0]).repeat(40)[None]
        for k in (81, 100, 200, 319):  # 80 are below zero, 240 are zero
            assert_select_hard(scores, k)

    def test_select_hard_many_blocks_a_chunk(self, monkeypatch):
        monkeypatch.setattr(select_hard, "BLOCK", 128)
        monkeypatch.setattr(select_hard, "MAX_CHUNKS", 4)
        for k in (777, 1299):
            assert_select_hard(randn(1, 1300, seed=k), k)
            assert_select_hard(special_scores(1, 1300, seed=k), k)

    @pytest.mark.parametrize("name", ["equal", "sorted", "reversed", "misleading sample", "one bin", "extremes"])
    def test_select_hard_adversarial_inputs(self, name, monkeypatch):
        monkeypatch.setattr(select_hard, "SAMPLE", 256)  # fewer samples than scores
        monkeypatch.setattr(select_hard, "MARGIN", 8)
        n = 3000
        scores = randn(1, n)
        if name == "equal":
            scores.fill_(-0.25)
        elif name in ("sorted", "reversed"):
            scores = scores.sort(descending=name == "reversed").values
        elif name == "misleading sample":  # what the sample sees is far above all else
            j = torch.arange(256)
            scores[0, ((j * 65536 + ((j * 40503) & 65535)) * n) // (65536 * 256)] = 100.0
        elif name == "one bin":
            scores = 1 + scores.abs() * 1e-6
        else:
            scores = torch.exp(60 * scores) * scores.sign()
        for k in (5, 1500):
            assert_select_hard(scores, k)

    def test_select_hard_layouts(self):
        scores = randn(3, 700)
        wanted = LAUNCHERS["select_hard"](scores, 200)
        for name, view in layouts(scores):
            for got, want in zip(LAUNCHERS["select_hard"](view, 200), wanted, strict=True):
                assert torch.equal(got, want), name
        assert_select_hard(scores[:1].expand(2, -1), 200)

    @pytest.mark.parametrize("d", [1, 7, 64, 577])
    @DTYPE
    def test_gather_rows(self, dtype, d):
        hidden = randn(45, d, dtype=dtype)
        hidden[3] = torch.nan
        hidden = hidden.nan_to_num(1.5)
        for k in (0, 1, 33, 45):
            assert_gather_rows(hidden, some_rows(45, k), carried_arrays(45))

    def test_gather_rows_layouts(self):
        hidden, index = randn(45, 24), some_rows(45, 30)
        apart = torch.stack([index, index * 0], dim=1)[:, 0]
        carried = [torch.arange(90)[::2], torch.rand(45, 3)[:, 1], torch.tensor(4).expand(45)]
        for _, view in layouts(hidden):
            assert_gather_rows(view, apart, carried)

    def test_copies_are_bitwise(self):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(512, 128)  # every NaN payload
        index = some_rows(512, 300)
        for dtype in (torch.float16, torch.bfloat16):
            rows, _ = LAUNCHERS["gather_rows"](bits.view(dtype), index, [])
            back = LAUNCHERS["scatter_rows"](rows, index, bits.flip(1).contiguous().view(dtype), False)
            assert torch.equal(rows.view(torch.int16), bits[index])
            assert torch.equal(back.view(torch.int16), bits.flip(1).index_copy(0, index, bits[index]))

    @pytest.mark.parametrize("launch_bytes", [-(10**9), 10**9], ids=["merge", "put"])
    @ADD
    @DTYPE
    def test_scatter_rows(self, dtype, add, launch_bytes, monkeypatch):
        monkeypatch.setattr(scatter_rows, "LAUNCH_BYTES", launch_bytes)
        for d in (1, 7, 192):
            into = randn(45, d, dtype=dtype)
            for k in (0, 1, 33, 45):
                assert_scatter_rows(randn(k, d, dtype=dtype, seed=1), some_rows(45, k), into, add)
        for (_, rows), (_, view) in zip(
            layouts(randn(33, 7, dtype=dtype, seed=1)), layouts(randn(45, 7).to(dtype)), strict=True
        ):
            assert_scatter_rows(rows, some_rows(45, 33), view, add)

    @pytest.mark.parametrize("shape", [(0, 4), (3, 7), (2, 577), (2, 9000)], ids=str)
    @DTYPE
    def test_cross_entropy(self, dtype, shape):
        loss_cases.check(LAUNCHERS["cross_entropy_"], *loss_cases.inputs(*shape, dtype, offset=1), scale=256.0)

    @loss_cases.special
    def test_cross_entropy_of_special_logits(self, case):
        case(LAUNCHERS["cross_entropy_"])

    def test_cross_entropy_of_a_label_that_is_none(self):
        with pytest.raises(IndexError, match=r"labels: out of range, must be in \[0, 4\)"):
            LAUNCHERS["cross_entropy_"](torch.zeros(1, 4), torch.tensor([4]), False, 1.0)

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
    def test_nothing(self, shape):
        x, index = torch.zeros(shape), torch.zeros(0, dtype=torch.int64)
        assert torch.equal(LAUNCHERS["cosine_score"](x, x), torch.zeros(shape[0]))
        assert_gather_rows(x, index, carried_arrays(shape[0]))
        assert_scatter_rows(x[:0], index, x, False)
        assert_select_hard(x, 0)
        if shape == (4, 0):
            assert_gather_rows(x, torch.tensor([2, 0]), carried_arrays(4))

    @pytest.mark.parametrize("bad", [-1, 5])
    def test_index_out_of_range(self, bad):
        x, index = torch.zeros(5, 4), torch.tensor([0, bad])
        with pytest.raises(IndexError, match="out of range"):
            LAUNCHERS["gather_rows"](x, index, [])
        with pytest.raises(IndexError, match="out of range"):
            LAUNCHERS["scatter_rows"](x[:2], index, x, False)

    def test_repeats_bitwise(self):
        a, b, index = randn(50, 100), randn(50, 100, seed=1), some_rows(50, 20)
        scores = special_scores(2, 3000, seed=3)
        for op, args in (
            ("cosine_score", (a, b)),
            ("select_hard", (scores, 999)),
            ("scatter_rows", (a[:20], index, b, True)),
        ):
            first, second = (torch.utils._pytree.tree_leaves(LAUNCHERS[op](*args)) for _ in range(2))
            for x, y in zip(first, second, strict=True):
                assert torch.equal(x.nan_to_num(9), y.nan_to_num(9)), op

    def test_through_the_operators(self):
        check_gradients("cpu")
        check_operators("cpu", torch.float32)


@pytest.mark.emulated
class TestEmulator:
    """Compiled for sm_75 and executed: blocks and warps interleaved at random, every access checked and counted."""

    __test__ = not INTERPRETED

    @pytest.fixture
    def emulated(self):
        adapter = pytest.importorskip("ptxsim.triton_device", reason="the optional module ptxsim is not on PYTHONPATH")

        def start(**options):
            return adapter.emulated(capability=75, poison_empty=True, **options)

        return start

    @pytest.mark.parametrize("d", [7, 576])
    @DTYPE
    def test_rows(self, emulated, dtype, d, monkeypatch):
        a, b, index = randn(40, d, dtype=dtype), randn(40, d, dtype=dtype, seed=1), some_rows(40, 29)
        for seed in range(2):
            with emulated(seed=seed, switch_every=3):
                assert_cosine_score(a, b)
                assert_gather_rows(a, index, carried_arrays(40))
                for launch_bytes in (-(10**9), 10**9):
                    monkeypatch.setattr(scatter_rows, "LAUNCH_BYTES", launch_bytes)
                    for add in (False, True):
                        assert_scatter_rows(b[:29], index, a, add)

    @pytest.mark.parametrize(
        "options", [{"seed": s, "switch_every": 5} for s in range(3)] + [{"schedule": "reverse"}], ids=str
    )
    def test_select_hard(self, emulated, options):
        with emulated(uninit_shared=True, **options):
            assert_select_hard(randn(1, 5000), 3000)
            assert_select_hard(special_scores(2, 2100, seed=1), 700)
            assert_select_hard(torch.full((1, 4500), 0.5), 4100)
            assert_select_hard(randn(3, 1), 1)
            assert_select_hard(torch.cat([randn(1, 3000) * 1e-3 + 1, randn(1, 3000)], dim=1), 0)

    def test_warps_at_different_paces(self, emulated):
        with emulated(lockstep="warp", seed=5):
            assert_select_hard(special_scores(1, 4100, seed=2), 1234)
            assert_cosine_score(randn(20, 576).half(), randn(20, 576, seed=1).half())

    @pytest.mark.parametrize("d", [576, 2048, 4096])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
    def test_traffic(self, emulated, dtype, d, monkeypatch):
        n, k = 128, 115
        a, b, index = randn(n, d, dtype=dtype), randn(n, d, dtype=dtype, seed=1), some_rows(n, k).sort().values
        row = d * a.element_size()
        monkeypatch.setattr(scatter_rows, "LAUNCH_BYTES", 0)
        with emulated() as rec:
            LAUNCHERS["cosine_score"](a, b)
            LAUNCHERS["gather_rows"](a, index, [torch.arange(n), torch.arange(n)])
            LAUNCHERS["scatter_rows"](b[:k], index, a, False)
            LAUNCHERS["scatter_rows"](b[:k], index, a, True)
        compulsory = {  # data moved at the least, and the indices and small arrays that say where
            "_cosine_score_kernel": [2 * n * row + 4 * n],
            "_gather_rows_kernel": [2 * k * row + 8 * k + 4 * 8 * k],
            "_scatter_rows_invert_kernel": [8 * k + 32 * k] * 2,  # scattered 4-byte stores, a sector each at worst
            "_scatter_rows_merge_kernel": [2 * n * row + 4 * n, (2 * n + k) * row + 4 * n],
        }
        for launch in rec.launches:
            assert launch.moved_bytes <= 1.05 * compulsory[launch.kernel].pop(0), launch.summary()
            if "invert" not in launch.kernel:
                assert launch.loads.efficiency > 0.95, launch.summary()
                assert launch.loads.sectors > 10 * launch.loads.requests, launch.summary()  # 16-byte loads
        assert not any(compulsory.values())

    @pytest.mark.parametrize(("k", "steps"), [(3, ["put"]), (2000, ["invert", "merge"]), (2500, ["put"])])
    def test_scatter_rows_takes_what_moves_less(self, emulated, k, steps):
        into = randn(2500, 192)
        with emulated() as rec:
            assert_scatter_rows(randn(k, 192, seed=1), some_rows(2500, k), into, False)
        assert [launch.kernel for launch in rec.launches] == [f"_scatter_rows_{step}_kernel" for step in steps]

    def test_five_launches(self, emulated):
        hidden, out = randn(3000, 32), randn(3000, 32, seed=1)
        with emulated() as rec:
            scores = LAUNCHERS["cosine_score"](hidden, out)
            index, _ = LAUNCHERS["select_hard"](scores[None], 1800)
            LAUNCHERS["gather_rows"](out, index[0], [torch.arange(3000)] * 4)
        assert len(rec.launches) == 5


class TestCompile:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize(
        "capability", [75, pytest.param(80, marks=pytest.mark.slow), pytest.param(90, marks=pytest.mark.slow)]
    )
    def test_every_variant(self, capability):
        for entry in AOT:
            ptx, registers, spilled, shared = compiled(entry, capability)
            assert spilled == 0, entry["name"]
            assert shared <= 48 * 1024, entry["name"]
            # Half of an SM's warps at least: 65,536 registers, 16 of 32 warps on sm_75.
            assert registers <= 128, entry["name"]
            if not entry["name"].startswith(("select_hard", "scatter_rows-invert")):
                assert "ld.global.v4" in ptx, f"{entry['name']}: no 16-byte loads"

    def test_every_launcher_has_variants(self):
        assert {entry["name"].split("-")[0] for entry in AOT} == set(LAUNCHERS) == set(backends.TRITON_OPS)


@pytest.mark.gpu
class TestGpu:
    __test__ = not INTERPRETED

    @pytest.fixture(autouse=True)
    def _card(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

    @pytest.mark.parametrize("shape", [(1, 1), (1000, 7), (4097, 576), (513, 4096)], ids=str)
    @DTYPE
    def test_rows(self, dtype, shape):
        n, d = shape
        a, b = randn(n, d, dtype=dtype, device="cuda"), randn(n, d, dtype=dtype, seed=1, device="cuda")
        assert_cosine_score(a, b)
        for k in {1, n // 2, n}:
            index = some_rows(n, max(k, 1)).to("cuda")
            assert_gather_rows(a, index, [x.to("cuda") for x in carried_arrays(n)])
            for add in (False, True):
                assert_scatter_rows(b[: len(index)], index, a, add)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 131072), (3, 100_001), (1, 3_000_000)], ids=str)
    def test_select_hard(self, shape):
        for k in (0, 1, shape[1] // 3, shape[1]):
            assert_select_hard(randn(*shape, seed=k).cuda(), k)
            assert_select_hard(special_scores(*shape, seed=k).cuda(), k)

    def test_deterministic(self):
        scores = special_scores(1, 300_000, seed=0).cuda()
        first, _ = LAUNCHERS["select_hard"](scores, 100_000)
        assert all(torch.equal(first, LAUNCHERS["select_hard"](scores, 100_000)[0]) for _ in range(20))
        a, b = randn(5000, 576).half().cuda(), randn(5000, 576, seed=1).half().cuda()
        assert torch.equal(LAUNCHERS["cosine_score"](a, b), LAUNCHERS["cosine_score"](a, b))

    def test_nothing_waits_for_the_device(self):
        a = randn(1000, 64, device="cuda")
        labels = torch.arange(1000, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            index, _ = LAUNCHERS["select_hard"](LAUNCHERS["cosine_score"](a, a)[None], 600)
            rows, _ = LAUNCHERS["gather_rows"](a, index[0], [labels])
            LAUNCHERS["scatter_rows"](rows, index[0], a, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_addresses_beyond_2_31(self):
        try:
            table = torch.empty(3, 2**30 + 64, dtype=torch.float16, device="cuda")
        except torch.OutOfMemoryError:
            pytest.skip("needs 6.5 GB")
        view = table[:, :64]
        view.copy_(randn(3, 64).half())
        assert_cosine_score(view, view.clone())
        assert_gather_rows(view, torch.tensor([2, 0], device="cuda"), [])
        assert_scatter_rows(view.clone()[:1], torch.tensor([2], device="cuda"), view, False)

    def test_gradients_and_opcheck(self):
        check_gradients("cuda")
        for dtype in DTYPES.values():
            check_operators("cuda", dtype)

    def test_compile(self):
        def step(a, b, labels):
            index, bounds = ops.select_hard(ops.cosine_score(a, b, backend="triton"), 300, backend="triton")
            rows, (picked,) = ops.gather_rows(b, index, [labels], backend="triton")
            return ops.scatter_rows(rows * 2, index, b, backend="triton"), picked, bounds

        a, b = randn(500, 64, device="cuda"), randn(500, 64, seed=1, device="cuda")
        args = (a, b, torch.arange(500, device="cuda"))
        for got, wanted in zip(torch.compile(step, fullgraph=True)(*args), step(*args), strict=True):
            torch.testing.assert_close(got, wanted)
