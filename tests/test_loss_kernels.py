"""The GPU kernels of ``cross_entropy_``, CUDA C++ and Triton: emulated on the CPU and (``-m gpu``) run on a card.

Triton's interpreter runs in ``test_triton_kernels.py``.

Shape legend: C tokens, V vocabulary.
"""

import functools
import os

import loss_cases as cases
import pytest
import torch
from cuda_cases import DTYPES, GRAPH_OR_NOT, compile_headers, cuda_card, emulated, mangled, moved, stepped, wide

from cascade_fast import ops

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("compiled kernels only", allow_module_level=True)

CHUNK = 98_304  # bytes of a row that the registers of a block hold, in 16-byte words


class CudaEmulator:
    """The launcher of csrc/cuda/cross_entropy.cu over again, for ptxsim."""

    def __init__(self):
        lines = [
            f"template __global__ void cross_entropy_kernel<{t}, {width}>({t}::Bits*, const int64_t*, int64_t, float*,"
            " float*, int, bool, float);"
            for t, size in (("Float32", 4), ("Float16", 2), ("BFloat16", 2))
            for width in (16, size)
        ]
        self.module = compile_headers(["cross_entropy"], lines)
        self.launches = []

    def __call__(self, logits, labels, grad, scale, **options):
        from ptxsim import poison

        (c, v), size = logits.shape, logits.element_size()
        loss, entropy = poison(torch.empty(c)), poison(torch.empty(c))
        name = f"cross_entropy_kernelI{mangled(logits.dtype)}Li{16 if wide(logits) else size}E"
        args = [logits, labels, labels.stride(0), loss, entropy, v, int(grad), scale]
        self.launches.append(self.module.launch(name, c, 1024, args, **options))
        return loss, entropy


class TritonEmulator:
    """The launcher of kernels/cross_entropy.py, its kernel compiled for sm_75 and run by ptxsim."""

    def __init__(self):
        pytest.importorskip("triton")
        self.adapter = pytest.importorskip("ptxsim.triton_device")
        self.launches = []

    def __call__(self, logits, labels, grad, scale, **options):
        from cascade_kernels.launchers import LAUNCHERS

        with self.adapter.emulated(capability=75, poison_empty=True, **options) as record:
            results = LAUNCHERS["cross_entropy_"](logits, labels, grad, scale)
        self.launches += record.launches
        return results


@pytest.fixture(scope="module", params=[CudaEmulator, TritonEmulator], ids=["cuda", "triton"])
def emulator(request):
    return request.param()


# --- emulated: right answers, no race, nothing out of bounds or uninitialised ----------------------------------------


@emulated
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (5, 577), (2, 4099)], ids=str)
@cases.dtypes
def test_losses_entropies_and_gradients(emulator, dtype, shape):
    cases.check(emulator, *cases.inputs(*shape, dtype))


@emulated
@pytest.mark.parametrize("offset", [0, 8, 1], ids=["aligned", "one word on", "not aligned"])
@pytest.mark.parametrize("v", [50_264, 151_936])
def test_rows_longer_than_a_block_holds(emulator, v, offset):
    logits, labels = cases.inputs(1, v, torch.float16, spread=6.0, offset=offset)
    cases.check(emulator, logits, labels, scale=256.0, grads=(True,))


@emulated
@cases.special
def test_special_logits(emulator, case):
    case(emulator)


@emulated
def test_the_label_is_found_wherever_it_is(emulator):
    """In the first and the last word, at every place in a word, and in the part of a row that is read again."""
    v = 40 + CHUNK // 2
    logits = torch.randn(3, v).half()
    for labels in ([0, 7, 8], [39, v - 1, v - 8]):
        cases.check(emulator, logits.clone(), torch.tensor(labels), grads=(True,))


@emulated
def test_a_label_that_is_none_reads_no_memory(emulator, monkeypatch):
    if isinstance(emulator, TritonEmulator):  # what it does on a GPU
        monkeypatch.setattr("cascade_kernels.cross_entropy.check_index_on_cpu", lambda *args: None)
    logits = torch.randn(3, 40)
    loss, entropy = emulator(logits, torch.tensor([-100, 40, 2**40]), True, 1.0)
    assert loss.isnan().all()
    assert entropy.isfinite().all()
    torch.testing.assert_close(logits.sum(1), torch.ones(3))  # and nothing is taken off


@emulated
def test_warps_at_different_paces(emulator):
    logits, labels = cases.inputs(2, 600, torch.float32)
    for seed in range(2):
        options = {"lockstep": "warp", "seed": seed, "uninit_shared": True}
        cases.check(functools.partial(emulator, **options), logits.clone(), labels)


# --- emulated: memory traffic ----------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize(("v", "dtype"), [(49_152, torch.float16), (57_344, torch.bfloat16), (32_000, torch.float32)])
def test_bytes_moved_are_what_they_must_be(emulator, v, dtype):
    """Without a gradient one read; with it one write and a second read of what a block cannot hold."""
    logits, labels = cases.inputs(1, v, dtype)
    row = v * dtype.itemsize
    again = max(0, row - CHUNK) if isinstance(emulator, CudaEmulator) else row
    for grad, must in ((False, row), (True, 2 * row + again)):
        emulator(logits, labels, grad, 1.0)
        stats = emulator.launches[-1]
        assert moved(stats) <= 1.05 * must
        assert stats.loads.efficiency > 0.95  # every byte of a sector is asked for
        assert stats.loads.sectors > 12 * stats.loads.requests  # words of 16 bytes


# --- on a card -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cuda", "triton"])
def card(request):
    """The device, and the operator there with the signature of its bodies."""
    device = cuda_card("cross_entropy_")
    reason = ops.why_not("cross_entropy_", device, request.param)
    assert reason is None, reason

    def op(logits, labels, grad, scale):
        return ops.cross_entropy_(logits, labels, grad=grad, scale=scale, backend=request.param)

    return device, op, request.param


def on_card(device, op):
    """``op`` for tensors on the CPU: there and back, without alignment lost."""

    def there_and_back(logits, labels, grad, scale):
        room = logits.untyped_storage().to(device=device)
        there = torch.empty(0, dtype=logits.dtype, device=device).set_(room, logits.storage_offset(), logits.shape)
        results = [x.cpu() for x in op(there, labels.to(device), grad, scale)]
        logits.copy_(there)
        return results

    return there_and_back


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(0, 5), (1, 1), (3, 7), (700, 577), (64, 4099), (300, 49_152), (5, 151_936)], ids=str
)
@cases.dtypes
def test_gpu_losses_entropies_and_gradients(card, dtype, shape):
    device, op, _ = card
    logits, labels = cases.inputs(*shape, dtype)
    copy = logits.clone()
    cases.check(on_card(device, op), logits, labels)
    loss, entropy = ops.cross_entropy_(copy, labels, grad=True)  # the CPU's
    again = cases.inputs(*shape, dtype)[0].to(device)
    there = op(again, labels.to(device), True, 1.0)
    torch.testing.assert_close([x.cpu() for x in there], [loss, entropy], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.cpu(), copy)
    assert torch.equal(again.cpu(), logits)  # twice the same


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [8, 1])
def test_gpu_rows_that_are_not_aligned(card, offset):
    device, op, _ = card
    cases.check(on_card(device, op), *cases.inputs(3, 50_264, torch.float16, offset=offset), scale=256.0)


@pytest.mark.gpu
@cases.special
def test_gpu_special_logits(card, case):
    device, op, _ = card
    case(on_card(device, op))


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
def test_gpu_opcheck(card, grad):
    device, _, backend = card
    logits, labels = (x.to(device) for x in cases.inputs(5, 33, torch.float32))
    options = {"grad": grad, "scale": 2.0, "backend": backend}
    torch.library.opcheck(torch.ops.cascade_fast.cross_entropy_.default, (logits, labels), options)


@pytest.mark.gpu
@GRAPH_OR_NOT
def test_gpu_step(card, how):
    """As a step of training does it. Capturing it in a CUDA graph also proves that nothing waits for the device."""
    device, op, _ = card
    hidden, head = (torch.randn(n, 64, device=device).half() for n in (100, 49_152))
    labels = torch.randint(0, 49_152, (100,), device=device)

    def step(hidden, head, labels):
        logits = hidden @ head.T
        loss, entropy = op(logits, labels, True, 256.0)
        return loss, entropy, logits @ head

    want = step(hidden, head, labels)
    got = stepped(how, step, hidden, head, labels)
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_gpu_linear_cross_entropy(card, dtype, monkeypatch):
    """Loss and gradients on the card, where nothing waits for it, against the CPU's float32."""
    from cascade_fast.losses import linear_cross_entropy

    device, _, backend = card
    monkeypatch.setenv("CASCADE_FAST_BACKEND", backend)
    hidden, head, labels = torch.randn(700, 64), torch.randn(49_152, 64) / 8, torch.randint(0, 49_152, (700,))
    results = []
    for where, dtype_there in ((device, dtype), (torch.device("cpu"), torch.float32)):
        if where.type == "cpu":
            monkeypatch.setenv("CASCADE_FAST_BACKEND", "reference")
        there = hidden.to(where).requires_grad_()
        arguments = head.to(where), labels.to(where)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = linear_cross_entropy(there, *arguments, dtype=dtype_there)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((loss.detach().cpu(), there.grad.cpu()))
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(results[0][0], results[1][0], rtol=eps, atol=eps)
    assert (results[0][1] - results[1][1]).norm() <= 2 * eps * results[1][1].norm()
