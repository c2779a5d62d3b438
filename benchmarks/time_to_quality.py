"""Seconds until the hard-token validation perplexity is as good as the best of the original experiment's loop.

Real weights, real text, the same blocks; loading the base, base pass and selection count on every side. Three courses:
the baseline (``naive_loop.py``, in a process of its own), our presets ``warm`` and ``seed``, the latter the same
arithmetic as the baseline's. ``python -m benchmarks.stage_training --quality`` runs it.
"""

import math
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.naive_loop import BATCH_TOKENS, naive_losses, naive_stage
from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import BaseModel, find_base
from cascade_fast.base.sequences import SplitSequences
from cascade_fast.base.texts import load_sequences
from cascade_fast.criteria import get_criterion
from cascade_fast.runtime.compute import Compute, choose_dtype, keep_freed_memory
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.selection import select_below, select_hardest
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.exits import evaluate_exits
from cascade_fast.stages.kind import base_needs
from cascade_fast.stages.stage import StageConfig
from cascade_fast.stages.tokens import StageTokens
from cascade_fast.training.stage_trainer import StageTrainer
from cascade_fast.training.trainer import validation_loss

CPU = torch.device("cpu")
LAYERS = 8
AT_ONCE = 16  # blocks of the naive base pass


def naive_base_pass(path: str, ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(hidden_ND, label_N, score_N)`` the plain way: float32, every hidden state, all logits."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, dtype=torch.float32).eval()
    hidden, scores = [], []
    with torch.inference_mode():
        for ids in ids_BT.split(AT_ONCE):
            out = model(ids[:, :-1].long(), output_hidden_states=True)
            first, last = out.hidden_states[0].flatten(0, 1), out.hidden_states[-1].flatten(0, 1)
            hidden.append(last.clone())
            scores.append(torch.nn.functional.cosine_similarity(first, last, dim=-1))
    return torch.cat(hidden), ids_BT[:, 1:].flatten().long(), torch.cat(scores)


def naive_to_best(link: Connection, path: str, blocks: dict[str, Tensor], ratio: float, most_epochs: int) -> None:
    """The baseline from the start until its hard-token validation perplexity stops falling."""
    start = time.perf_counter()
    data = {split: naive_base_pass(path, ids) for split, ids in blocks.items()}
    hard = {s: torch.nonzero(score <= torch.quantile(score, ratio)).flatten() for s, (_, _, score) in data.items()}
    pass_seconds = time.perf_counter() - start
    base = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, dtype=torch.float32)
    model, generator = naive_stage(base.config, LAYERS, seed=42), torch.Generator().manual_seed(42)
    del base
    hidden_ND, label_N, _ = data["train"]
    epochs: list[dict[str, float]] = []
    while len(epochs) < most_epochs and (len(epochs) < 2 or epochs[-1]["val_ppl"] < epochs[-2]["val_ppl"]):
        order = hard["train"][torch.randperm(len(hard["train"]), generator=generator)]
        losses = naive_losses(model, hidden_ND, label_N, iter(order.split(BATCH_TOKENS)))
        model.eval()
        total = 0.0
        with torch.inference_mode():
            for picked in hard["val"].split(1024):
                logits = model(inputs_embeds=data["val"][0][picked].unsqueeze(1)).logits.squeeze(1)
                total += torch.nn.functional.cross_entropy(logits, data["val"][1][picked], reduction="sum").item()
        val_ppl = math.exp(total / len(hard["val"]))
        epochs.append(
            {"seconds": time.perf_counter() - start, "val_ppl": val_ppl, "train_loss": statistics.mean(losses)}
        )
    link.send({"base_pass_seconds": pass_seconds, "epochs": epochs, "hard": {s: len(h) for s, h in hard.items()}})


def our_course(base: BaseModel, sequences: SplitSequences, settings: RunSettings, folder: Path) -> dict[str, Any]:
    """One of our presets from the start: a point before training and one after each epoch."""
    dtype, _ = choose_dtype(CPU, settings.dtype)
    folder.mkdir()
    start = time.perf_counter()
    passed = base_pass(base, sequences, settings, base_needs(settings), Compute(CPU, dtype), folder)
    pass_seconds = time.perf_counter() - start
    train, val = passed.stores["train"], passed.stores["val"]
    selection = select_hardest(train["score"], settings.hard_ratio)
    if settings.val_selection == "quantile":
        val_index_K = select_hardest(val["score"], settings.hard_ratio).index_K
    else:
        val_index_K = select_below(val["score"], selection.threshold)
    shape = StageConfig.from_base(
        base.config, layers=settings.layers_per_stage, init=settings.init, head=settings.head, reads=settings.reads
    )
    head_VD = passed.head_VD if settings.head == "shared" else None
    stage = AppendedStage(shape, head_VD=head_VD, norm_D=passed.norm_D, seed=settings.seed + 1)
    hard, hard_val = StageTokens(train, selection.index_K), StageTokens(val, val_index_K)
    before = math.exp(validation_loss(stage, hard_val, Compute(CPU, dtype)))
    points = [{"step": 0, "val_ppl": before, "seconds": time.perf_counter() - start}]
    trainer = StageTrainer(
        stage, hard, hard_val, settings, number=1, folder=folder, compute=Compute(CPU, dtype),
        log=MetricsLog(folder / "log.jsonl"), log_size=0,
    )  # fmt: skip
    spent = points[0]["seconds"]
    for epoch in trainer.run().epochs:
        spent += epoch.seconds
        points.append({"step": epoch.epoch * trainer.steps_per_epoch, "val_ppl": epoch.val_ppl, "seconds": spent})
    how = {"criterion": get_criterion(settings.criterion), "compute": Compute(CPU, dtype)}
    all_tokens = evaluate_exits([], val, **how).perplexity
    return {
        "base_pass_seconds": pass_seconds,
        "points": points,
        "hard": {"train": len(hard), "val": len(hard_val)},
        "base_all_token_val_ppl": all_tokens,
    }


def measure(dataset: str, train_blocks: int, val_blocks: int, most_epochs: int) -> dict[str, Any]:
    """All three courses, one after the other."""
    keep_freed_memory()
    data = {"dataset": dataset, "train_blocks": train_blocks, "val_blocks": val_blocks, "test_blocks": 0}
    warm = make_settings(data)
    base = find_base(warm)
    sequences = load_sequences(warm, base.tokenizer())
    context = multiprocessing.get_context("spawn")
    link, other_end = context.Pipe()
    blocks = {split: sequences.splits[split].blocks() for split in ("train", "val")}
    args = (other_end, str(base.path), blocks, warm.hard_ratio, most_epochs)
    process = context.Process(target=naive_to_best, args=args, daemon=True)
    process.start()
    naive = link.recv()
    process.join()
    seed = make_settings({**data, "preset": "seed", "hard_ratio": warm.hard_ratio, "epochs": len(naive["epochs"])})
    with tempfile.TemporaryDirectory() as name:
        ours = our_course(base, sequences, warm, Path(name) / "warm")
        same = our_course(base, sequences, seed, Path(name) / "seed")
    best = min(naive["epochs"], key=lambda e: e["val_ppl"])
    reached = next((point for point in ours["points"] if point["val_ppl"] <= best["val_ppl"]), None)
    return {
        "ratio": best["seconds"] / reached["seconds"] if reached else 0.0,
        "naive": naive,
        "warm": ours,
        "seed": same,
        "naive_best": best,
        "reached": reached,
        "settings": {**data, "hard_ratio": warm.hard_ratio},
    }
