"""Generation: with and without a cache, in batches with padding, sampled, streamed, and from the command line."""

import io
from contextlib import redirect_stdout

import pytest
import torch
from transformers import AutoTokenizer, TextStreamer

from cascade_fast import generate as module
from cascade_fast.modeling import CascadeForCausalLM

PROMPTS = ["The expression ", "If a class", "In", "is called when the instance is"]


@pytest.fixture(params=["warm", "seed", "look"])
def run(request, tiny_runs):
    return tiny_runs[request.param]


@pytest.fixture
def loaded(run):
    model = CascadeForCausalLM.from_pretrained(run).requires_grad_(False)
    model.generation_config.eos_token_id = None  # all the tokens asked for
    tokenizer = AutoTokenizer.from_pretrained(model.base_folder, padding_side="left", pad_token="<eos>")
    return model, tokenizer


def _inputs(tokenizer, prompts):
    return tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)


@pytest.mark.parametrize(
    "sampling",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampled", "beams"],
)
def test_the_cache_changes_no_token(loaded, sampling):
    model, tokenizer = loaded
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with module.recorded_exits(model) as steps:
            settings = {"max_new_tokens": 20, "use_cache": use_cache, "pad_token_id": 0, **sampling}
            ids = model.generate(**_inputs(tokenizer, PROMPTS), output_exits=True, **settings)
        results.append((ids, torch.stack(steps)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].min() < results[0][1].max()  # tokens left at more than one exit


def test_greedy_generation_is_the_forward_pass_s_argmax(loaded):
    model, tokenizer = loaded
    ids = _inputs(tokenizer, PROMPTS[:1])["input_ids"]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    for _ in range(10):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


def test_a_batch_with_padding_says_what_each_says_alone(loaded):
    model, tokenizer = loaded
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**_inputs(tokenizer, PROMPTS), **settings)[:, -12:]
    alone = [model.generate(**_inputs(tokenizer, [prompt]), **settings)[0, -12:] for prompt in PROMPTS]
    assert torch.equal(together, torch.stack(alone))


def test_a_step_computes_one_position(loaded):
    model, tokenizer = loaded
    rows: list[int] = []
    model.base.lm_head.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[0]))
    prompt = _inputs(tokenizer, PROMPTS)
    model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    if model.config.kind == "second-look":  # it needs to know of every token of the prompt whether it is hard
        assert max(rows) <= prompt["input_ids"].numel()
        del rows[: next(n for n, count in enumerate(rows) if n and count == len(PROMPTS))]
    assert max(rows) <= len(PROMPTS)


def test_closed_doors_generate_as_the_base(loaded):
    model, tokenizer = loaded
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    inputs = _inputs(tokenizer, PROMPTS)
    closed = model.generate(**inputs, **settings, thresholds=[-torch.inf, -torch.inf])
    model.base.generation_config.eos_token_id = None
    assert torch.equal(closed, model.base.generate(**inputs, **settings))


def test_streaming_prints_what_is_generated(loaded):
    model, tokenizer = loaded
    inputs, out = _inputs(tokenizer, PROMPTS[:1]), io.StringIO()
    with redirect_stdout(out):
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer))
    assert out.getvalue().strip() == tokenizer.decode(ids[0]).strip()


def _main(capsys, *argv):
    code = module.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(run, capsys):
    code, streamed, _ = _main(capsys, run, "The expression", "--max-new-tokens", "8", "--device", "cpu")
    assert code == 0
    assert streamed.startswith("The expression")
    code, shown, _ = _main(capsys, run, "The expression", "--max-new-tokens", "8", "--show-exits", "--device", "cpu")
    text, legend, exits = shown.rstrip("\n").rsplit("\n", 2)
    assert text.strip() == streamed.strip()
    numbers = [int(n) for n in exits.removeprefix("exit of each token: ").split()]
    assert 1 <= len(numbers) <= 8
    assert f"base {numbers.count(0)}  stage 1 {numbers.count(1)}  stage 2 {numbers.count(2)}" in legend


def test_several_prompts_and_sampling_from_the_command_line(run, capsys):
    asked = [run, *PROMPTS[:2], "--max-new-tokens", "6", "--temperature", "0.9", "--top-p", "0.8", "--device", "cpu"]
    code, first, _ = _main(capsys, *asked)
    assert code == 0
    assert all(prompt in first for prompt in PROMPTS[:2])
    assert _main(capsys, *asked, "--no-cache")[1] == first
    assert _main(capsys, *asked, "--seed", "5")[1] != first


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--temperature", "-1"], "temperature: -1.0; must be at least 0"),
        (["--top-p", "0"], "top_p: 0.0; must be in (0, 1]"),
        (["--max-new-tokens", "0"], "max_new_tokens: 0; must be at least 1"),
        (["--chat"], "chat: the tokenizer has no chat template"),
        (["--device", "abacus"], "device: 'abacus'; must be auto, cpu, cuda or cuda:N"),
        (["--base-path", "no/such"], "base: 'no/such'; no such folder or file"),
    ],
)
def test_a_mistake_is_one_line(tiny_runs, capsys, wrong, said):
    code, _, err = _main(capsys, tiny_runs["warm"], "text", *wrong)
    assert (code, said in err, len(err.strip().splitlines())) == (2, True, 1)


def test_an_empty_prompt_and_a_folder_that_is_no_cascade(tiny_runs, tmp_path, capsys):
    code, _, err = _main(capsys, tiny_runs["warm"], "")
    assert (code, "prompts: empty" in err) == (2, True)
    code, _, err = _main(capsys, tmp_path, "text")
    assert (code, err.startswith("error: ")) == (2, True)
    code, _, err = _main(capsys, "nowhere", "text")
    assert (code, err.startswith("error: RUN: 'nowhere'; no such folder")) == (2, True)
