"""Inputs, and answers checked against plain torch, for the tests of the Triton kernels."""

import os
import re
import subprocess
from pathlib import Path

import torch
from cascade_kernels.launchers import LAUNCHERS
from op_cases import assert_selected

from cascade_fast import ops
from cascade_fast.ops import reference

SCORE_TOLERANCE = 1e-6  # beyond what plain torch itself is off: other order of summation, scores up to 1
CARRIED_DTYPES = (torch.int64, torch.bool, torch.float16, torch.float64, torch.int8, torch.complex64, torch.complex128)


def randn(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def layouts(x):
    """The same numbers behind other strides, by name."""
    n, d = x.shape
    wide = x.new_zeros(2 * n, d + 16)
    wide[::2, :d] = x
    spread = x.new_zeros(n, 3 * d)
    spread[:, ::3] = x
    yield "rows of a larger array", wide[::2, :d]
    yield "columns apart", spread[:, ::3]
    yield "transposed", x.t().contiguous().t()


def assert_cosine_score(a, b):
    """As close to the float64 truth as plain torch is, plus SCORE_TOLERANCE."""
    got, plain = LAUNCHERS["cosine_score"](a, b), reference.cosine_score(a, b)
    a64, b64 = a.double(), b.double()
    truth = (a64 * b64).sum(-1) / (a64.norm(dim=-1) * b64.norm(dim=-1) + 1e-8)
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    error, allowed = (got - truth).abs(), (plain - truth).abs().nan_to_num().max() + SCORE_TOLERANCE
    assert torch.equal(got.isnan(), plain.isnan())
    assert error.nan_to_num().max() <= allowed


def assert_select_hard(scores, k):
    assert_selected(*LAUNCHERS["select_hard"](scores, k), scores, k)


def assert_gather_rows(hidden, index, carried):
    rows, gathered = LAUNCHERS["gather_rows"](hidden, index, carried)
    wanted_rows, wanted = reference.gather_rows(hidden, index, carried)
    assert torch.equal(rows, wanted_rows)
    assert [x.dtype for x in gathered] == [x.dtype for x in carried]
    assert all(torch.equal(x, y) for x, y in zip(gathered, wanted, strict=True))


def assert_scatter_rows(rows, index, into, add):
    before = into.clone()
    got = LAUNCHERS["scatter_rows"](rows, index, into, add)
    assert got.is_contiguous()
    assert torch.equal(got, reference.scatter_rows(rows, index, into, add))
    assert torch.equal(into, before)


def some_rows(n, k, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]


def carried_arrays(n, dtypes=CARRIED_DTYPES):
    return [(randn(n, seed=i) * 50).to(dtype) for i, dtype in enumerate(dtypes)]


def check_gradients(device):
    """Gradients through the public functions against autograd through plain torch."""
    a, b, rows = (
        randn(40, 24, device=device),
        randn(40, 24, seed=1, device=device),
        randn(15, 24, seed=2, device=device),
    )
    index = some_rows(40, 15).to(device)
    weight = randn(40, 24, seed=3, device=device)

    def loss(a, b, rows, **backend):
        on = ops if backend else reference
        score = on.cosine_score(a, b, **backend)
        picked, _ = on.gather_rows(a, index, [], **backend)
        put = on.scatter_rows(picked * rows, index, b, **({"add": False} | backend))
        added = on.scatter_rows(rows, index, put, **({"add": True} | backend))
        return score.sum() + (added * weight).sum()

    for wants in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        results = []
        for backend in ({"backend": "triton"}, {}):
            inputs = [x.clone().requires_grad_(want) for x, want in zip((a, b, rows), wants, strict=True)]
            loss(*inputs, **backend).backward()
            results.append([x.grad for x in inputs])
        for got, wanted in zip(*results, strict=True):
            assert (got is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(got, wanted)


def check_operators(device, dtype):
    x, y, index = (
        randn(12, 16, dtype=dtype, device=device),
        randn(12, 16, dtype=dtype, seed=1, device=device),
        some_rows(12, 5).to(device),
    )
    x.requires_grad_()
    arguments = {
        "cosine_score": (x, y),
        "select_hard": (randn(2, 300, device=device), 100),
        "gather_rows": (x, index, [torch.arange(12, device=device)]),
        "scatter_rows": (x[:5].detach().requires_grad_(), index, y),
    }
    for op, args in arguments.items():
        torch.library.opcheck(getattr(torch.ops.cascade_fast, op).default, args, {"backend": "triton"})


def compiled(entry, capability):
    """(ptx, registers, bytes spilled, bytes of shared memory) of an AOT entry; what ptxas says of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(entry["kernel"], entry["signature"], entry["constexprs"], entry["attrs"])
    options = {"num_warps": entry["num_warps"]}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    # Triton brings a ptxas for the newer architectures and one for the older; each refuses the other's PTX version.
    for ptxas in sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
        command = [ptxas, "-v", f"-arch={arch}", "-o", os.devnull, "/dev/stdin"]
        run = subprocess.run(command, input=ptx, capture_output=True, text=True)
        if run.returncode == 0:
            break
    assert run.returncode == 0, run.stderr
    numbers = [int(re.search(what, run.stderr)[1]) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    return ptx, *numbers, kernel.metadata.shared
