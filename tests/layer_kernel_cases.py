"""What the GPU kernels of a layer's operators are held to, whoever runs them.

Shape legend: N rows, D hidden or intermediate size.
"""

import torch
from layer_op_cases import EPS, assert_rounded_once, norm_inputs, randn


def norm_truth(x, added, weight, grads):
    """Outputs and gradients of ``add_rms_norm``, in float64."""
    x, added, weight = (t.double().requires_grad_() for t in (x, added, weight))
    total = x + added
    normed = weight * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    torch.autograd.backward((total, normed), [g.double() for g in grads])
    return total.detach(), normed.detach(), x.grad, weight.grad


def check_norms(body, x, added, weight, grads):
    """The four norm operators on these arguments, those without a sum on ``x`` alone. ``body(op)``: a function like
    that of ops/reference.py."""
    dtype = added.dtype
    total, normed, grad_x, grad_weight = norm_truth(x, added, weight, grads)
    many = 1e-5 * max(1, len(x)) ** 0.5
    got_total, got_normed, inv_rms = body("add_rms_norm")(x, added, weight, EPS)
    assert torch.equal(got_total, x + added)
    assert_rounded_once(got_normed, normed, dtype, atol=2e-6)
    assert_rounded_once(inv_rms, torch.rsqrt(total.square().mean(-1) + EPS), torch.float32)
    for asked in (False, True):
        got = body("add_rms_norm_backward")(*grads, got_total, weight, inv_rms, asked)
        assert_rounded_once(got[0], grad_x, torch.float32, atol=1e-5)
        assert torch.equal(got[1], got[0].to(dtype))
        assert got[2].shape == (weight.shape if asked else (0,))
    assert_rounded_once(got[2], grad_weight, torch.float32, atol=many)

    nothing = torch.zeros_like(grads[0])
    _, normed, grad_x, grad_weight = norm_truth(x, nothing, weight, (nothing, grads[1]))
    got_normed, inv_rms = body("rms_norm")(x, weight, EPS, dtype)
    assert_rounded_once(got_normed, normed, dtype, atol=2e-6)
    for asked in (False, True):
        got = body("rms_norm_backward")(grads[1], x, weight, inv_rms, asked)
        assert_rounded_once(got[0], grad_x, torch.float32, atol=1e-5)
        assert got[1].shape == (weight.shape if asked else (0,))
    assert_rounded_once(got[1], grad_weight, torch.float32, atol=many)


def check_silu(body, gate, up, grad):
    truth = [t.double().requires_grad_() for t in (gate, up)]
    out = torch.nn.functional.silu(truth[0]) * truth[1]
    out.backward(grad.double())
    assert_rounded_once(body("silu_mul")(gate, up), out.detach(), gate.dtype)
    for got, wanted in zip(body("silu_mul_backward")(grad, gate, up), truth, strict=True):
        assert_rounded_once(got, wanted.grad, gate.dtype, atol=2e-6)


def check_all(body, shape, dtype, layout=lambda t: t, device="cpu"):
    x, added, weight, grads = norm_inputs(*shape, dtype)
    x, added, *grads = (layout(t.to(device)) for t in (x, added, *grads))
    check_norms(body, x, added, weight.to(device), grads)
    gates = (randn(*shape, dtype=dtype, seed=i).mul(4) for i in range(2))  # of float16: no overflow, no subnormals
    check_silu(body, *(layout(t.to(device)) for t in (*gates, grads[1])))


def rows_apart(room, begin):
    """A layout: rows in a larger array, ``begin`` elements into it."""

    def layout(t):
        base = t.new_full((t.shape[0], t.shape[1] + room), torch.nan)
        base[:, begin : begin + t.shape[1]] = t
        return base[:, begin : begin + t.shape[1]]

    return layout


LAYOUTS = {
    "16-byte rows with gaps": ((6, 72), rows_apart(56, 0)),
    "rows in the middle of a word": ((6, 72), rows_apart(56, 3)),
    "rows that end in the middle of a word": ((6, 77), rows_apart(51, 0)),
}


def check_non_finite(body):
    x, _, weight, (_, grad) = norm_inputs(4, 24, torch.float16)
    x[0], x[1, 3], x[2, 4] = 0, torch.nan, torch.inf
    out, inv_rms = body("rms_norm")(x, weight, EPS, torch.float16)
    assert torch.equal(out[0], torch.zeros(24, dtype=torch.float16))
    assert out[1].isnan().all()
    assert out[2].isnan().nonzero().tolist() == [[4]]  # inf * 0
    assert body("rms_norm_backward")(grad, x, weight, inv_rms, False)[0][[0, 3]].isfinite().all()
    gate = torch.tensor([[0.0, -0.0, 200.0, -200.0, torch.inf, torch.nan]])
    assert body("silu_mul")(gate, torch.ones_like(gate))[0, :5].tolist() == [0, 0, 200, 0, torch.inf]
    assert body("silu_mul")(gate, torch.ones_like(gate))[0, 5].isnan()
