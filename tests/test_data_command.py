"""``python -m cascade_fast.data``: what it counts and shows, what it needs, and what it refuses."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from conftest import byte_tokenizer
from rich.console import Console

from cascade_fast import data, train
from cascade_fast.base import model
from cascade_fast.base.sequences import TokenText
from cascade_fast.base.splits import split_texts
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.reporting import data_view
from cascade_fast.settings import make_settings

TOKENIZER = byte_tokenizer()


@pytest.fixture
def flags(tiny_base, tiny_data):
    return ["--base", str(tiny_base), "--dataset", str(tiny_data), "--seq-len", "32"]


@pytest.fixture
def tokenizer_folder(tiny_base, tmp_path):
    """The tokenizer's files alone: no configuration, no weights."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tiny_base.glob("token*.json"):
        shutil.copy(file, folder)
    return folder


def _main(capsys, *argv):
    code = data.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- counts ----------------------------------------------------------------------------------------------------------


def test_the_counts_are_those_of_the_sequences_a_run_trains_on(capsys, flags, tiny_data, tmp_path):
    file = tmp_path / "counts.json"
    code, out, err = _main(capsys, *flags, "--train-tokens", "6500", "--val-tokens", "640", "--json", str(file))
    assert (code, err) == (0, "")
    asked = {"dataset": str(tiny_data), "seq_len": 32, "train_tokens": 6500, "val_tokens": 640}
    found = load_sequences(make_settings(asked), TOKENIZER)
    record = json.loads(file.read_text())
    assert record == {
        "texts": found.usage.texts,
        "tokens": found.usage.tokens,
        "used_share": found.usage.used_share,
        "labelled_share": 1.0,
        "sequences": {split: len(of) for split, of in found.splits.items()},
        "left_out": found.usage.left_out,
    }
    assert record["tokens"] >= 200 * record["texts"]
    assert record["used_share"] == pytest.approx(1 - sum(record["left_out"].values()) / record["tokens"])
    assert record["left_out"]["rest of a text in which a split is full"] > 0
    lines = out.splitlines()
    assert lines[0] == f"data {tiny_data}"
    assert lines[1].startswith(
        f"  {record['texts']} texts read (the splits were full then), {record['tokens']:,} tokens, 9"
    )
    row = next(line.split() for line in lines if line.startswith("train "))
    assert row == ["train", str(record["sequences"]["train"]), *2 * [f"{found.splits['train'].tokens:,}"]]


def test_notes_and_warnings_are_said(capsys, flags, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 300)
    code, out, _ = _main(capsys, *flags, "--dataset", str(tmp_path / "short.txt"))
    assert code == 0
    assert "the splits are contiguous parts" in out
    assert "the text has fewer tokens than the defaults" in out
    rows = "".join(json.dumps({"text": "y" * n}) + "\n" for n in (33, 33, 33, *[20] * 30))
    (tmp_path / "rows.jsonl").write_text(rows)
    sizes = ("--train-blocks", "1", "--val-blocks", "1", "--test-blocks", "1", "--shuffle", "off")
    code, out, _ = _main(capsys, *flags, *sizes, "--dataset", str(tmp_path / "rows.jsonl"))
    assert (code, "  warning: " in out) == (0, False)
    (tmp_path / "rows.jsonl").write_text("".join(reversed(rows.splitlines(keepends=True))))
    code, out, _ = _main(capsys, *flags, *sizes, "--dataset", str(tmp_path / "rows.jsonl"))
    assert (code, "  warning: only 14.2% of the tokens read are used" in out) == (0, True)
    assert "85.8% sequence shorter than a block" in out


@pytest.mark.parametrize(
    ("lengths", "seq_len", "rows"),
    [
        ([128] * 5, 128, ["128 5 100.0%"]),
        ([7], 128, ["7 1 100.0%"]),
        ([1, 2, 2, 4, 4, 4, 4, 5], 5, ["1 1 12.5%", "2 2 25.0%", "3 0 0.0%", "4 4 50.0%", "5 1 12.5%"]),
        ([10, 26, 32, 32], 32, ["10-12 1 25.0%", "13-15 0 0.0%", "16-18 0 0.0%", "19-21 0 0.0%", "22-24 0 0.0%",
                                "25-26 1 25.0%", "32 2 50.0%"]),
    ],
)  # fmt: skip
def test_lengths_are_counted_in_ranges(lengths, seq_len, rows):
    lines = data_view.length_lines(lengths, seq_len)
    assert [" ".join(line.split()[:3]) for line in lines] == rows
    bars = [line.count("#") for line in lines]
    assert max(bars) == data_view.BAR
    assert [bar > 0 for bar in bars] == [row.split()[1] != "0" for row in rows]


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_first_sequences_come_in_the_data_s_order(capsys, flags, tmp_path):
    rows = [f"text {i}" + "." * (i % 7) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    asked = [*flags, "--dataset", str(tmp_path / "rows.jsonl"), "--shuffle", "off"]
    code, out, _ = _main(capsys, *asked, "--show", "2")
    assert code == 0
    assert out.splitlines()[-4:] == [
        "sequence 1: 5 tokens, 5 of them learnt",
        "  learnt | text 0",
        "sequence 2: 6 tokens, 6 of them learnt",
        "  learnt | text 1.",
    ]
    assert _main(capsys, *asked)[1].count("\nsequence ") == 3
    code, out, _ = _main(capsys, *asked, "--show", "0")
    assert (code, "sequence 1" in out) == (0, False)
    assert _main(capsys, *asked, "--show", "1000")[1].count("\nsequence ") > 20


def _chat():
    """Splits of twelve texts in which only the answer and the end are learnt."""
    read, learnt = "Q: why?\nA: ", "so\x1b\n"
    ids = TOKENIZER(read + learnt)["input_ids"] + [TOKENIZER.eos_token_id]
    text = TokenText(ids, [n >= len(read) for n in range(len(ids))])
    return split_texts([text] * 12, make_settings({"train_tokens": 20, "val_tokens": 15, "test_tokens": 15}))


def test_context_is_recognised_without_colours(capsys):
    data_view.say_data(_chat(), TOKENIZER, 128, 1)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[-5:] == [
        "sequence 1: 15 tokens, 5 of them learnt",
        "  read   | Q: why?\\n",
        "         | A: ",
        "  learnt | so\\x1b\\n",
        "         | <eos>",
    ]
    assert "splits: 33.3% of their tokens are learnt and measured" in out
    assert data_view.data_record(_chat())["labelled_share"] == pytest.approx(1 / 3)


def test_context_is_dimmed_and_special_tokens_have_a_colour(monkeypatch):
    terminal = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", highlight=False, no_color=False
    )
    monkeypatch.setattr(data_view, "console", terminal)
    data_view.say_data(_chat(), TOKENIZER, 128, 1)
    shown = terminal.file.getvalue()
    assert "\x1b[2mQ\x1b[0m" in shown
    assert "| so\\x1b\\n\n" in shown
    assert "\x1b[36m<eos>\x1b[0m" in shown


# --- what it needs ---------------------------------------------------------------------------------------------------


def test_a_folder_with_a_tokenizer_is_enough(capsys, flags, tokenizer_folder):
    expected = _main(capsys, *flags)
    assert expected[0] == 0
    assert _main(capsys, *flags, "--base", str(tokenizer_folder)) == expected
    (tokenizer_folder / "tokenizer.json").unlink()
    code, _, err = _main(capsys, *flags, "--base", str(tokenizer_folder))
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: base: {str(tokenizer_folder)!r}; no tokenizer: ")


@pytest.fixture
def hub(monkeypatch, tokenizer_folder, tmp_path):
    """The hub's cache with the tokenizer of ``some/model``, as this command has left it; the hub is not reached."""
    snapshot = tmp_path / "hub/models--some--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tokenizer_folder, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("hub")
def test_a_tokenizer_in_the_hub_s_cache_is_found_and_is_no_model(capsys, flags):
    assert _main(capsys, *flags, "--base", "some/model")[0] == 0
    assert train.main([*flags, "--base", "some/model"]) == 2
    assert "not to be had from the Hugging Face Hub (which cannot be reached)" in capsys.readouterr().err


def test_of_a_hub_model_no_weights_are_downloaded(monkeypatch, tokenizer_folder):
    asked = []

    def download(repo, *, allow_patterns, local_files_only):
        asked.append((repo, allow_patterns, local_files_only))
        return str(tokenizer_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(model, "hub_reachable", lambda: True)
    found = model.find_tokenizer(make_settings({"base": "some/model"}))
    ((repo, patterns, offline),) = asked
    assert (repo, offline) == ("some/model", False)
    assert "*.json" in patterns
    assert not [pattern for pattern in patterns if "safetensors" in pattern]
    assert found("text")["input_ids"] == TOKENIZER("text")["input_ids"]
    with pytest.raises(InputError):
        model.find_base(make_settings({"base": "some/model"}))
    assert "*.safetensors" in asked[-1][1]


def test_gguf_files_are_converted(monkeypatch, tiny_base, tmp_path):
    (tmp_path / "x.gguf").write_text("")
    monkeypatch.setattr(model, "converted", lambda base, gguf, cache: tiny_base)
    monkeypatch.setattr(model, "_packaged_gguf", lambda: tmp_path / "x.gguf")
    for base in (str(tmp_path / "x.gguf"), model.SMOLLM2):
        found = model.find_tokenizer(make_settings({"base": base}))
        assert found("text")["input_ids"] == TOKENIZER("text")["input_ids"]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--hard-ratio", "7"], "hard_ratio: 7.0; must be in (0, 1]"),
        (["--show", "-1"], "show: -1; must be at least 0"),
        (["--json", "absent/counts.json"], "json: 'absent/counts.json'; its folder does not exist"),
        (["--base", "no/such-model"], "base: 'no/such-model'; no such folder or file"),
        (["--dataset", "absent.jsonl"], "dataset: 'absent.jsonl'; no such file or folder"),
        (["--train-tokens", "1000000"], "train_tokens, val_tokens, test_tokens: 1,000,000 train asked, but "),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, wrong, said):
    code, out, err = _main(capsys, *flags, *wrong)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1


def test_the_command_by_itself_and_its_flags_before_torch(flags):
    run = [sys.executable, "-m", "cascade_fast.data"]
    done = subprocess.run(
        [*run, *flags, "--show", "0"], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "lengths of the " in done.stdout
    script = (
        "import contextlib, sys; from cascade_fast import data\n"
        "code = data.main(['--show', '-1'])\n"
        "with contextlib.suppress(SystemExit): data.main(['--cutoff-len', '5'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert "--cutoff-len: did you mean --seq-len (" in done.stderr
