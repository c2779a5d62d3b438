"""What ``setup.py`` builds, by what it finds; nothing is compiled."""

import runpy
from pathlib import Path

import pytest
import setuptools
import torch

cpp_extension = pytest.importorskip("torch.utils.cpp_extension")

ROOT = Path(__file__).parent.parent
WARNING = "WITHOUT the CUDA part of the extension: the CUDA toolkit in {} is {}, torch {} needs 12.8"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Runs ``setup.py`` beside a toolkit of some version and a torch for CUDA 12.8; the sources it would compile."""

    def run(toolkit: str | None, **environment: str) -> list[str]:
        if toolkit is not None:
            nvcc = tmp_path / "bin" / "nvcc"
            nvcc.parent.mkdir()
            nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {toolkit}, V{toolkit}.61'\n")
            nvcc.chmod(0o755)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        runpy.run_path(str(ROOT / "setup.py"))
        (extension,) = given["ext_modules"]
        return extension.sources

    given: dict = {}
    for name in ("CASCADE_FAST_CUDA", "CASCADE_FAST_REQUIRE_EXT", "CASCADE_FAST_NO_EXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")  # setup.py sets it where it is not
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return run


def in_cuda(sources: list[str]) -> bool:
    assert "csrc/cpu/adamw8bit.cpp" in sources
    return any(source.endswith(".cu") for source in sources)


@pytest.mark.parametrize("toolkit", ["12.8", "12.4"])
def test_a_toolkit_of_torch_s_major_version_builds_the_cuda_part(build, capsys, toolkit):
    assert in_cuda(build(toolkit, CASCADE_FAST_REQUIRE_EXT="1"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("toolkit", ["11.8", "13.0", None])
def test_another_toolkit_costs_the_cuda_part_only(build, capsys, tmp_path, toolkit):
    assert not in_cuda(build(toolkit))
    assert WARNING.format(tmp_path, toolkit or "unknown", torch.__version__) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["CASCADE_FAST_REQUIRE_EXT", "CASCADE_FAST_CUDA"])
def test_another_toolkit_is_an_error_where_the_extension_is_insisted_on(build, name):
    with pytest.raises(SystemExit, match=r"CUDA part cannot be built: the CUDA toolkit .* is 11\.8, .* needs 12\.8"):
        build("11.8", **{name: "1"})


def test_without_the_cuda_part_the_toolkit_does_not_matter(build, capsys):
    assert not in_cuda(build("11.8", CASCADE_FAST_CUDA="0", CASCADE_FAST_REQUIRE_EXT="1"))
    assert capsys.readouterr().err == ""
