"""Sample text of a finished run: from which prompts, and what base and cascade say."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.reporting import report
from cascade_fast.reporting.samples import make_samples, sample_prompts
from cascade_fast.runtime.files import read_json, write_json


def test_the_prompt_of_a_sample_is_the_question():
    texts, plain = list("abcdefgh"), list("ijklmnop")
    asked = {"texts": texts, "exits": [None, None, None, 0, 1, None, 0]}
    middle = {"texts": plain, "exits": [0, 1, 0, None, None, 0, 0]}
    assert sample_prompts({"blocks": [middle, asked]}) == ["abcd"]  # d predicts e, the first token of the answer
    assert sample_prompts({"blocks": [middle, middle]}) == ["ijkl", "ijkl"]


@pytest.mark.parametrize("kind", ["warm", "seed", "look"])
def test_samples_are_what_base_and_cascade_say(tiny_runs, tmp_path, kind):
    run = shutil.copytree(tiny_runs[kind], tmp_path / "run")
    before = (run / "results.json").read_bytes()
    assert make_samples(run, "cpu")
    assert (run / "results.json").read_bytes() == before
    written = (run / "samples.json").read_bytes()
    assert not make_samples(run, "cpu")  # once is enough
    samples = json.loads(written)["samples"]
    assert len(samples) == 3
    content = json.loads((run / "heat_map.json").read_text())
    assert [sample["prompt"] for sample in samples] == sample_prompts(content)
    assert "".join(content["blocks"][0]["texts"]).startswith(samples[0]["prompt"])
    model = CascadeForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(model.base_folder)
    for sample in samples:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        mask, settings = torch.ones_like(ids), {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
        for name, of in (("base", model.base), ("cascade", model)):
            new = of.generate(ids, attention_mask=mask, **settings)[0, ids.shape[1] :]
            assert sample[name] == tokenizer.decode(new, skip_special_tokens=True)
    report.write_report(run)
    markdown = (run / "report.md").read_text()
    assert (
        len(re.findall(r"^\| prompt \|.*\n\| --- \| --- \|\n\| base \|.*\n\| cascade \|", markdown, re.MULTILINE)) == 3
    )


def test_a_run_with_nothing_to_sample_has_no_samples(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs["warm"], tmp_path / "run")
    results = read_json(run / "results.json")
    for changed in (
        {**results, "final": {**results["final"], "stages_kept": 0}},
        {**results, "settings": {**results["settings"], "criterion": "random"}},
    ):
        write_json(run / "results.json", changed)
        assert not make_samples(run, "cpu")
    assert not (run / "samples.json").exists()
