"""Training steps, base pass, loss and optimizers under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

On the shapes of SmolLM2-135M with random weights and tokens, in the compute dtype of the machine, on the CPU and, where
there is one, on a CUDA GPU. Answers are checked before the clock runs. ``stage_training.py`` and ``lora.py`` are the
ones to quote: they let the variants take turns. This one is for comparing two commits or two machines.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import optimizer_step
from benchmarks.naive_loop import BATCH_TOKENS, naive_losses, naive_stage
from benchmarks.workload import (
    BLOCKS,
    LAYERS,
    SEQ_LEN,
    base_config,
    base_pass,
    check_close,
    check_trainer,
    preset_trainer,
    steps_of,
)
from cascade_fast.losses import linear_cross_entropy
from cascade_fast.runtime.compute import Compute
from cascade_fast.training.adamw8bit import AdamW8bit

PRESETS = ("warm", "second-look", "lora", "seed")
LOSS_TOKENS, VOCAB = 512, 49_152


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


def timed(benchmark, device: str, run: Callable[[], object], rounds: int = 5) -> None:
    def once() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=rounds, warmup_rounds=1)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_training_step(benchmark, device, tmp_path, preset):
    """One optimizer step. ``tokens`` of the extra info is how many it took."""
    trainer = preset_trainer(preset, tmp_path, device)
    check_trainer(trainer)
    step, taken = steps_of(trainer, 1), list[int]()
    timed(benchmark, device, lambda: taken.append(step()))
    benchmark.extra_info["tokens"] = sum(taken) / len(taken)


def test_naive_steps(benchmark, device):
    """Eight steps of the loop of the original experiment, 32 tokens each: the baseline of ``seed``. It makes its
    optimizer itself, so one step alone would be mostly that."""
    stage = naive_stage(base_config(), LAYERS).to(device)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(BATCH_TOKENS, 576, generator=generator).to(device)
    label_N = torch.randint(0, VOCAB, (BATCH_TOKENS,), generator=generator).to(device)
    (first,) = naive_losses(stage, hidden_ND, label_N, [torch.arange(BATCH_TOKENS)], lr=0.0)
    with torch.no_grad():
        logits_NV = stage(inputs_embeds=hidden_ND[:, None], return_dict=True).logits.squeeze(1)
    check_close(first, float(torch.nn.functional.cross_entropy(logits_NV, label_N)), torch.float32)
    order = [torch.arange(BATCH_TOKENS)] * 8
    timed(benchmark, device, lambda: naive_losses(stage, hidden_ND, label_N, order), rounds=3)
    benchmark.extra_info["tokens"] = 8 * BATCH_TOKENS


# --- base pass --------------------------------------------------------------------------------------------------------


def test_base_pass(benchmark, device, tmp_path):
    """Blocks of text through the frozen base, states and scores into a store."""
    run = base_pass(tmp_path / "store", Compute.choose(device, "auto"), "entropy")
    timed(benchmark, device, run, rounds=3)
    benchmark.extra_info["tokens"] = BLOCKS * SEQ_LEN


# --- loss and optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["fused", "plain"])
def test_loss(benchmark, device, which):
    """Head and cross-entropy of 512 tokens, forward and backward."""
    compute = Compute.choose(device, "auto")
    generator = torch.Generator().manual_seed(0)
    head_VD = (torch.randn(VOCAB, 576, generator=generator) * 0.02).to(compute.device, compute.dtype)
    label_N = torch.randint(0, VOCAB, (LOSS_TOKENS,), generator=generator).to(compute.device)
    hidden_ND = torch.randn(LOSS_TOKENS, 576, generator=generator).to(compute.device, compute.dtype).requires_grad_()

    def fused() -> Tensor:
        return linear_cross_entropy(hidden_ND, head_VD, label_N, dtype=compute.dtype)

    def plain() -> Tensor:
        return torch.nn.functional.cross_entropy((hidden_ND @ head_VD.T).float(), label_N)

    check_close(float(fused().detach()), float(plain().detach()), compute.dtype)
    loss = fused if which == "fused" else plain
    timed(benchmark, device, lambda: loss().backward())


@pytest.mark.parametrize("which", optimizer_step.NAMES)
def test_optimizer_step(benchmark, device, which):
    """One step over a stage of 8 layers, 24.8M parameters."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "fused adamw": lambda params: torch.optim.AdamW(params, fused=True, **optimizer_step.SETTINGS),
        "adamw8bit": lambda params: AdamW8bit(params, **optimizer_step.SETTINGS),
        "bitsandbytes adamw8bit": lambda params: bitsandbytes.optim.AdamW8bit(params, **optimizer_step.SETTINGS),
    }
    if device == "cuda" and which == "adamw8bit":
        pytest.skip("on a GPU 8-bit AdamW is bitsandbytes'")
    found, truth = (made[name](optimizer_step.make_parameters(device=device)) for name in (which, "fused adamw"))
    found.step()
    truth.step()
    for ours, theirs in zip(_all(found), _all(truth), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * optimizer_step.SETTINGS["lr"])  # a step moves by lr
        assert (ours - theirs).abs().mean() < 0.1 * optimizer_step.SETTINGS["lr"]
    timed(benchmark, device, found.step)


def _all(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
