"""The shape of the house: imports go down only, kernels/ is no package, the README's commands exist."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cascade_fast.presets import STAGE_KINDS
from cascade_fast.settings import CRITERIA

ROOT = Path(__file__).parent.parent

# The packages and modules of the package's root, from the ground up: each imports from itself and from what stands
# before it.
ORDER = [
    "input_checks", "presets", "settings", "records", "resume", "ops", "runtime", "losses", "selection", "criteria",
    "hard_token_gather", "base", "stages", "planning", "model", "auto_classes", "reporting", "training", "inputs",
    "cascade", "comparison", "command_line", "commands",
]  # fmt: skip
COMMANDS = {
    "train", "base_pass", "data", "generate", "evaluate", "plan", "report", "sweep", "baselines", "env", "harness",
    "export", "neighbors",
}  # fmt: skip
SOURCES = sorted((ROOT / "cascade_fast").rglob("*.py"))


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in SOURCES}


def _part(module: str) -> str:
    """Of the package: ``cascade_fast.stages.exits`` is in ``stages``."""
    name = module.split(".")[1]
    return "commands" if name in COMMANDS else name


def _imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, and the packages of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_owner(name) or name for name in found}


def _owner(imported: str) -> str | None:
    """The module of ours that an import such as ``cascade_fast.ops.gather_rows`` comes from."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported or None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: _module(p))
def test_imports_go_down_only(path):
    module = _module(path)
    for imported in _imports(path):
        if imported.split(".")[0] in ("triton", "cascade_kernels"):
            assert module == "cascade_fast.ops.backends", f"{module} imports {imported}"
        if not imported.startswith("cascade_fast.") or "." not in module:
            continue
        assert _part(imported) != "commands", f"{module} imports the command {imported}"
        assert ORDER.index(_part(imported)) <= ORDER.index(_part(module)), f"{module} imports {imported}"


# Where a criterion may be told by its name: the methods that are compared, which choose one.
NAMES = {*STAGE_KINDS, *CRITERIA}
OWNERS = {"cascade_fast.comparison.methods"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: _module(p))
def test_nobody_asks_for_the_name_of_a_stage_kind_or_a_criterion(path):
    """They are objects, and are asked what they do. Other settings have values of the same names: ``lr_schedule``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Compare) or _module(path) in OWNERS:
            continue
        sides = [node.left, *node.comparators]
        names = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)} & NAMES
        told = ast.unparse(node)
        assert not names or ("kind" not in told and "criterion" not in told), f"{path}:{node.lineno}: {told}"


def test_no_two_modules_import_each_other():
    graph = {_module(p): {name for name in _imports(p) if name in MODULES and name != _module(p)} for p in SOURCES}
    graph.pop("cascade_fast")  # its names are imported on first use
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph


def test_nothing_below_the_model_imports_transformers_models_when_it_is_imported():
    """That would load the Auto classes, which import ``modeling`` (see auto_classes.py), which needs the importer."""
    for path in SOURCES:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names}
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom) and node.module}
        loads = {n for n in names if n.startswith(("transformers.models", "transformers.modeling", "AutoModel"))}
        assert not loads or _module(path) == "cascade_fast.model.modeling", f"{path}: {loads}"


def test_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "cascade_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed, path


def test_readme_and_contributing_have_the_packages_in_this_order():
    parts = [part for part in ORDER if part != "commands"]
    tree = re.findall(r"^    (\w+)(?:\.py|/) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    table = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [name for name in tree if name in parts] == parts
    assert [name for name in table if name in parts] == parts


def test_kernels_is_no_package_of_that_name():
    """With an ``__init__.py``, ``import kernels`` from here would find ours instead of Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    import cascade_kernels.launchers  # noqa: F401


def test_nothing_is_loaded_by_pickle_and_no_remote_code_is_run():
    forbidden = re.compile(r"pickle\.load|torch\.load\(|trust_remote_code(?!=False\b)|allow_pickle")
    for path in [*SOURCES, *(ROOT / "kernels").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert not forbidden.search(path.read_text()), path


def test_every_loading_by_transformers_auto_classes_forbids_code_of_a_repository():
    calls = []
    for path in [*SOURCES, *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            auto = ast.unparse(node.func.value).removeprefix("transformers.").startswith("Auto")
            if auto and node.func.attr in ("from_pretrained", "from_config"):
                calls.append(path)
                assert any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in node.keywords), (
                    path
                )
    assert len(calls) >= 9


def test_no_file_is_too_long():
    files = [
        *SOURCES,
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "csrc").rglob("*.c*"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    assert {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 450} == {}


def test_the_readme_s_two_commands_are_make_words():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for word in ("train", "test"):
        assert f"make {word}" in readme
        assert re.search(rf"^{word}:", makefile, re.MULTILINE)
        plan = subprocess.run(["make", "-n", "-C", str(ROOT), word], capture_output=True, text=True, check=True).stdout
        assert {"train": "-m cascade_fast.train", "test": "-m pytest"}[word] in plan


def test_every_flag_in_the_readme_exists():
    from cascade_fast.train import build_parser

    known = {option for action in build_parser()._actions for option in action.option_strings}
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"python -m cascade_fast\.train((?:[^\n`]|\\\n)*)", readme)
    assert commands
    for command in commands:
        assert set(re.findall(r"(?<=\s)--[a-z-]+", command)) <= known


def test_the_environment_report(capsys):
    from cascade_fast import env

    assert env.main() == 0
    said = capsys.readouterr().out
    for word in (
        "cascade_fast",
        "torch",
        "compute dtype",
        "cosine_score",
        "select_hard",
        "gather_rows",
        "scatter_rows",
    ):
        assert word in said


@pytest.mark.slow
def test_the_readme_s_commands_from_a_clean_clone(tmp_path):
    """``make train`` does all the set-up and prints where the report is; a second one starts at once."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    small = "ARGS=--train-blocks 8 --val-blocks 2 --num-stages 1 --epochs 1"
    for _ in range(2):
        done = subprocess.run(["make", "-C", str(clone), "train", small], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        report = re.search(r"^report: (.*)$", done.stdout, re.MULTILINE)
        assert report is not None
        assert (clone / report[1]).is_file()
    assert "base pass: reused" in done.stdout
    tests = subprocess.run(
        ["make", "-C", str(clone), "test", "ARGS=-q tests/test_config.py"], capture_output=True, text=True
    )
    assert tests.returncode == 0, tests.stdout


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return {canonicalize_name(n): version for n, _, version in (s.partition("==") for s in lines if s[:1] != "#")}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_what_is_pinned_is_allowed(file):
    """The newest versions tested and the oldest: both within pyproject.toml, the oldest exactly at its lower bounds."""
    pins = _pins(file)
    allowed = [Requirement(text) for text in requires("cascade-fast") if "extra" not in text or "gguf" in text]
    pinned = [r for r in allowed if canonicalize_name(r.name) != "torch"]
    assert {canonicalize_name(r.name) for r in pinned} <= set(pins)
    for requirement in pinned:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
        lowest = {s.version for s in requirement.specifier if s.operator == ">="}
        if file == "constraints-oldest.txt":
            assert {Version(text) for text in lowest} == {Version(version)}, requirement


# What a base pass uses without its values depending on it: where and how it is stored, read, told and scheduled. The
# settings, the tokens, the base and the names of the criteria are in its key themselves.
NOT_IN_THE_KEY = {
    "base/gguf", "base/splits", "input_checks", "records", "runtime", "settings",
}  # fmt: skip


def test_the_key_of_a_base_pass_has_the_code_that_decides_its_values():
    """Every module that base_pass imports, and those they import, is hashed, or is listed above as one that is not."""
    from cascade_fast.base.base_pass import CODE

    paths = {_module(path).removeprefix("cascade_fast.").replace(".", "/"): path for path in SOURCES}
    reached, todo = set(), ["base/base_pass"]
    while todo:
        name = todo.pop()
        if name in reached or name.startswith("ops"):  # the operators are hashed whole
            continue
        reached.add("runtime" if name.startswith("runtime") else name)
        if name in CODE:
            owners = {imported for imported in _imports(paths[name]) if imported.startswith("cascade_fast.")}
            todo += [owner.removeprefix("cascade_fast.").replace(".", "/") for owner in owners]
    assert reached - NOT_IN_THE_KEY == set(CODE)


def test_other_code_makes_another_key(monkeypatch, tmp_path):
    from cascade_fast.base import base_pass

    before = base_pass.code_fingerprint.__wrapped__()
    assert before == base_pass.code_fingerprint.__wrapped__()
    package = tmp_path / "package"
    shutil.copytree(ROOT / "cascade_fast", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(base_pass, "__file__", str(package / "base" / "base_pass.py"))
    assert base_pass.code_fingerprint.__wrapped__() == before
    for name in ("losses.py", "ops/reference.py"):
        (package / name).write_text((package / name).read_text() + "\n# changed\n")
        assert base_pass.code_fingerprint.__wrapped__() != before
        before = base_pass.code_fingerprint.__wrapped__()
