"""The examples run and print what they promise."""

import importlib
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


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
PARSERS = {"plan": "plan_parser", "baselines": "baselines_parser", "sweep": "sweep_parser"}
RECORDS = {"docs/log.md"}  # what was run then stays as it was run
# Of pip, pytest and torchrun.
OTHERS = {"--no-build-isolation", "--no-deps", "--wheel-dir", "--benchmark-only", "--standalone", "--nproc-per-node"}


@pytest.mark.parametrize("page", ["README.md", "docs/model.md"])
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_the_pages_show_the_commands(page, command):
    assert f"python -m cascade_fast.{command} " in (ROOT / page).read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RECORDS])
def test_every_flag_of_the_pages_exists(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for command, rest in re.findall(r"python -m cascade_fast\.([a-z_]+)([^\n`#]*)", text):
        module = importlib.import_module(f"cascade_fast.{command}")
        flags = set(re.findall(r"(?<=\s)--[a-z0-9-]+", rest))
        if not flags or command == "harness":  # whose flags are lm-eval's
            continue
        parser = getattr(module, PARSERS.get(command, "build_parser"))()
        known = {option for action in parser._actions for option in action.option_strings}
        assert flags <= known, f"{command}: {flags - known}"


OURS_ALONE = ["colab", "compare", "data", "model", "original-recipe", "plan", "runs", "second-look", "troubleshooting"]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in OURS_ALONE)])
def test_flags_in_tables_and_sentences_exist(page):
    known = set(OTHERS)
    for command in (
        "train",
        "base_pass",
        "data",
        "plan",
        "generate",
        "evaluate",
        "export",
        "report",
        "baselines",
        "sweep",
    ):
        parser = getattr(importlib.import_module(f"cascade_fast.{command}"), PARSERS.get(command, "build_parser"))()
        known |= {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", (ROOT / page).read_text())) <= known


LINKING = [*PAGES, "CHANGELOG.md", "kernels/README.md", "docs/example-report/report.md"]
LINKING += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs" / "decisions").glob("*.md"))


@pytest.mark.parametrize("page", LINKING)
def test_the_links_of_the_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r'(?:\]\(|src=")([^)"\s]+)', text):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in names, target


@pytest.mark.parametrize("page", [page for page in LINKING if page not in RECORDS])
def test_files_that_the_pages_name_exist(page):
    text = (ROOT / page).read_text()
    folders = "cascade_fast|csrc|kernels|tests|benchmarks|examples|tools|docs"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.\w+)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [page for page in PAGES if page.startswith("docs/") and page not in readme] == []
