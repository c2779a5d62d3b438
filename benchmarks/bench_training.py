"""Training steps, base pass, loss and optimizers under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

On the shapes of SmolLM2-135M with random weights and tokens, in the compute dtype of the machine, on the CPU and, where
there is one, on a CUDA GPU. Answers are checked before the clock runs. ``stage_training.py`` and ``lora.py`` are the
ones to quote: they let the variants take turns. This one is for comparing two commits or two machines.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import optimizer_step
from benchmarks.naive_loop import BATCH_TOKENS, naive_losses, naive_stage
from benchmarks.workload import BLOCKS, LAYERS, SEQ_LEN, base_config, preset_trainer
from cascade_fast.base import fill_store as base_pass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.sequences import Sequences
from cascade_fast.criteria import get_criterion
from cascade_fast.losses import linear_cross_entropy
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import Progress
from cascade_fast.training.adamw8bit import AdamW8bit
from cascade_fast.training.trainer import validation_loss

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


def close(found: float, expected: float, dtype: torch.dtype) -> None:
    assert found == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-2)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_training_step(benchmark, device, tmp_path, preset):
    """One optimizer step. ``tokens`` of the extra info is how many it took."""
    trainer = preset_trainer(preset, tmp_path, device)
    exact = Compute(trainer.device, torch.float32)
    found, truth = (validation_loss(trainer.module, trainer.val, compute) for compute in (trainer.compute, exact))
    close(found, truth, trainer.compute.dtype)
    order = torch.randperm(trainer.train.units, generator=torch.Generator().manual_seed(2))
    batches = [batch for batch in order.split(trainer.batch_units) if len(batch) == trainer.batch_units]
    taken: list[int] = []
    timed(benchmark, device, lambda: taken.append(trainer.train_step(batches[len(taken) % len(batches)])))
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
    close(first, float(torch.nn.functional.cross_entropy(logits_NV, label_N)), torch.float32)
    order = [torch.arange(BATCH_TOKENS)] * 8
    timed(benchmark, device, lambda: naive_losses(stage, hidden_ND, label_N, order), rounds=3)
    benchmark.extra_info["tokens"] = 8 * BATCH_TOKENS


# --- base pass --------------------------------------------------------------------------------------------------------


def test_base_pass(benchmark, device, tmp_path):
    """Blocks of text through the frozen base, states and scores into a store."""
    compute = Compute.choose(device, "auto")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        base_config(), dtype=compute.dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    model = model.eval().to(compute.device)
    ids_BT = torch.randint(0, VOCAB, (BLOCKS, SEQ_LEN + 1), dtype=torch.int32)
    sequences = Sequences.from_blocks(ids_BT)
    needs, scores = base_pass.BaseNeeds("residual"), get_criterion("entropy")

    def run() -> HiddenStore:
        folder = tmp_path / "store"
        dtype = torch.bfloat16 if compute.dtype == torch.bfloat16 else torch.float32
        store = HiddenStore.create(folder, BLOCKS * SEQ_LEN, 576, dtype, with_loss=True, meta={})
        with Progress("base pass", BLOCKS * SEQ_LEN) as progress:
            base_pass.fill_store(model, sequences, store, needs, scores, progress)
        return store

    with torch.inference_mode():
        logits_SV = model(ids_BT[:1, :-1].long().to(compute.device)).logits[0].float()
    entropy_S = torch.distributions.Categorical(logits=logits_SV).entropy().cpu()
    close(float(run()["score"][:SEQ_LEN].abs().float().mean()), float(entropy_S.mean()), compute.dtype)
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

    close(float(fused().detach()), float(plain().detach()), compute.dtype)
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
    found, truth = made[which](_parameters(device)), made["fused adamw"](_parameters(device))
    found.step()
    truth.step()
    for ours, theirs in zip(_all(found), _all(truth), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * optimizer_step.SETTINGS["lr"])  # a step moves by lr
        assert (ours - theirs).abs().mean() < 0.1 * optimizer_step.SETTINGS["lr"]
    timed(benchmark, device, found.step)


def _parameters(device: str) -> list[torch.nn.Parameter]:
    moved = []
    for parameter in optimizer_step.make_parameters():
        moved.append(torch.nn.Parameter(parameter.detach().to(device)))
        moved[-1].grad = parameter.grad.to(device)
    return moved


def _all(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
