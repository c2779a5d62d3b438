"""The report: the same numbers everywhere, any text as it is, and a page that works in a browser."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import filelock
import made_records
import pytest
import torch
from conftest import byte_tokenizer

from cascade_fast import report as command
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.texts import token_texts
from cascade_fast.reporting import report
from cascade_fast.reporting.heat_map import MAX_TOKENS, heat_map, read_heat_map, write_heat_map
from cascade_fast.reporting.html import render_page
from cascade_fast.reporting.plots import write_plots
from cascade_fast.reporting.samples import make_samples
from cascade_fast.runtime.files import read_json, write_json
from cascade_fast.runtime.visible import visible
from cascade_fast.stages.exits import ExitEvaluation

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip


@pytest.fixture
def run(tiny_runs, tmp_path) -> Path:
    return shutil.copytree(tiny_runs["warm"], tmp_path / "run")


def _main(capsys, *argv):
    code = command.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class _Page(HTMLParser):
    """Text of the page outside scripts and styles, and its tokens."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tokens, self.open, self.links = "", [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        if tag == "span":
            self.token = {**attributes, "text": ""}
            if "t" in (attributes.get("class") or "").split():
                self.tokens.append(self.token)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if self.open[-1] == "span":
                self.token["text"] += data


# --- the page, without a browser -----------------------------------------------------------------------------------


def test_the_report_is_made_again_from_the_folder_alone(run, capsys):
    before = {name: (run / name).read_bytes() for name in ("report.md", "report.html", "perplexity.png")}
    for name in before:
        (run / name).unlink()
    code, out, err = _main(capsys, run)
    assert (code, err) == (0, "")
    assert str(run / "report.html") in out
    assert {name: (run / name).read_bytes() for name in before} == before


def test_the_page_has_the_numbers_of_the_results(run):
    page = _Page((run / "report.html").read_text())
    assert page.open == []
    results = json.loads((run / "results.json").read_text())
    final = results["final"]
    for value in (results["base"]["val_ppl"], final["all_token_val_ppl"], final["all_token_test_ppl"]):
        assert f"{value:.4f}" in page.text
    in_markdown = re.findall(r"\d+\.\d{4}", (run / "report.md").read_text())
    assert in_markdown
    assert set(in_markdown) <= set(re.findall(r"\d+\.\d{4}", page.text))
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert sum(link.startswith("data:") for link in page.links) == 1


def test_the_heat_map_is_the_run_s(run):
    content = json.loads((run / "heat_map.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert content["thresholds"] == [stage["exit_threshold"] for stage in results["stages"]]
    exits = [exit_ for block in content["blocks"] for exit_ in block["exits"]]
    assert set(exits) == {0, 1, 2}
    for block in content["blocks"]:
        assert len(block["texts"]) == len(block["exits"]) + 1 == 33
        for exit_, scores, base, loss in zip(
            block["exits"], block["scores"], block["base_loss"], block["loss"], strict=True
        ):
            assert len(scores) == min(exit_ + 1, 2)
            assert all(score <= content["thresholds"][n] + 1e-4 for n, score in enumerate(scores[:exit_]))
            assert exit_ > 0 or base == loss
    page = _Page((run / "report.html").read_text())
    assert [int(token["data-x"]) for token in page.tokens] == exits
    losses = [loss for block in content["blocks"] for loss in block["loss"]]
    assert [float(token["data-l"]) for token in page.tokens] == losses
    assert len(content["blocks"]) == 8
    assert content["blocks_in_all"] == 12


def _map(ids, tokenizer=None, **changes):
    n = (ids.shape[1] - 1) * ids.shape[0]
    sequences = Sequences.from_blocks(ids)
    evaluation = _evaluated(sequences, torch.ones(n), torch.arange(n) % 2)
    how = {"criterion": "cosine", "thresholds": [0.5]}
    return {**heat_map(tokenizer or byte_tokenizer(), sequences, evaluation, **how), **changes}


def _evaluated(sequences, loss_N, exit_N):
    """``loss_N`` and ``exit_N`` of the labelled tokens; they score 0, and the base's loss is 2."""
    of_all = [(number, place) for number, n in enumerate(sequences.length_B.tolist()) for place in range(n)]
    sequence_N, position_N = torch.tensor(of_all)[sequences.labelled_N].T.contiguous()
    n = len(loss_N)
    return ExitEvaluation(loss_N, exit_N, torch.zeros(n, 1), torch.full((n,), 2.0), sequence_N, position_N)


def test_any_text_is_shown_as_it_is():
    text = "a </script><b>&amp; `x`\n\tü€😀 \x00end"
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    html = render_page("# T\n\n<i>not markup</i>\n\n## Token heat map\n\nhere", {}, _map(ids), score_name="cosine")
    page = _Page(html)
    assert page.open == []
    shown = text[0] + "".join(token["text"] for token in page.tokens)
    assert shown == visible(text)
    assert "<i>not markup</i>" in page.text
    assert html.count("<script>") == 1


def test_tokens_without_a_label_are_shown_as_context_without_numbers(tmp_path):
    text, (first, second) = "Hi you\nBye", (4, 6)  # the ends of what is only read, and of what is learnt
    ids = byte_tokenizer()(text)["input_ids"]
    labelled = [first <= place < second for place in range(1, len(text))]
    sequences = Sequences.from_lists([ids, ids[:3]], [labelled, [False, True]])
    n = sequences.labels
    evaluation = _evaluated(sequences, torch.arange(1.0, n + 1), torch.arange(n) % 2)
    content = heat_map(byte_tokenizer(), sequences, evaluation, criterion="cosine", thresholds=[0.5])
    write_heat_map(tmp_path, content)
    content = read_heat_map(tmp_path)
    html = render_page("# T\n\n## Token heat map\n\nhere", {}, content, score_name="cosine")
    page = _Page(html)
    assert [token["text"] for token in page.tokens] == [*text[first:second], text[2]]
    assert [int(token["data-x"]) for token in page.tokens] == [0, 1, 0]
    assert [float(token["data-l"]) for token in page.tokens] == [1, 2, 3]
    # All of the text in its place, and nothing between.
    (shown,) = re.findall(r"<b>sequence 1</b>(.*?)</div>", html, re.DOTALL)
    assert re.sub("<[^>]*>", "", shown) == text
    context = re.findall(r'<span class="context([^"]*)">([^<]*)</span>', html)
    assert [of for _, of in context] == [*text[1:first], *text[second:], text[1]]
    assert [classes for classes, of in context if "\n" in of] == [" nl"]
    assert html.count('<li class="context">context: read, not learnt</li>') == 3  # with each of the colours
    assert "2 of 2 validation sequences, 3 tokens and 8 of context, which are only read." in " ".join(page.text.split())
    assert "base 66.7%" in html
    everything = render_page("# T\n\n## Token heat map\n\nhere", {}, _map(torch.tensor([ids])), score_name="cosine")
    assert "context" not in _Page(everything).text


def test_a_heat_map_that_is_cut_before_its_first_label_is_shown(tmp_path):
    """So may be one of long chats: its first sequence ends at ``MAX_TOKENS``."""
    block = {"texts": ["a", "b"], "exits": [None], "scores": [None], "base_loss": [None], "loss": [None]}
    content = {"thresholds": [0.5], "blocks_in_all": 1, "blocks": [block]}
    page = _Page(render_page("# T\n\n## Token heat map\n\nhere", {}, content, score_name="cosine"))
    assert page.tokens == []
    assert page.open == []
    assert "0 tokens and 1 of context" in " ".join(page.text.split())


def test_a_character_of_several_tokens_is_at_the_last_of_them():
    ids = byte_tokenizer()("aü€😀")["input_ids"]
    assert token_texts(byte_tokenizer(), ids) == ["a", "", "ü", "", "", "€", "", "", "", "😀"]
    broken = token_texts(byte_tokenizer(), [*ids[:2], *ids[:1]])  # the first byte of ü, then a
    assert "".join(broken).replace("\ufffd", "") == "aa"


def test_losses_that_are_not_finite_are_no_reason_to_lose_a_report(tmp_path):
    sequences = Sequences.from_blocks(torch.ones(1, 5))
    evaluation = _evaluated(sequences, torch.tensor([1.0, torch.inf, torch.nan, 2.0]), torch.zeros(4).long())
    write_heat_map(tmp_path, heat_map(byte_tokenizer(), sequences, evaluation, criterion="cosine", thresholds=[0.5]))
    assert json.loads((tmp_path / "heat_map.json").read_text())["blocks"][0]["loss"] == [1.0, 1e4, 1e4, 2.0]


def test_the_heat_map_has_an_end():
    content = _map(torch.ones(3, 2 * MAX_TOKENS, dtype=torch.int32))
    assert [len(block["exits"]) for block in content["blocks"]] == [MAX_TOKENS]
    assert len(_map(torch.ones(50, 17, dtype=torch.int32))["blocks"]) == 8


def test_a_run_without_a_heat_map_has_a_report(run, capsys):
    (run / "heat_map.json").unlink()
    assert _main(capsys, run)[0] == 0
    page = _Page((run / "report.html").read_text())
    assert page.tokens == []
    assert "has no heat_map.json" in page.text


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "results.json").unlink(), "was interrupted: no results yet"),
        (lambda run: (run / "config.json").unlink(), "is not the folder of a run: it has no config.json"),
        (lambda run: (run / "results.json").write_text("{"), "is damaged: "),
        (lambda run: (run / "results.json").write_text("{}"), "is damaged: has no base"),
        (lambda run: (run / "heat_map.json").write_text('{"format": 7}'), "has format 7; this version reads 1"),
        (lambda run: (run / "heat_map.json").write_text('{"format": 1, "blocks": 3}'), "has no thresholds"),
        (lambda run: (run / "samples.json").write_text('{"format": 1}'), "is damaged: has no samples"),
        (
            lambda run: (run / "samples.json").write_text('{"format": 1, "samples": [{}]}'),
            "is damaged: no report can be made (KeyError",
        ),
        (lambda run: (run / "samples.json").write_text("{}"), "has format None; this version reads 1"),
        (lambda run: (run / "config.json").write_text("[]"), "is damaged: holds list, not an object"),
        (lambda run: (run / "config.json").write_text("{}"), "its config.json is not that of a run"),
        (lambda run: (run / "config.json").write_text('{"model_type": "cascade"}'), "holds a saved model"),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(run, capsys, spoil, said):
    spoil(run)
    before = (run / "report.html").read_bytes() if run.exists() else b""
    code, _, err = _main(capsys, run)
    assert (code, said in err, len(err.strip().splitlines())) == (2, True, 1)
    assert not run.exists() or (run / "report.html").read_bytes() == before


# --- what is shown, and where --------------------------------------------------------------------------------------


def _headings(markdown):
    return re.findall(r"^## (.*)$", markdown, re.MULTILINE)


def test_what_came_of_the_run_is_first_and_what_it_was_made_with_last(run):
    assert make_samples(run, "cpu")
    report.write_report(run)
    markdown, html = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert _headings(markdown) == [
        "Sample text", "Token heat map", "What to try next", "Base model", "Stage 1", "Stage 2", "Analysis",
        "Settings", "Machine and versions",
    ]  # fmt: skip
    assert markdown.index("all-token perplexity") < markdown.index("## Sample text")
    places = [re.search(f"<h2[^>]*>{title}</h2>", html).start() for title in _headings(markdown)]
    assert places == sorted(places)
    assert html.index('<section id="heat-map"') < places[2]
    folded = re.findall(r"<details>\s*<summary><h2>(.*?)</h2></summary>(.*?)</details>", html, re.DOTALL)
    assert [title for title, _ in folded] == ["Settings", "Machine and versions"]
    assert "<td>hard_ratio</td>" in folded[0][1]


def test_sample_text_is_shown_and_not_obeyed(run):
    text = "a | b\n<script>alert(1)</script> `x` [y](z) *e* \x1b[31m \u202e \\|"
    sample = {"prompt": text, "base": text, "cascade": text}
    (run / "samples.json").write_text(json.dumps({"format": 1, "new_tokens": 40, "samples": [sample]}))
    report.write_report(run)
    page = _Page((run / "report.html").read_text())
    assert page.open == []
    shown = "a | b ↵ <script>alert(1)</script> `x` [y](z) *e* \\x1b[31m \\u202e \\|"
    assert page.text.count(shown) == 3
    assert not re.search("[\x1b\u202e]", (run / "report.md").read_text())


def _stage(number, epochs, **changes):
    made = {"epochs": [made_records.epoch(epoch=n + 1) for n in range(epochs)], **changes}
    return made_records.stage(stage=number, **made)


@pytest.mark.parametrize(
    ("stages", "plots"),
    [
        ([], []),
        ([_stage(1, 2)], []),
        ([_stage(1, 2), _stage(2, 2)], ["perplexity.png"]),
        ([_stage(1, 2), _stage(2, 2, all_token_val_ppl=None)], []),
        ([_stage(1, 3)], ["loss.png"]),
        ([_stage(n, 1) for n in (1, 2, 3)], ["threshold.png", "perplexity.png"]),
    ],
)
def test_a_plot_has_more_to_show_than_two_points(tmp_path, stages, plots):
    assert write_plots(tmp_path, made_records.results(stages, len(stages), {}), score_name="cosine") == plots
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(plots)


def _results(stages, kept, **settings):
    default = {"lr": 6e-4, "hard_ratio": 0.6, "train_blocks": 320, "epochs": 2, "stage_kind": "append"}
    settings = {**default, "exit_threshold": "trained", **settings}
    return made_records.results(stages, kept, settings)


def _falling(*val_losses):
    return made_records.stage(epochs=[made_records.epoch(val_loss=loss) for loss in val_losses])


def test_advice_is_of_flags_that_exist():
    from cascade_fast.train import build_parser

    rejected = _stage(1, 1, accepted=False)
    (sentence,) = report.advice(_results([rejected], 0))
    for flag in ("--lr 0.0002", "--hard-ratio 0.9", "--train-blocks 1280", "--preset second-look"):
        assert flag in sentence
    (sentence,) = report.advice(_results([rejected], 0, hard_ratio=0.95, stage_kind="second-look"))
    assert "hard ratio" not in sentence
    assert "second-look" not in sentence
    overfitted = report.advice(_results([_falling(1.0, 2.0)], 1))
    assert "Stage 1 overfits" in overfitted[0]
    still_falling = report.advice(_results([_falling(2.0, 1.0)], 1))
    assert "--epochs 4" in still_falling[0]
    assert "--exit-threshold validation" in report.advice(_results([_stage(1, 1)], 1, stage_kind="second-look"))[0]
    known = {option for action in build_parser()._actions for option in action.option_strings}
    for said in (sentence, *overfitted, *still_falling):
        assert set(re.findall(r"--[a-z-]+", said)) <= known


def test_a_run_under_way_is_named_as_that(run, capsys):
    (run / "results.json").unlink()
    config = read_json(run / "config.json")
    del config["model_type"]  # a run has it once it is finished
    write_json(run / "config.json", config)
    with filelock.FileLock(run / "run.lock"):
        code, _, err = _main(capsys, run)
    assert (code, err) == (2, f"error: RUN: '{run}'; is still training: no results yet\n")
    code, _, err = _main(capsys, run)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"was interrupted: no results yet. The command that began it goes on with --out {run} --resume auto" in err
    for path in run.iterdir():
        if path.is_file() and path.name != "run.lock":
            path.unlink()
    shutil.rmtree(run / "stages")
    assert "was interrupted" in _main(capsys, run)[2]  # killed before it had written anything
    (run / "run.lock").unlink()
    assert "is not the folder of a run" in _main(capsys, run)[2]


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium as the system has it. With CASCADE_FAST_REQUIRE_BROWSER=1 it must be there."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        if os.environ.get("CASCADE_FAST_REQUIRE_BROWSER") == "1":
            pytest.fail("no Chromium, but CASCADE_FAST_REQUIRE_BROWSER=1")
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, run):
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "report.html").as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_a_browser_shows_the_numbers_and_the_tokens(opened, run):
    results = json.loads((run / "results.json").read_text())
    content = json.loads((run / "heat_map.json").read_text())
    text = opened.inner_text("main")
    for value in (results["base"]["val_ppl"], results["final"]["all_token_val_ppl"]):
        assert f"{value:.4f}" in text
    assert opened.locator(".t").count() == sum(len(block["exits"]) for block in content["blocks"])
    images = opened.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(images) == 1
    assert min(images) > 100
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390  # a phone need not scroll sideways
    setting = opened.get_by_text("hard_ratio", exact=True)
    assert setting.is_hidden()
    opened.get_by_text("Settings", exact=True).click()
    assert setting.is_visible()


def test_pointing_at_a_token_shows_its_card(opened, run):
    block = json.loads((run / "heat_map.json").read_text())["blocks"][1]
    at = block["exits"].index(2, 1)
    token = opened.locator('[data-block="2"] .t').nth(at)
    assert opened.locator("#card").is_hidden()
    token.hover()
    card = dict(
        zip(opened.locator("#card dt").all_inner_texts(), opened.locator("#card dd").all_inner_texts(), strict=True)
    )
    assert card["exit"] == "stage 2"
    assert card["loss of the base"] == f"{block['base_loss'][at]:.4f}"
    assert card["loss at its exit"] == f"{block['loss'][at]:.4f}"
    assert card["change"] == f"{block['loss'][at] - block['base_loss'][at]:+.4f}"
    assert card["score before stage 2"].startswith(f"{block['scores'][at][1]:.4f} ≤")
    opened.mouse.move(0, 0)
    assert opened.locator("#card").is_hidden()
    token.focus()
    opened.keyboard.press("ArrowLeft")
    assert (
        opened.locator("#card dd").all_inner_texts()[-1] == f"{block['loss'][at - 1] - block['base_loss'][at - 1]:+.4f}"
    )
    opened.keyboard.press("Escape")
    assert opened.locator("#card").is_hidden()


def test_the_colours_can_be_of_exits_scores_and_changes(opened):
    def colours():
        return opened.evaluate("[...document.querySelectorAll('.t')].map(t => getComputedStyle(t).backgroundColor)")

    seen = [colours()]
    for by in ("score", "change"):
        opened.locator(f"input[value={by}]").check()
        assert opened.locator(f".legend.{by}").is_visible()
        assert opened.locator(".legend.exit").is_hidden()
        seen.append(colours())
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert all(len(set(some)) > 2 for some in seen)
