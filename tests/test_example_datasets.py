"""``examples/data``: every kind of text is read as it should be, and can be trained on."""

import json
from pathlib import Path

import pytest
import yaml

from cascade_fast import data, train

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples/data"
# Of each kind: whether part of a row is only read, and how many texts there are at least.
KINDS = {
    "text_rows": (False, 20),
    "book": (False, 1),
    "instructions": (True, 20),
    "messages": (True, 15),
    "conversations": (True, 15),
    "prompt_completion": (True, 20),
    "table": (False, 20),
    "stream": (False, 10),
}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def flags(monkeypatch, tiny_base, tmp_path):
    """Of a run from the repository's root on an example. The tiny base has no chat template of its own."""

    def flags_of(kind):
        found = ["--config", f"examples/data/{kind}.yaml", "--base", str(tiny_base)]
        if kind in ("messages", "conversations"):
            (tmp_path / "chatml.jinja").write_text(CHATML)
            found += ["--chat-template", str(tmp_path / "chatml.jinja")]
        return found

    monkeypatch.chdir(ROOT)
    return flags_of


def test_every_example_is_a_settings_file_and_a_small_text_beside_it():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)
    texts = {path.name for path in FOLDER.iterdir() if path.suffix != ".yaml"}
    assert len(texts) == len(KINDS)
    for kind in KINDS:
        text = (FOLDER / f"{kind}.yaml").read_text()
        for command in ("data", "train"):
            assert f"#   python -m cascade_fast.{command} --config examples/data/{kind}.yaml\n" in text
        dataset = ROOT / yaml.safe_load(text)["dataset"]
        assert dataset.name in texts
        assert dataset.stem == kind
        assert 1000 < dataset.stat().st_size < 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_data_shows_every_example(kind, flags, tmp_path, capsys):
    some_read, texts = KINDS[kind]
    file = tmp_path / "counts.json"
    assert data.main([*flags(kind), "--json", str(file)]) == 0
    counts = json.loads(file.read_text())
    assert all(count > 0 for count in counts["sequences"].values())
    assert counts["texts"] >= texts
    assert counts["used_share"] > 0.7
    assert (counts["labelled_share"] < 0.9) == some_read
    assert counts["labelled_share"] > 0.1
    out = capsys.readouterr().out
    assert "  learnt | " in out
    assert ("  read   | " in out) == some_read


@pytest.mark.parametrize("kind", ["table", "book", "messages"])
def test_examples_can_be_trained_on(kind, flags, tmp_path):
    run = tmp_path / "run"
    small = [
        "--seq-len",
        "32",
        "--train-tokens",
        "600",
        "--num-stages",
        "1",
        "--layers-per-stage",
        "1",
        "--epochs",
        "1",
    ]
    assert train.main([*flags(kind), *small, "--device", "cpu", "--out", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert 100 < results["tokens"]["train"] < 632  # 600 in whole sequences; those that are only read do not count
    assert (results["tokens"]["train"] < 600) == KINDS[kind][0]
    assert len(results["stages"]) == 1
