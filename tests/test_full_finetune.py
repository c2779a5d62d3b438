"""The full fine-tune is plain training of every weight."""

import json
import math

import pytest
import torch
from cuda_cases import needs_pretend_gpu, on_pretend_card
from torch import nn

from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.training import trainer
from cascade_fast.training.finetune import Finetune, WholeModel, WholeSequences
from cascade_fast.training.full_finetune import full_finetune

CPU = torch.device("cpu")


def _config(settings, out, **changes):
    return make_settings({**settings, "out": str(out), "lr": 1e-3, **changes})


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_torch_s_own(tiny_settings, tmp_path, tied):
    from conftest import save_tiny_base

    schedule = {"epochs": 2, "batch_tokens": 64, "lr_schedule": "linear", "warmup_steps": 0}  # 1e-3, then 5e-4
    base = str(save_tiny_base(tmp_path / "b", tie_word_embeddings=tied))
    config = _config(tiny_settings, tmp_path, base=base, **schedule)
    base = find_base(config)
    sequences = load_sequences(config, base.tokenizer()).splits["train"].first(2)
    ids = sequences.blocks()
    ours = base.load(CPU, torch.float32).requires_grad_(True)
    plain = base.load(CPU, torch.float32).requires_grad_(True)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    blocks = WholeSequences(sequences)
    full = Finetune(
        WholeModel(ours),
        blocks,
        blocks,
        config,
        title="full",
        compute=Compute(CPU, torch.float32),
        folder=tmp_path,
        started=0.0,
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=config.weight_decay)
    for step, lr in enumerate((1e-3, 5e-4)):
        full.step = step
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = plain(input_ids=ids[:, :-1].long()).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().long())
        expected.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        before = full.totals.clone()
        assert full.train_step(torch.arange(2)) == 2 * 32
        loss_sum, tokens, not_finite = (full.totals - before).tolist()
        assert (tokens, not_finite) == (2 * 32, 0)
        torch.testing.assert_close(torch.tensor(loss_sum / tokens), expected.detach())
    for (name, got), want in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # AdamW divides by the gradient's own size: where that is nearly 0, rounding moves a weight by parts of lr.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_helps_and_says_what_it_did(tiny_settings, tmp_path):
    config = _config(tiny_settings, tmp_path / "full", epochs=2)
    folder = full_finetune(config)
    results = json.loads((folder / "results.json").read_text())
    assert results["final"]["all_token_val_ppl"] < results["base"]["val_ppl"]
    assert results["final"]["all_token_test_ppl"] < results["final"]["base_test_ppl"]
    assert [e["tokens"] for e in results["epochs"]] == [40 * 32] * 2
    best = results["epochs"][results["best_epoch"] - 1]
    assert results["final"]["all_token_val_ppl"] == best["val_ppl"] == math.exp(best["val_loss"])
    assert results["stopped"] == "all epochs done"
    assert [p.name for p in folder.iterdir()] == ["results.json"]
    # Again: the same numbers; in the same folder: left as it is; with other settings: refused.
    again = json.loads((full_finetune(_config(tiny_settings, tmp_path / "again")) / "results.json").read_text())
    assert [e["val_loss"] for e in again["epochs"]] == [e["val_loss"] for e in results["epochs"]]
    before = (folder / "results.json").stat().st_mtime_ns
    full_finetune(config)
    assert (folder / "results.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds another run: lr was 0\.001, is 0\.002"):
        full_finetune(_config(tiny_settings, folder, lr=2e-3))


def test_training_that_does_not_help_leaves_the_base(tiny_settings, tmp_path):
    folder = full_finetune(_config(tiny_settings, tmp_path / "full", lr=1.0))
    results = json.loads((folder / "results.json").read_text())
    assert results["best_epoch"] == 0
    assert results["final"]["all_token_val_ppl"] == results["base"]["val_ppl"]
    assert results["final"]["all_token_test_ppl"] == results["final"]["base_test_ppl"]


def test_a_loss_that_is_not_finite_leaves_the_best_before_it(tiny_settings, tmp_path, monkeypatch, capsys):
    real, calls = trainer.linear_cross_entropy, []

    def diverging(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (1.0 if len(calls) <= 20 else math.nan)

    monkeypatch.setattr(trainer, "linear_cross_entropy", diverging)
    results = json.loads((full_finetune(_config(tiny_settings, tmp_path / "full")) / "results.json").read_text())
    assert (results["stopped"], results["best_epoch"], len(results["epochs"])) == ("non-finite loss", 1, 1)
    assert results["final"]["all_token_val_ppl"] == results["epochs"][0]["val_ppl"]
    assert "the loss is not finite. The best before it counts. Try a lower --lr" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_it_cannot_do(tiny_settings, tmp_path):
    with pytest.raises(InputError, match="base_quantization: 'nf4'; must be none"):
        full_finetune(_config(tiny_settings, tmp_path / "full", base_quantization="nf4"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.jpg").write_text("meow")
    with pytest.raises(InputError, match="exists and is not the folder of a full fine-tune"):
        full_finetune(_config(tiny_settings, tmp_path / "other"))


PRETEND = """
import json, torch, pretend_gpu
pretend_gpu.install(card="t4", poison=True, late_copies=True)
from cascade_fast.base.sequences import Sequences
from cascade_fast.training.finetune import WholeSequences
tokens = WholeSequences(Sequences.from_lists([range(n) for n in (9, 5, 7, 9, 3)], [[i % 3 > 0 for i in range(n - 1)]
    for n in (9, 5, 7, 9, 3)]))
picks = torch.arange(5).split(2)
with pretend_gpu.as_cuda(), pretend_gpu.ledger() as ledger:
    there = [(ids, index, label) for (ids, index), label in tokens.batches(picks, torch.device("cuda"))]
here = [(ids, index, label) for (ids, index), label in tokens.batches(picks, torch.device("cpu"))]
same = all(torch.equal(a.cpu(), b) for ours, theirs in zip(there, here, strict=True) for a, b in zip(ours, theirs))
print(json.dumps([same, len(ledger.syncs), [c.pinned and c.non_blocking for c in ledger.copies]]))
"""


@needs_pretend_gpu
def test_a_gpu_gets_batches_that_nobody_waits_for():
    assert on_pretend_card(PRETEND) == [True, 0, [True] * 3]
