"""8-bit AdamW on the CPU: against bitsandbytes, against its reference in plain torch, and its state through files."""

import copy

import op_cases as cases
import pytest
import torch

from cascade_fast import ops
from cascade_fast.ops import reference
from cascade_fast.runtime.checkpoint import Checkpoints
from cascade_fast.settings import RunSettings
from cascade_fast.training.adamw8bit import AdamW8bit
from cascade_fast.training.optimizers import build_optimizer, load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")
SHAPES = [(64, 80), (5001,), (17, 3, 111), (4096,), (30, 30), (1,)]  # the last two keep float32 moments
SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}


@pytest.fixture(params=["reference", "cpp"])
def backend(request) -> str:
    return cases.need(request.param)


@pytest.fixture
def chosen(backend, monkeypatch):
    """The backend of the optimizer's calls, too."""
    monkeypatch.setenv("CASCADE_FAST_BACKEND", backend)


def parameters(seed: int = 0, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) / 20) for shape in shapes]


def give_gradients(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        size = torch.rand(p.shape, generator=generator) ** 4
        p.grad = torch.randn(p.shape, generator=generator) * size * 1e-2


def assert_codes_close(ours, theirs, absmax) -> None:
    """Equal to one code."""
    assert torch.equal((ours.int() - theirs.int()).abs() > 1, torch.zeros(ours.shape, dtype=torch.bool))
    assert (ours != theirs).float().mean() <= 1e-2  # a last bit rarely matters


def assert_same_step(ours, theirs, our_params, their_params) -> None:
    for p, q in zip(our_params, their_params, strict=True):
        # The update is about lr: its relative error is a few units in the last place.
        torch.testing.assert_close(p, q, atol=1e-8, rtol=2.4e-7)
        a, b = ours.state[p], theirs.state[q]
        assert a["step"] == b["step"]
        assert set(a) == set(b)
        for number in (1, 2):
            mine, other = a[f"state{number}"], b[f"state{number}"]
            assert mine.dtype == other.dtype
            if mine.dtype == torch.float32:
                torch.testing.assert_close(mine, other, atol=2.4e-7 * other.abs().max().item(), rtol=1e-6)
                continue
            assert torch.equal(a[f"qmap{number}"], b[f"qmap{number}"])
            torch.testing.assert_close(a[f"absmax{number}"], b[f"absmax{number}"], atol=0, rtol=1e-6)
            assert_codes_close(mine, other, a[f"absmax{number}"])


# --- against bitsandbytes ---------------------------------------------------------------------------------------------


def test_steps_as_bitsandbytes_does_and_either_loads_the_other(chosen):
    bnb = pytest.importorskip("bitsandbytes")
    our_params, their_params = parameters(), parameters()
    ours, theirs = AdamW8bit(our_params, **SETTINGS), bnb.optim.AdamW8bit(their_params, **SETTINGS)
    for step in range(1, 13):
        for params in (our_params, their_params):
            give_gradients(params, seed=step)
            if step > 2:
                params[1].grad[:600] = 0.0  # whole blocks without a gradient
        ours.step()
        theirs.step()
        assert_same_step(ours, theirs, our_params, their_params)
        # From one state again, handed over each way in turn: differences of a code must not add up.
        with torch.no_grad():
            for p, q in zip(our_params, their_params, strict=True):
                q.copy_(p) if step % 2 else p.copy_(q)
        if step % 2:
            theirs.load_state_dict(ours.state_dict())
        else:
            ours.load_state_dict(theirs.state_dict())


def test_the_maps_are_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(reference.dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_gradient_that_is_not_finite_does_what_it_does_there(chosen, value):
    bnb = pytest.importorskip("bitsandbytes")
    our_params, their_params = (parameters(shapes=[(5001,)]) for _ in range(2))
    ours, theirs = AdamW8bit(our_params, **SETTINGS), bnb.optim.AdamW8bit(their_params, **SETTINGS)
    for step in range(3):
        for params in (our_params, their_params):
            give_gradients(params, seed=step)
            if step == 1:
                params[0].grad[300] = value
        ours.step()
        theirs.step()
        broken = our_params[0].isnan()
        assert torch.equal(broken, their_params[0].isnan())
        if step == 1:
            assert torch.equal(ours.state[our_params[0]]["state1"][300], theirs.state[their_params[0]]["state1"][300])
    expected = torch.zeros(5001, dtype=torch.bool)
    if value != value:
        expected[300] = True
    elif abs(value) == torch.inf:
        expected[256:512] = True
    else:  # its square is infinite
        expected[300] = broken[300]
    assert torch.equal(broken, expected)


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes", [[], [(0,)], [(1,)], [(255,), (256,), (257,)], [(3, 0, 5), (40, 41)], [(70_001,), (2, 2)]], ids=str
)
def test_cpp_agrees_with_the_reference(shapes, dtype):
    cases.need("cpp")
    for coded in (True, False):
        ours, theirs = (cases.adamw8bit_arguments(shapes, dtype, lambda i, coded=coded: coded) for _ in range(2))
        ops.adamw8bit(*ours, **cases.ADAMW_SETTINGS, backend="cpp")
        ops.adamw8bit(*theirs, **cases.ADAMW_SETTINGS, backend="reference")
        for place in range(6):
            for a, b in zip(ours[place], theirs[place], strict=True):
                if a.dtype == torch.uint8:
                    assert not ((a.int() - b.int()).abs() > 1).any()
                elif a.numel() > 0:  # where old moment and gradient cancel, or a second moment of code 0 divides
                    torch.testing.assert_close(a, b, atol=1e-6 * b.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_every_point_of_the_grid_gets_the_nearest_code(backend, signed):
    """A first step makes the moments multiples of the gradient: every representable ratio to the largest comes by."""
    points = torch.arange(0 if signed else 32768, 65536)
    ratio = (2.0 * points.double() - 65535) / 65535
    grad = ratio if signed else ratio.sqrt()
    grad = torch.nn.functional.pad(grad, (0, -len(grad) % 255), value=0.5).view(-1, 255)
    grad = torch.nn.functional.pad(grad, (0, 1), value=1.0).flatten().float()  # the largest of its block
    n = grad.numel()
    zeros = [[torch.zeros(n, dtype=torch.uint8)] for _ in range(2)] + [[torch.zeros(n // 256)] for _ in range(2)]
    ops.adamw8bit([torch.zeros(n)], [grad], *zeros, [1], **cases.ADAMW_SETTINGS, backend=backend)
    codes = zeros[0 if signed else 1][0].view(-1, 256)[:, :-1].flatten()[: len(points)]
    values = reference.dynamic_map(signed).double()
    error = (values[codes.long()] - ratio).abs()
    least = (values[None, :] - ratio[:, None]).abs().amin(1)
    # On a bound either code will do; in the second moment the root and the square move a point by some last bits.
    assert (error - least).max() <= (3e-6 if signed else 2.1 / 65535)
    assert ((error - least) > 3e-6).float().mean() <= (0.0 if signed else 0.02)


def test_codes_of_values_are_the_values_codes(backend):
    """With no gradient and no decay of the moments, codes stay what they are: decoding and encoding are inverse."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    smallest1 = (reference.dynamic_map(True).abs() < 1e-4).repeat(2)  # finer than the grid
    smallest2 = (reference.dynamic_map(False) < 1e-4).repeat(2)
    state = [[codes.clone()], [codes.clone()], [torch.tensor([1.0, 3e-5])], [torch.tensor([1.0, 3e-9])]]
    settings = {**cases.ADAMW_SETTINGS, "beta1": 1.0 - 1e-12, "beta2": 1.0 - 1e-12}
    ops.adamw8bit([torch.zeros(512)], [torch.zeros(512)], *state, [1], **settings, backend=backend)
    assert torch.equal(state[0][0][~smallest1], codes[~smallest1])
    assert torch.equal(state[1][0][~smallest2], codes[~smallest2])
    torch.testing.assert_close(state[2][0], torch.tensor([1.0, 3e-5]), atol=0, rtol=1e-6)
    torch.testing.assert_close(state[3][0], torch.tensor([1.0, 3e-9]), atol=0, rtol=1e-6)


def test_gradients_may_have_any_strides(backend):
    ours, theirs = (cases.adamw8bit_arguments([(64, 70)]) for _ in range(2))
    ours[1][0] = ours[1][0].t().contiguous().t()
    ops.adamw8bit(*ours, **cases.ADAMW_SETTINGS, backend=backend)
    ops.adamw8bit(*theirs, **cases.ADAMW_SETTINGS, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(cases.flat(ours), cases.flat(theirs), strict=True))


BAD = {
    "params": (0, lambda t: t.double(), r"params\[0\]: .*float64.*; must be float32"),
    "strided params": (0, lambda t: t.t(), r"params\[0\]: .*strides.*; must be contiguous"),
    "grads": (1, lambda t: t[:1], r"grads\[0\]: \(1, 90\).*; must have shape \(60, 90\)"),
    "dtype of grads": (1, lambda t: t.double(), r"grads\[0\]: .*float64.*; must be float32, float16 or bfloat16"),
    "state1": (2, lambda t: t.flatten(), r"state1\[0\]: .*; must be uint8 or float32"),
    "state2": (3, lambda t: t.float(), r"state2\[0\]: .*float32.*; must be uint8 or float32 like state1"),
    "absmax1": (4, lambda t: t[1:], r"absmax1\[0\]: \(21,\).*; must be contiguous float32 of shape \(22,\)"),
    "absmax2": (5, lambda t: t.half(), r"absmax2\[0\]: .*float16"),
    "steps": (6, lambda step: 0, r"steps\[0\]: 0; must be 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_nothing_is_changed(backend, name):
    place, change, message = BAD[name]
    args = cases.adamw8bit_arguments([(60, 90)])
    args[place][0] = change(args[place][0])
    before = copy.deepcopy(args)
    with pytest.raises(ValueError, match=message):
        ops.adamw8bit(*args, **cases.ADAMW_SETTINGS, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(cases.flat(args), cases.flat(before), strict=True))


def test_lists_of_different_lengths_are_refused(backend):
    args = cases.adamw8bit_arguments([(60, 90)])
    with pytest.raises(ValueError, match="grads: 0 of them; must be one for each of 1 params"):
        ops.adamw8bit(args[0], [], *args[2:], **cases.ADAMW_SETTINGS, backend=backend)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def run_config(name: str) -> RunSettings:
    return RunSettings(optimizer=name, lr=1e-2)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_on_the_cpu_ours_is_built_without_bitsandbytes(name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    optimizer = build_optimizer(parameters(), run_config(name), CPU)
    assert isinstance(optimizer, AdamW8bit)
    assert optimizer.defaults["weight_decay"] == run_config(name).weight_decay


def test_learns_as_adamw_does(chosen):
    """A least-squares fit comes as far with 8-bit moments as with torch's own."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 64, generator=generator), torch.randn(64, 80, generator=generator)
    losses = []
    for make in (AdamW8bit, torch.optim.AdamW):
        fitted = torch.nn.Parameter(torch.zeros(64, 80))
        optimizer = make([fitted], lr=0.05, weight_decay=0.0)
        for _ in range(60):
            loss = (x @ fitted - x @ w).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.2 * losses[1] + 0.1
    assert losses[0] < 20.0  # of 64 at the start


def bits_of(params, optimizer) -> list[torch.Tensor]:
    tensors, _ = optimizer_tensors(optimizer)
    return [p.detach().clone() for p in params] + [tensors[name].clone() for name in sorted(tensors)]


@pytest.mark.parametrize("maker", ["ours", "bitsandbytes"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(chosen, tmp_path, maker):
    if maker == "ours":
        make = lambda params: build_optimizer(params, run_config("adamw8bit"), CPU)  # noqa: E731
    else:
        bnb = pytest.importorskip("bitsandbytes")
        make = lambda params: bnb.optim.AdamW8bit(params, lr=1e-2)  # noqa: E731
    params = parameters()
    optimizer = make(params)
    for step in range(6):
        if step == 3:
            tensors, values = optimizer_tensors(optimizer)
            held = {"p": torch.cat([p.detach().flatten() for p in params]), **tensors}
            Checkpoints(tmp_path).save(step, held, {"optimizer": values})
        give_gradients(params, seed=step)
        optimizer.step()
    undisturbed = bits_of(params, optimizer)

    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None
    tensors, state = loaded
    params = parameters(seed=9)
    with torch.no_grad():
        for p, piece in zip(params, tensors.pop("p").split([p.numel() for p in params]), strict=True):
            p.copy_(piece.view_as(p))
    optimizer = make(params)
    load_optimizer_tensors(optimizer, tensors, state["optimizer"])
    for step in range(3, 6):
        give_gradients(params, seed=step)
        optimizer.step()
    resumed = bits_of(params, optimizer)
    assert all(torch.equal(cases.bits(a), cases.bits(b)) for a, b in zip(undisturbed, resumed, strict=True))


@pytest.fixture
def paging(monkeypatch):
    """bitsandbytes' paged optimizer with pages that need no GPU; the tensors that it has prefetched."""
    bnb = pytest.importorskip("bitsandbytes")
    prefetched: list[torch.Tensor] = []

    class OnTheCPU(bnb.optim.PagedAdamW8bit):
        def get_state_buffer(self, p, dtype=torch.float32):
            buffer = torch.zeros_like(p, dtype=dtype)
            if p.numel() >= 1e5:  # bitsandbytes' own bound
                buffer.is_paged = True
                self.page_mng.paged_tensors.append(buffer)
            return buffer

        def load_state_dict(self, state_dict, move_to_device=True):
            assert not move_to_device  # all of it at once may be more than the GPU holds
            super().load_state_dict(state_dict, move_to_device)

    monkeypatch.setattr(bnb.optim, "PagedAdamW8bit", OnTheCPU)
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", prefetched.append)
    monkeypatch.setattr(bnb.functional.GlobalPageManager.get_instance(), "paged_tensors", [])
    return prefetched


def test_a_paged_state_is_paged_after_loading_too(paging, tmp_path):
    shapes = [(400, 300), (64, 80), (30, 30)]  # paged, 8 bit, float32
    gpu = torch.device("cuda")  # named only
    params = parameters(shapes=shapes)
    optimizer = build_optimizer(params, run_config("paged_adamw8bit"), gpu)
    give_gradients(params, seed=0)
    optimizer.step()
    tensors, values = optimizer_tensors(optimizer)
    Checkpoints(tmp_path).save(1, tensors, {"optimizer": values})
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None

    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = build_optimizer(again, run_config("paged_adamw8bit"), gpu)
    load_optimizer_tensors(resumed, loaded[0], loaded[1]["optimizer"])
    moments = [resumed.state[again[0]][name] for name in ("state1", "state2")]
    assert all(moment.is_paged and moment.dtype == torch.uint8 for moment in moments)
    assert all(any(t is moment for t in resumed.page_mng.paged_tensors) for moment in moments)
    assert not any(hasattr(resumed.state[p]["state1"], "is_paged") for p in again[1:])

    paging.clear()
    for ps, each in ((params, optimizer), (again, resumed)):
        give_gradients(ps, seed=1)
        each.step()
    assert len(paging) == 4  # two moments of each optimizer
    assert paging[2] is moments[0]
    assert paging[3] is moments[1]
    for a, b in zip(bits_of(params, optimizer), bits_of(again, resumed), strict=True):
        assert torch.equal(cases.bits(a), cases.bits(b))


def test_parameters_without_a_gradient_wait():
    params = parameters()
    optimizer = AdamW8bit(params)
    give_gradients(params, seed=0)
    params[2].grad = None
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before)
    assert params[2] not in optimizer.state
    give_gradients(params, seed=1)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [2, 2, 1, 2, 2, 2]


def test_a_step_between_forward_and_backward_is_noticed():
    p = parameters()[0]
    optimizer = AdamW8bit([p])
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_settings_and_states_that_do_not_fit_are_refused():
    params = parameters()
    for bad in ({"lr": -1.0}, {"eps": float("nan")}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdamW8bit(params, **bad)
    optimizer = AdamW8bit(params)
    give_gradients(params, seed=0)
    optimizer.step()
    for name, change, message in (
        ("state1", lambda t: t.float(), "state1: .*float32; must be .*uint8"),
        ("absmax2", lambda t: t[1:], "absmax2: "),
        ("qmap1", lambda t: t * 2, "qmap1: not the dynamic map"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][name] = change(saved["state"][0][name])
        with pytest.raises(ValueError, match=f"parameter 0.*{message}"):
            optimizer.load_state_dict(saved)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["absmax1"]
    with pytest.raises(ValueError, match=r"must be .*absmax1"):
        optimizer.load_state_dict(saved)
