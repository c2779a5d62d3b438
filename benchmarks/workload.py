"""What the benchmarks of training and base pass run: SmolLM2-135M's shapes, on random weights and tokens."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cascade_fast.base import fill_store
from cascade_fast.base.base_pass import BasePass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.sequences import Sequences
from cascade_fast.criteria import get_criterion
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import Progress
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.selection import hard_count
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.kind import get_kind, with_layers
from cascade_fast.stages.stage import StageConfig
from cascade_fast.stages.tokens import StageTokens
from cascade_fast.training.stage_trainer import StageTrainer
from cascade_fast.training.trainer import validation_loss

CPU = torch.device("cpu")
LAYERS, TOKENS, BLOCKS, SEQ_LEN = 8, 8192, 16, 128


def base_config() -> LlamaConfig:
    """SmolLM2-135M's."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )


def random_store(folder: Path, dtype: torch.dtype) -> HiddenStore:
    store = HiddenStore.create(folder, TOKENS, 576, dtype, with_loss=True, meta={"reads": "residual"})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 576, generator=generator)
    store.append({"hidden": hidden, "label": torch.randint(0, 49_152, (TOKENS,), generator=generator)})
    return store.finish()


def trainer(settings: RunSettings, folder: Path, dtype: torch.dtype) -> StageTrainer:
    shape = StageConfig.from_base(
        base_config(), layers=settings.layers_per_stage, init=settings.init, head=settings.head, reads=settings.reads
    )
    head_VD = (torch.randn(49_152, 576, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    stage = AppendedStage(shape, head_VD=head_VD if settings.head == "shared" else None)
    store = random_store(folder / "store", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    tokens = StageTokens(store, torch.arange(TOKENS))
    return StageTrainer(
        stage, tokens, tokens, settings, number=1, folder=folder, compute=Compute(CPU, dtype),
        log=MetricsLog(folder / "log.jsonl"), log_size=0,
    )  # fmt: skip


def preset_trainer(
    preset: str, folder: Path, device: str, config: LlamaConfig | None = None, blocks: int = BLOCKS, **changes: Any
) -> StageTrainer:
    """The first stage of a preset on ``blocks`` blocks, in the compute dtype of ``device``; validation is on the same.

    The base is random, and so are the states, keys and values that its pass would leave, and which tokens are hard:
    the preset's share of them. ``config``: the base's, by default SmolLM2-135M's; ``changes``: other settings, among
    them ``store``: on the device only where it says so.
    """
    config = config or base_config()
    settings = make_settings({"preset": preset, "seq_len": SEQ_LEN, "train_blocks": blocks, **changes})
    settings = with_layers(settings, config)
    compute, kind = Compute.choose(device, settings.dtype), get_kind(settings.stage_kind)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=compute.dtype, trust_remote_code=False)
    shape, tokens = kind.config(settings, config), blocks * SEQ_LEN
    kv_shape = shape.kv_shape if kind.attends and not kind.needs(settings).all_enter else None
    meta, size = {"reads": settings.reads}, config.hidden_size
    store = HiddenStore.create(
        folder / "store", tokens, size, compute.dtype, with_loss=False, meta=meta, kv_shape=kv_shape
    )
    values = {
        "hidden": torch.randn(tokens, size),
        "label": torch.randint(0, config.vocab_size, (tokens,)),
        "sequence": torch.arange(blocks).repeat_interleave(SEQ_LEN),
        "position": torch.arange(SEQ_LEN).repeat(blocks),
    }
    store.append(values | ({"kv": torch.randn(tokens, *kv_shape)} if kv_shape else {}))
    passed = BasePass(
        stores={"train": store.finish()},
        head_VD=base.lm_head.weight.detach(),
        norm_D=base.model.norm.weight.detach(),
        layers=base.model.layers[-settings.layers_per_stage :].state_dict(prefix="layers."),
        parameters=0,
        seconds=0.0,
        reused=False,
    ).to(compute.device, layers=settings.adapter != "none")
    stage = kind.new(settings, config, passed, None, 1)
    index_K = torch.randperm(tokens)[: hard_count(settings.hard_ratio, tokens)].sort().values
    train = passed.stores["train"]
    near = train.to(compute.device) if settings.store == "device" else train
    hard = kind.tokens([near], index_K, easy_too=settings.easy_tokens == "forward")
    return StageTrainer(
        stage.train(), hard, hard, settings, number=1, folder=folder, compute=compute,
        log=MetricsLog(folder / "log.jsonl"), log_size=0,
    )  # fmt: skip


def steps_of(trainer: StageTrainer, count: int) -> Callable[[], int]:
    """``count`` optimizer steps on whole batches, the next ones in each call; how many tokens they took."""
    order = torch.randperm(trainer.train.units, generator=torch.Generator().manual_seed(2))
    whole = [batch for batch in order.split(trainer.batch_units) if len(batch) == trainer.batch_units]
    batches = itertools.cycle(whole)
    return lambda: sum(trainer.train_step(next(batches)) for _ in range(count))


def base_pass(
    folder: Path, compute: Compute, criterion: str, config: LlamaConfig | None = None, blocks: int = BLOCKS
) -> Callable[[], HiddenStore]:
    """A base pass of a random base over ``blocks`` random blocks into a new store, after a check of the first scores
    against the base's own logits."""
    config, scores = config or base_config(), get_criterion(criterion)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=compute.dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    model = model.eval().to(compute.device)
    ids_BT = torch.randint(0, config.vocab_size, (blocks, SEQ_LEN + 1), dtype=torch.int32)
    sequences, needs, tokens = Sequences.from_blocks(ids_BT), fill_store.BaseNeeds("residual"), blocks * SEQ_LEN

    def run() -> HiddenStore:
        store = HiddenStore.create(
            folder, tokens, config.hidden_size, compute.dtype, with_loss=scores.needs_logits, meta={}
        )
        with Progress("base pass", tokens) as progress:
            fill_store.fill_store(model, sequences, store, needs, scores, progress)
        return store

    if scores.needs_logits:
        with torch.inference_mode():
            logits_SV = model(ids_BT[:1, :-1].long().to(compute.device)).logits[0].float()
        entropy_S = torch.distributions.Categorical(logits=logits_SV).entropy().cpu()
        check_close(float(run()["score"][:SEQ_LEN].abs().mean()), float(entropy_S.mean()), compute.dtype)
    return run


def check_close(found: float, expected: float, dtype: torch.dtype) -> None:
    """The right answers, or no benchmark: AssertionError where they differ by more than rounding in ``dtype``."""
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert math.isclose(found, expected, rel_tol=tolerance), f"{found}, expected {expected} to {tolerance:g}"


def check_trainer(trainer: StageTrainer) -> None:
    """Its loss in the compute dtype is that in float32."""
    exact = Compute(trainer.device, torch.float32)
    found, truth = (validation_loss(trainer.module, trainer.val, compute) for compute in (trainer.compute, exact))
    check_close(found, truth, trainer.compute.dtype)
