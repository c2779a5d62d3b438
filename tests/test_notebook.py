"""The Colab notebook runs from its first cell to its last, on the CPU with a tiny base; the committed file is clean."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples/colab_t4.ipynb"


def _notebook(**parameters):
    """The notebook, with lines after those of its parameters cell that set them anew."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name in parameters:
        assert name in cell.source, f"the notebook has no parameter {name}"
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


def _execute(notebook, folder: Path, monkeypatch, **environment: str) -> None:
    """With this Python as the kernel, whatever kernels the user has."""
    spec = folder / "kernels/python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setattr(KernelSpecManager, "_kernel_dirs_default", lambda self: [str(folder / "kernels")])
    monkeypatch.setattr(KernelSpecManager, "ensure_native_kernel", False)
    for name, value in {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), **environment}.items():
        monkeypatch.setenv(name, value)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def test_it_runs_to_the_end(tiny_base, tiny_data, tmp_path, monkeypatch):
    notebook = _notebook(
        BASE=str(tiny_base),
        DATASET=str(tiny_data),
        SEQ_LEN=32,
        TRAIN_BLOCKS=16,
        VAL_BLOCKS=4,
        LAYERS=1,
        EPOCHS=1,
        OUT=str(tmp_path / "out"),
        DEVICE="cpu",
        DTYPE="float32",
        NEW_TOKENS=6,
    )
    _execute(notebook, tmp_path, monkeypatch, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Tesla T4" in printed  # the plan
    assert "all tokens, each at its own exit" in printed  # the evaluation
    assert (tmp_path / "out/append/report.md").is_file()
    assert (tmp_path / "out/second-look/report.md").is_file()
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4  # plots
    assert any("The class statement<span" in output.get("data", {}).get("text/html", "") for output in outputs)


def test_without_package_and_repository_it_says_what_to_do(tmp_path, monkeypatch):
    notebook = _notebook()
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code"][:2]
    notebook.cells[0].source += "\nimport importlib.util\nimportlib.util.find_spec = lambda name: None"
    with pytest.raises(CellExecutionError, match="REPOSITORY is empty"):
        _execute(notebook, tmp_path, monkeypatch)


def test_the_committed_file_is_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert 'REPOSITORY = ""' in parameters.source
