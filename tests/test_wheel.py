"""A wheel has every package: built and installed elsewhere, every module of it is imported from there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORT_ALL = """
import importlib, pathlib, sys
import cascade_fast, cascade_kernels
root = pathlib.Path(sys.argv[1])
for path in sorted((root / "cascade_fast").rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    if name not in ("cascade_fast.model.lm_eval",):  # needs lm-eval
        assert pathlib.Path(importlib.import_module(name).__file__).is_relative_to(root), name
from cascade_fast import CascadeForCausalLM, HardTokenGather
from cascade_fast.reporting.html import render_page
assert (root / "cascade_fast" / "reporting" / "templates").is_dir()
print("imported")
"""


def test_a_wheel_installed_elsewhere_has_every_package(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    environment = {**os.environ, "CASCADE_FAST_NO_EXT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*install, "--target", str(target), str(source)], env=environment, check=True)
    modules = {p.relative_to(ROOT) for p in (ROOT / "cascade_fast").rglob("*.py")}
    assert {p.relative_to(target) for p in (target / "cascade_fast").rglob("*.py")} == modules
    command = [sys.executable, "-c", IMPORT_ALL, str(target)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert done.stdout == "imported\n", done.stderr
