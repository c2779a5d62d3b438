"""Generation: with and without a cache, in batches with padding, sampled, streamed, and from the command line."""

import io
import re
import shutil
from contextlib import redirect_stdout

import filelock
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, TextStreamer

from cascade_fast import evaluate
from cascade_fast import generate as module
from cascade_fast.model.continuation import continue_texts, recorded_exits
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import read_json, write_json
from cascade_fast.runtime.visible import visible

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
        with recorded_exits(model) as steps:
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
    asked = [run, "The expression", "--max-new-tokens", "8", "--device", "cpu"]
    code, streamed, _ = _main(capsys, *asked)
    assert code == 0
    assert streamed.startswith("The expression")
    code, shown, _ = _main(capsys, *asked, "--show-exits")
    text, legend = shown.rstrip("\n").rsplit("\n", 1)
    assert re.sub(r"\[[12]:([^]]*)]", r"\1", text).strip() == streamed.strip()
    counts = [int(n) for n in re.findall(r"(?:base|stage 1|stage 2): (\d+) \(", legend)]
    assert len(counts) == 3
    assert 1 <= sum(counts) <= 8
    shares = [int(n) for n in re.findall(r"\((\d+)%\)", legend)]
    assert shares == [round(100 * n / sum(counts)) for n in counts]


def test_the_base_alone_is_shown_beside_the_cascade(run, loaded, capsys):
    model, tokenizer = loaded
    asked = [run, *PROMPTS[:2], "--max-new-tokens", "12", "--device", "cpu", "--temperature", "0"]
    code, out, _ = _main(capsys, *asked, "--compare-base")
    assert code == 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    for prompt, part in zip(PROMPTS, out.split("--- base alone\n")[1:], strict=False):
        base, cascade = part.split("--- cascade\n")
        ids = model.base.generate(**_inputs(tokenizer, [prompt]), **settings)[0]
        assert base == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
        ids = model.generate(**_inputs(tokenizer, [prompt]), **settings)[0]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert re.sub(r"\[[12]:([^]]*)]", r"\1", cascade).startswith(expected)
        assert "exits: base: " in cascade
    assert out.count("--- cascade") == 2


def test_tokens_are_drawn_unless_temperature_is_0(run, capsys):
    asked = [run, "The expression", "--max-new-tokens", "16", "--device", "cpu"]
    drawn = _main(capsys, *asked)[1]
    assert _main(capsys, *asked)[1] == drawn
    likeliest = [_main(capsys, *asked, "--temperature", "0", "--seed", seed)[1] for seed in "01"]
    assert likeliest[0] == likeliest[1] != drawn


# --- shown, not obeyed ----------------------------------------------------------------------------------------------

HOSTILE = "a\x1b[31mred\x9b1m \u202eright\u2066 \x07\r\x7f\tend"
SHOWN = "a\\x1b[31mred\\x9b1m \\u202eright\\u2066 \\x07\\r\\x7f\tend"


def test_visible():
    assert visible(HOSTILE) == SHOWN
    assert visible(SHOWN) == SHOWN
    assert visible("tab\tnewline\n, ü, €, 😀, \u200d and עברית") == "tab\tnewline\n, ü, €, 😀, \u200d and עברית"
    assert visible("\udcff") == "\\udcff"
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)):
        assert (visible(chr(code)) == chr(code)) is (chr(code) in "\t\n")


@pytest.mark.parametrize("flags", [[], ["--show-exits"], ["--compare-base"]], ids=["streamed", "exits", "compared"])
@pytest.mark.parametrize("prompts", [[HOSTILE], [HOSTILE, "b"]], ids=["one", "two"])
def test_control_characters_are_made_visible(tiny_runs, capsys, flags, prompts):
    code, out, _ = _main(capsys, tiny_runs["warm"], *prompts, *flags, "--max-new-tokens", "3", "--device", "cpu")
    assert code == 0
    assert (SHOWN.partition("\t")[0] if flags else SHOWN) in out  # rich makes a tab spaces
    assert visible(out) == out


@pytest.mark.parametrize("prompts", [[HOSTILE], [HOSTILE, "b"]], ids=["one", "two"])
def test_raw_text_into_a_pipe(tiny_runs, capsys, prompts):
    code, out, _ = _main(capsys, tiny_runs["warm"], *prompts, "--raw", "--max-new-tokens", "3", "--device", "cpu")
    assert code == 0
    assert HOSTILE in out


def test_what_the_model_says_is_made_visible_too(loaded, capsys, monkeypatch):
    """Whatever the weights, it says ESC: token 28 of the byte tokenizer."""
    model, tokenizer = loaded
    (escape,) = tokenizer("\x1b")["input_ids"]

    def says_escape(_model, _args, output):
        output.logits.fill_(0)
        output.logits[..., escape] = 1e4

    model.register_forward_hook(says_escape)
    monkeypatch.setattr("cascade_fast.model.loading.load_model", lambda *_, **__: (model, tokenizer))
    for flags in ([], ["--show-exits"], ["--compare-base"]):
        _, out, _ = _main(capsys, "run", "x", *flags, "--max-new-tokens", "5")
        assert "\x1b" not in out
        assert out.count("\\x1b") == (10 if "--compare-base" in flags else 5)
    assert _main(capsys, "run", "x", "--raw", "--max-new-tokens", "5")[1].count("\x1b") == 5


def test_a_character_of_several_tokens_is_whole(loaded):
    model, tokenizer = loaded
    said = iter(tokenizer("ü€😀b")["input_ids"])

    def says(_model, _args, output):
        output.logits.fill_(0)
        output.logits[..., next(said)] = 1e4

    model.register_forward_hook(says)
    (found,) = continue_texts(model, tokenizer, ["x"], max_new_tokens=10)
    assert found.texts == ["", "ü", "", "", "€", "", "", "", "😀", "b"]


def test_a_terminal_has_colours_and_a_dumb_one_marks(tiny_runs, monkeypatch, capsys):
    asked = [tiny_runs["warm"], "The expression", "--max-new-tokens", "16", "--device", "cpu", "--show-exits"]
    for colours in (True, False):
        terminal = Console(
            force_terminal=True, color_system="standard" if colours else None, highlight=False, soft_wrap=True
        )
        monkeypatch.setattr("cascade_fast.runtime.console.console", terminal)
        out = _main(capsys, *asked)[1]
        assert ("\x1b[33m" in out) is colours
        assert ("[1:" in out) is not colours


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
        (["--raw", "--show-exits"], "raw: True; is for the text alone"),
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


def test_raw_text_is_not_for_a_terminal(tiny_runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, out, err = _main(capsys, tiny_runs["warm"], "text", "--raw")
    assert (code, out) == (2, "")
    assert err == "error: raw: True; this terminal would obey the text: pipe it on\n"


def test_a_prompt_that_is_not_unicode(tiny_runs, capsys):
    code, _, err = _main(capsys, tiny_runs["warm"], "\udcff", "--device", "cpu")
    assert (code, err) == (2, "error: prompts: '\\udcff'; must be Unicode text\n")


@pytest.mark.parametrize("command", [module, evaluate], ids=["generate", "evaluate"])
def test_a_run_under_way_is_named_as_that(tiny_runs, tmp_path, capsys, command):
    run = shutil.copytree(tiny_runs["warm"], tmp_path / "run")
    config = read_json(run / "config.json")
    del config["model_type"]  # a run has it once it is finished
    write_json(run / "config.json", config)
    asked = [str(run), "text"] if command is module else [str(run)]
    with filelock.FileLock(run / "run.lock"):
        assert command.main(asked) == 2
    assert capsys.readouterr().err == f"error: RUN: '{run}'; is still training: no results yet\n"
    assert command.main(asked) == 2
    assert "was interrupted: no results yet" in capsys.readouterr().err
    assert command.main([str(run / "config.json"), *asked[1:]]) == 2
    assert capsys.readouterr().err == f"error: RUN: '{run / 'config.json'}'; is a file\n"
