"""``--sample-prompt``: what is written on, where it is told, and that training does not change by it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.model.continuation import continue_texts
from cascade_fast.model.loading import load_model
from cascade_fast.settings import make_settings
from cascade_fast.training import prompt_samples, trainer

NEW_TOKENS = 8
PROMPTS = ["The import statement", "A class definition is"]


@pytest.fixture
def settings(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_samples, "NEW_TOKENS", NEW_TOKENS)
    # Text that is so easily learnt that the cascade soon writes something else than the base.
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n}" + "xyz" * 70}) + "\n" for n in range(120)))
    changes = {"accept": "always", "store_dtype": "float32", "lr": 1e-2, "hard_ratio": 1.0}
    return {**tiny_settings, "dataset": str(data), **changes}


def _run(settings, folder, **changes):
    return run_cascade(make_settings({**settings, "out": str(folder), **changes}))


def _samples(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "sample"]


def _base_writes(base, prompt):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["append", "second-look"])
def test_samples_are_the_base_s_and_the_cascade_s_and_training_is_the_same(settings, tmp_path, capsys, kind):
    settings = {**settings, "stage_kind": kind}
    _run(settings, tmp_path / "plain")
    capsys.readouterr()
    torch.manual_seed(5)
    folder = _run(settings, tmp_path / "run", sample_prompt=PROMPTS).path
    said = capsys.readouterr().out
    for number in (1, 2):
        weights = [load_file(tmp_path / name / f"stages/{number}/model.safetensors") for name in ("plain", "run")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    samples = _samples(folder)
    assert [(s["stage"], s["number"], s["prompt"]) for s in samples] == [
        (stage, number, PROMPTS[number - 1]) for stage in (1, 2) for number in (1, 2)
    ]
    assert [s["base"] for s in samples[:2]] == [_base_writes(settings["base"], prompt) for prompt in PROMPTS]
    model, tokenizer = load_model(str(folder), device="cpu", dtype="auto", base_path=None)
    second = model.config.stages[1]
    for threshold, found in ((-math.inf, samples[:2]), (second["threshold"], samples[2:])):
        second["threshold"] = threshold  # closed, it is the cascade with stage 1
        texts = [c.text for c in continue_texts(model, tokenizer, PROMPTS, max_new_tokens=NEW_TOKENS)]
        assert [s["cascade"] for s in found] == texts
    assert any(s["base"] != s["cascade"] for s in samples[:2])
    order = [said.index(t) for t in ("the base writes on:", "stage 1/2:", "with stage 1 writes on:", "stage 2/2:")]
    assert order == sorted(order)
    assert json.dumps(samples[0]["cascade"], ensure_ascii=False) in said


def test_random_numbers_stay_where_they_are(settings, tiny_base, tmp_path, monkeypatch):
    real, states = prompt_samples.continue_prompts, []

    def watched(*args, **kwargs):
        states.append(torch.get_rng_state())
        found = real(*args, **kwargs)
        states.append(torch.get_rng_state())
        return found

    monkeypatch.setattr(prompt_samples, "continue_prompts", watched)
    _run(settings, tmp_path / "run", sample_prompt=PROMPTS, num_stages=1)
    assert len(states) == 4
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])


def test_a_resumed_run_keeps_its_samples(settings, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    whole = _samples(_run(settings, tmp_path / "whole", sample_prompt=PROMPTS).path)
    real = trainer.Trainer.train_step

    def stop_in_stage_two(self, picked):
        if self.number == 2:
            raise KeyboardInterrupt
        return real(self, picked)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", stop_in_stage_two)
        with pytest.raises(KeyboardInterrupt):
            _run(settings, folder, sample_prompt=PROMPTS)
    _run(settings, folder, sample_prompt=PROMPTS, resume="auto")
    told = [{name: value for name, value in s.items() if name != "time"} for s in _samples(folder)]
    assert told == [{name: value for name, value in s.items() if name != "time"} for s in whole]


def test_a_stage_that_is_not_kept_writes_nothing(settings, tmp_path):
    folder = _run({**settings, "accept": "better"}, tmp_path / "run", sample_prompt=PROMPTS, min_improvement=0.99).path
    assert _samples(folder) == []


def test_what_goes_wrong_is_a_line(settings, tmp_path, monkeypatch, capsys):
    def no_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(prompt_samples, "continue_prompts", no_memory)
    folder = _run(settings, tmp_path / "run", sample_prompt=PROMPTS, num_stages=1).path
    assert "note: sample_prompt: nothing was written: no memory" in capsys.readouterr().out
    assert (folder / "stages/1/model.safetensors").exists()
    assert _samples(folder) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"criterion": "random"}, "sample_prompt, criterion: a cascade by 'random' cannot be run as a model"),
        ({"sample_prompt": ["fine", ""]}, "sample_prompt: ''; 0 tokens, must be from 1 to 56"),
        ({"sample_prompt": ["x" * 57]}, "57 tokens, must be from 1 to 56"),
    ],
)
def test_a_prompt_that_cannot_be_written_on_from(settings, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        _run(settings, tmp_path / "run", **{"sample_prompt": PROMPTS, **changes})
    assert not (tmp_path / "run").exists()


def test_the_preset_seed_has_samples(tiny_settings, tmp_path):
    settings = {k: v for k, v in tiny_settings.items() if k not in ("lr", "warmup_steps", "batch_tokens")}
    folder = _run(settings, tmp_path / "run", preset="seed", num_stages=1, sample_prompt=PROMPTS[:1]).path
    assert len(_samples(folder)) == 1
