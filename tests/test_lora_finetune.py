"""LoRA as a baseline: peft's own adapters, trained by our trainer on a base that stays as it is."""

import json
import sys

import pytest
import torch
from torch import nn

from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.training import finetune
from cascade_fast.training.finetune import Finetune, WholeModel, WholeSequences
from cascade_fast.training.full_finetune import full_finetune
from cascade_fast.training.lora_finetune import LoraMethod, lora_finetune

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
LAYER = 2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + 48) + (48 + 32)  # in + out of each linear layer of the tiny base


def _config(settings, out, **changes):
    return make_settings({**settings, "out": str(out), "lr": 1e-3, "lora_rank": 4, **changes})


def _loaded(config, dtype):
    """The base with its adapters, and the trainer's parts."""
    base = find_base(config)
    model, method = base.load(CPU, dtype), LoraMethod()
    method.prepare(model, config)
    sequences = load_sequences(config, base.tokenizer()).splits["train"]
    return model, sequences


def _trainer(model, sequences, config, folder, dtype):
    of = WholeSequences(sequences)
    compute = Compute(CPU, dtype)
    return Finetune(WholeModel(model), of, of, config, title="LoRA", compute=compute, folder=folder, started=0.0)


def _results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_is_frozen_bit_for_bit(tiny_settings, tmp_path, dtype):
    config = _config(tiny_settings, tmp_path, epochs=1, seed=3)
    model, sequences = _loaded(config, LoraMethod().dtype(Compute(CPU, dtype)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = _trainer(model, sequences, config, tmp_path, dtype)
    trainer.run(1e9)
    frozen = {name for name in before if "lora_" not in name}
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.dtype == dtype
            assert not parameter.requires_grad
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        else:
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, before[name])
    assert len(frozen) == 2 + 3 * 9  # embeddings (and head), norms, linear layers
    assert {id(p) for p in trainer.optimizer.state} == {id(p) for n, p in model.named_parameters() if n not in frozen}
    assert sum(p.numel() for p in trainer.parameters) == 3 * 4 * LAYER


def test_a_step_is_peft_s_own(tiny_settings, tmp_path):
    config = _config(tiny_settings, tmp_path, warmup_steps=0)
    ours, sequences = _loaded(config, torch.float32)
    sequences = sequences.first(2)
    torch.manual_seed(config.seed)
    plain = peft.get_peft_model(
        find_base(config).load(CPU, torch.float32),
        peft.LoraConfig(r=4, lora_alpha=32, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"),
    )
    trainable = [p for p in plain.parameters() if p.requires_grad]
    ids = sequences.blocks().long()
    logits = plain(input_ids=ids[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(trainable, config.grad_clip)
    torch.optim.AdamW(trainable, lr=1e-3, weight_decay=config.weight_decay).step()
    trainer = _trainer(ours, sequences, config, tmp_path, torch.float32)
    assert trainer.train_step(torch.arange(2)) == 2 * 32
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert len(names) == len(trainable) == 3 * 7 * 2
    for name, got, want in zip(names, trainer.parameters, trainable, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_helps_and_is_found_again(tiny_settings, tmp_path):
    config = _config(tiny_settings, tmp_path / "lora")
    folder = lora_finetune(config)
    results = _results(folder)
    assert (results["method"], results["trained_parameters"]) == ("lora", 3 * 4 * LAYER)
    model = find_base(config).load(CPU, torch.float32)
    assert results["base"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["final"]["all_token_val_ppl"] < results["base"]["val_ppl"]
    assert results["final"]["all_token_test_ppl"] < results["final"]["base_test_ppl"]
    assert [e["tokens"] for e in results["epochs"]] == [40 * 32] * 2
    assert [p.name for p in folder.iterdir()] == ["results.json"]
    again = _results(lora_finetune(_config(tiny_settings, tmp_path / "again")))
    assert [e["val_loss"] for e in again["epochs"]] == [e["val_loss"] for e in results["epochs"]]
    before = (folder / "results.json").stat().st_mtime_ns
    assert lora_finetune(config) == folder
    assert (folder / "results.json").stat().st_mtime_ns == before
    for changes, said in (({"lr": 2e-3}, r"lr was 0\.001, is 0\.002"), ({"lora_rank": 8}, "lora_rank was 4, is 8")):
        with pytest.raises(InputError, match=f"holds another run: {said}"):
            lora_finetune(_config(tiny_settings, folder, **changes))
    with pytest.raises(InputError, match="holds another run: its method is lora"):
        full_finetune(config)
    assert (folder / "results.json").stat().st_mtime_ns == before


def test_what_an_interrupted_run_has_left_is_trained_anew(tiny_settings, tmp_path, monkeypatch):
    whole = Finetune.run_epochs

    def interrupted(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Finetune, "run_epochs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora_finetune(_config(tiny_settings, tmp_path / "lora"))
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["best.safetensors"]
    monkeypatch.setattr(Finetune, "run_epochs", whole)
    assert _results(lora_finetune(_config(tiny_settings, tmp_path / "lora")))["best_epoch"] == 2


@pytest.mark.parametrize("lr", [1e-3, 30.0])
def test_the_rise_on_other_text(tiny_settings, tmp_path, monkeypatch, lr):
    """Where training does not help the base is kept, and nothing rises."""
    config = _config(tiny_settings, tmp_path / "lora", lr=lr)
    val = load_sequences(config, find_base(config).tokenizer()).splits["val"]
    monkeypatch.setattr(finetune, "load_general", lambda _settings, _tokenizer: val)
    results = _results(lora_finetune(config))
    general, base_loss = results["final"]["general"], torch.tensor(results["base"]["val_ppl"]).log().item()
    assert general["tokens"] == results["tokens"]["val"]
    assert general["base_loss"] == pytest.approx(base_loss)
    if lr > 1:
        assert (results["best_epoch"], general["rise"]) == (0, 0.0)
    else:
        best = results["epochs"][results["best_epoch"] - 1]["val_loss"]
        assert general["rise"] == best - general["base_loss"] < 0


def test_without_peft_it_says_what_to_install(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="the method lora needs peft: pip install peft"):
        lora_finetune(_config(tiny_settings, tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


def test_what_it_cannot_do(tiny_settings, tmp_path):
    with pytest.raises(InputError, match="base_quantization: 'nf4'; must be none for a LoRA fine-tune"):
        lora_finetune(_config(tiny_settings, tmp_path / "lora", base_quantization="nf4"))
    with pytest.raises(InputError, match="out: None; a LoRA fine-tune needs a folder"):
        lora_finetune(make_settings(tiny_settings))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.jpg").write_text("meow")
    with pytest.raises(InputError, match="exists and is not the folder of a LoRA fine-tune"):
        lora_finetune(_config(tiny_settings, tmp_path / "other"))
