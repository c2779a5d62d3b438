"""The examples run and print what they promise."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def test_skip_layer(capsys):
    runpy.run_path(str(EXAMPLES / "skip_layer.py"), run_name="__main__")
    whole, part, generation = capsys.readouterr().out.splitlines()
    assert "hard_ratio 1.0: computed 100.0% of the tokens" in whole
    assert "computed 60.2% of the tokens" in part  # floor(0.6 * 255) + 1 = 154 of 256
    assert generation.startswith("generation, threshold")


@pytest.mark.parametrize("page", ["README.md", "docs/model.md"])
def test_the_pages_python_about_the_model(page, tiny_runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_runs["warm"], tmp_path / "runs/my-run")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    code = "\n".join(block for block in blocks if "HardTokenGather" not in block)
    exec(compile(code, page, "exec"), {})
    assert "If a class defines" in capsys.readouterr().out
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("page", ["README.md", "docs/model.md"])
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_every_flag_of_the_pages_exists(page, command):
    from cascade_fast import evaluate, generate

    parser = {"generate": generate, "evaluate": evaluate}[command].build_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    lines = re.findall(rf"python -m cascade_fast\.{command}(.*)", (ROOT / page).read_text())
    assert lines
    for line in lines:
        assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= known
