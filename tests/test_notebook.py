"""The Colab notebook runs from its first cell to its last, on the CPU with a tiny base, however the package gets there;
the committed file is clean.

Offline: the wheel is this project's, built without its extension, and pip installs it into a folder of its own.
``google.colab`` is a stand-in that hands over the wheel and has a folder for a Drive.
"""

import ast
import builtins
import html
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples/colab_t4.ipynb"
TINY_FLAGS = [
    "--seq-len",
    32,
    "--accept",
    "always",
    "--layers-per-stage",
    1,
    "--epochs",
    2,
    "--dtype",
    "float32",
    "--device",
    "cpu",
]
WHERE = "print('package:', cascade_fast.__file__)"
COLAB = {
    "files": """
        import os, shutil

        def upload():  # Colab numbers a file whose name is taken
            wheel = os.environ["UPLOADED_WHEEL"]
            name = os.path.basename(wheel).replace(".whl", " (1).whl")
            shutil.copy(wheel, name)
            return {name: b""}

        def download(path):
            print("downloaded", path)
        """,
    "drive": """
        def mount(folder):
            print("mounted", folder)
        """,
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Of this project, pure Python, in a folder with stand-ins of the build tools: an index for pip."""
    source, index = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("index")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("cascade_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(index), str(source)]
    environment = {**os.environ, "CASCADE_FAST_NO_EXT": "1"}
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, env=environment)
    for name in ("setuptools", "wheel", "ninja"):
        with zipfile.ZipFile(index / f"{name}-999-py3-none-any.whl", "w") as file:
            file.writestr(f"{name}-999.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 999\n")
            file.writestr(f"{name}-999.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            file.writestr(f"{name}-999.dist-info/RECORD", "")
    return next(index.glob("cascade_fast-*.whl"))


def _notebook(**settings):
    """The notebook, with lines after those of its settings that set them anew."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name in settings:
        assert f"{name} = " in cell.source or f"{name}," in cell.source, f"the notebook has no setting {name}"
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    return notebook


def _execute(notebook, folder: Path, monkeypatch, **environment: str) -> None:
    """With this Python as the kernel, whatever kernels the user has."""
    spec = folder / "kernels/python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setattr(KernelSpecManager, "_kernel_dirs_default", lambda self: [str(folder / "kernels")])
    monkeypatch.setattr(KernelSpecManager, "ensure_native_kernel", False)
    defaults = {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in {**defaults, **environment}.items():
        monkeypatch.setenv(name, value)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()


def _said(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def _pip_offline(index: Path, site: Path) -> dict[str, str]:
    """Settings of pip, read from the environment: packages of ``index`` only, into ``site``."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_TARGET": str(site), "PIP_NO_DEPS": "1"}


@pytest.mark.parametrize("way", ["upload", pytest.param("name", marks=pytest.mark.slow)])
def test_it_runs_to_the_end(way, wheel, tiny_base, tiny_data, tmp_path, monkeypatch):
    """On "Colab", with an uploaded wheel and Drive; and elsewhere, with a name on an index."""
    site, out = tmp_path / "site", tmp_path / "out"
    colab = way == "upload"
    if colab:
        for name, source in {"__init__": "", **COLAB}.items():
            path = site / "google/colab" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
    notebook = _notebook(
        INSTALL_FROM="upload" if colab else "cascade-fast",
        USE_DRIVE=colab,
        **{"DRIVE_OUT" if colab else "OUT": str(out)},
        BASE=str(tiny_base),
        DATASET=str(tiny_data),
        TRAIN_TOKENS=512,
        VAL_TOKENS=128,
        PRESET="second-look" if colab else "warm",
        MORE_FLAGS=TINY_FLAGS,
        NEW_TOKENS=6,
    )
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
    environment = _pip_offline(wheel.parent, site)
    _execute(notebook, tmp_path, monkeypatch, **environment, PYTHONPATH=str(site), UPLOADED_WHEEL=str(wheel))
    said = _said(notebook)
    assert f"package: {site}" in said  # the installed one, not this checkout
    assert ("mounted /content/drive" in said) == colab
    assert "Tesla T4" in said  # the plan
    assert "epoch 1: train_loss=" in said  # training
    assert "\x1b[2K" not in said  # bars that move on a terminal
    assert "\x1b[2mThe class statement" in said  # the prompt, dim: colours arrive
    assert "all tokens, each at its own exit" in said  # the evaluation
    assert (out / "report.md").is_file()
    with zipfile.ZipFile(f"{out}.zip") as archive:
        assert "config.json" in archive.namelist()
    (page,) = (
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    )
    assert "<iframe srcdoc=" in page
    assert html.unescape(page).count('<span class="t e') == 4 * 32  # the heat map: a token of every validation block


def test_a_name_is_installed_from_an_index(wheel, tmp_path, monkeypatch):
    """What the slow test above does with ``name``, up to its training."""
    notebook = _notebook(INSTALL_FROM="cascade-fast", OUT=str(tmp_path))
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code"][:3]
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
    site = tmp_path / "site"
    _execute(notebook, tmp_path, monkeypatch, **_pip_offline(wheel.parent, site), PYTHONPATH=str(site))
    assert f"package: {site}" in _said(notebook)


def test_torch_is_left_as_it_is(wheel, tmp_path, monkeypatch):
    """pip's own resolver, with every dependency and the notebook's constraint, would install this package and no
    other."""
    report = tmp_path / "pip.json"
    notebook = _notebook(INSTALL_FROM=str(wheel), OUT=str(tmp_path))
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code"][:3]
    offline = {"PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1", "PIP_REPORT": str(report)}
    _execute(notebook, tmp_path, monkeypatch, **offline)
    assert (tmp_path / "constraints.txt").read_text() == f"torch=={version('torch')}\n"
    planned = json.loads(report.read_text())["install"]
    assert {item["metadata"]["name"] for item in planned} <= {"cascade-fast"}


@pytest.mark.parametrize(
    ("install_from", "said"),
    [("upload", "INSTALL_FROM: 'upload' works on Colab only"), ("missing.whl", "pip ended with exit code 1")],
)
def test_a_package_that_cannot_be_had_stops_it(install_from, said, tmp_path, monkeypatch):
    notebook = _notebook(INSTALL_FROM=install_from)
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code"][:3]
    with pytest.raises(CellExecutionError, match=said):
        _execute(notebook, tmp_path, monkeypatch, PIP_NO_INDEX="1")


def _run_of_the_notebook():
    """The function ``run`` that the notebook defines."""
    (cell,) = (c for c in nbformat.read(NOTEBOOK, as_version=4).cells if "def run(" in c.source)
    names: dict = {}
    exec(compile(cell.source, "notebook", "exec"), names)
    return names["run"]


def _module(folder: Path, monkeypatch, source: str) -> str:
    (folder / "said_slowly.py").write_text(textwrap.dedent(source))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "said_slowly"


def test_what_a_command_says_is_shown_as_it_says_it(tmp_path, monkeypatch):
    """The command goes on only once its first line has been shown."""
    seen = tmp_path / "seen"
    name = _module(
        tmp_path,
        monkeypatch,
        f"""
        import os, sys, time
        print("first")
        end = time.monotonic() + 20
        while not os.path.exists({str(seen)!r}) and time.monotonic() < end:
            time.sleep(0.01)
        sys.exit(0 if os.path.exists({str(seen)!r}) else 7)
        """,
    )
    monkeypatch.setattr(builtins, "print", lambda text, **_: seen.touch() if text == "first\n" else None)
    _run_of_the_notebook()(name)


def test_a_stopped_cell_lets_the_command_save(tmp_path, monkeypatch):
    name = _module(
        tmp_path,
        monkeypatch,
        """
        import sys, time
        try:
            print("working")
            time.sleep(20)
        except KeyboardInterrupt:
            print("saved")
            sys.exit(130)
        """,
    )
    shown = []

    def show(text, **_):
        shown.append(text)
        if text == "working\n":
            raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "print", show)
    with pytest.raises(KeyboardInterrupt):
        _run_of_the_notebook()(name)
    assert shown == ["working\n", "saved\n"]


def test_a_command_that_fails_stops_it(tmp_path, monkeypatch, capsys):
    name = _module(tmp_path, monkeypatch, "import os, sys; sys.exit(os.environ['WHY'])")
    with pytest.raises(RuntimeError, match="said_slowly ended with exit code 1"):
        _run_of_the_notebook()(name, WHY="no such thing")
    assert "no such thing" in capsys.readouterr().out


def test_every_flag_that_it_gives_exists():
    """Those of ``run`` belong to its command, those of ``TRAIN`` to the trainer."""
    flags: dict[str, set[str]] = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            command = None
            if isinstance(node, ast.Assign | ast.AugAssign) and "TRAIN" in ast.unparse(node).split(" ")[0]:
                command = "train"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "run":
                command = ast.unparse(node.args[0]).strip("'").removeprefix("cascade_fast.")
            if command is not None:
                words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                flags.setdefault(command, set()).update(word for word in words if word.startswith("--"))
    assert set(flags) >= {"train", "plan", "generate", "evaluate"}
    assert len(flags["train"]) >= 7
    parsers = {"plan": "plan_parser"}
    for command in set(flags) - {"*pip"}:
        module = importlib.import_module(f"cascade_fast.{command}")
        parser = getattr(module, parsers.get(command, "build_parser"))()
        known = {option for action in parser._actions for option in action.option_strings}
        assert flags[command] <= known, command


def test_the_committed_file_is_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    (settings,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert 'INSTALL_FROM = "upload"' in settings.source
    assert "USE_DRIVE = False" in settings.source
