"""What the benchmarks of training train: stages of SmolLM2-135M's shapes, on random weights and tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cascade_fast.base.base_pass import BasePass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.kind import get_kind, with_layers
from cascade_fast.stages.stage import StageConfig
from cascade_fast.stages.tokens import StageTokens
from cascade_fast.training.stage_trainer import StageTrainer

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


def preset_trainer(preset: str, folder: Path, device: str, **changes: Any) -> StageTrainer:
    """The first stage of a preset on ``BLOCKS`` blocks, in the compute dtype of ``device``; validation is on the same.

    The base is random, and so are the states, keys and values that its pass would leave. Every token is hard, as in
    ``lora``; what a step holds is the preset's ``batch_tokens``. ``changes``: of its settings.
    """
    settings = make_settings({"preset": preset, "seq_len": SEQ_LEN, "hard_ratio": 1.0, **changes})
    settings = with_layers(settings, base_config())
    compute, kind = Compute.choose(device, settings.dtype), get_kind(settings.stage_kind)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(base_config(), dtype=compute.dtype, trust_remote_code=False)
    shape, tokens = kind.config(settings, base_config()), BLOCKS * SEQ_LEN
    kv_shape = shape.kv_shape if kind.attends else None
    dtype = torch.bfloat16 if compute.dtype == torch.bfloat16 else torch.float32
    meta = {"reads": settings.reads}
    store = HiddenStore.create(folder / "store", tokens, 576, dtype, with_loss=False, meta=meta, kv_shape=kv_shape)
    values = {
        "hidden": torch.randn(tokens, 576),
        "label": torch.randint(0, 49_152, (tokens,)),
        "sequence": torch.arange(BLOCKS).repeat_interleave(SEQ_LEN),
        "position": torch.arange(SEQ_LEN).repeat(BLOCKS),
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
    stage = kind.new(settings, base_config(), passed, None, 1)
    hard = kind.tokens([passed.stores["train"]], torch.arange(tokens))
    return StageTrainer(
        stage.train(), hard, hard, settings, number=1, folder=folder, compute=compute,
        log=MetricsLog(folder / "log.jsonl"), log_size=0,
    )  # fmt: skip


def steps_of(trainer: StageTrainer, count: int) -> Callable[[], None]:
    batches = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2)).split(trainer.settings.batch_tokens)
    done = 0

    def run() -> None:
        nonlocal done
        for _ in range(count):
            trainer.train_step(batches[done % (len(batches) - 1)])
            done += 1

    return run
