"""Builds the extension ``cascade_fast._C``; everything else about the package is in ``pyproject.toml``.

The extension uses LibTorch's stable ABI and Python's limited API: one ``.so`` serves every Python >= 3.10 and
torch >= 2.10. torch must be importable to build it: ``pip install --no-build-isolation .``; a plain ``pip install .``
installs the package without it, rather than fetch a second torch for the build alone. Environment:

- ``CASCADE_FAST_NO_EXT=1``: do not build it; the package then runs on its plain torch bodies.
- ``CASCADE_FAST_REQUIRE_EXT=1``: a build that fails is an error (default: it says why and installs without).
- ``CASCADE_FAST_CUDA=0|1``: leave the CUDA part out, or insist on it (default: when torch has CUDA and a toolkit
  is found; a GPU is never probed for, as machines that build often have none). A toolkit that does not match torch
  costs the CUDA part, and is an error if either that part or the extension is insisted on.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from torch.utils import cpp_extension
except ImportError:
    cpp_extension = None

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: the oldest torch the .so runs on
MACROS = ["-DPy_LIMITED_API=0x030a0000", TORCH_TARGET]


def flag(name: str) -> bool | None:
    value = os.environ.get(name)
    return None if value in (None, "") else value != "0"


def toolkit_version() -> str:
    """Of the CUDA toolkit that torch finds, such as ``12.8``; ``unknown`` where its compiler does not say."""
    try:
        nvcc = [Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc", "--version"]
        said = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        said = ""
    found = re.search(r"release (\d+\.\d+)", said)
    return found.group(1) if found else "unknown"


def wants_cuda() -> bool:
    import torch

    asked = flag("CASCADE_FAST_CUDA")
    if asked is False:
        return False
    if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        return asked is True  # the build then says what is missing
    toolkit = toolkit_version()
    if toolkit.split(".")[0] == torch.version.cuda.split(".")[0]:  # torch's own rule: minor versions may differ
        return True
    needed = f"torch {torch.__version__} needs {torch.version.cuda}"
    reason = f"the CUDA toolkit in {cpp_extension.CUDA_HOME} is {toolkit}, {needed}"
    if asked or flag("CASCADE_FAST_REQUIRE_EXT"):
        sys.exit(f"cascade_fast: the CUDA part cannot be built: {reason}; CASCADE_FAST_CUDA=0 leaves it out")
    print(f"cascade_fast: WARNING: building WITHOUT the CUDA part of the extension: {reason}", file=sys.stderr)
    return False


def extension():
    headers = sorted(str(p) for p in Path("csrc").rglob("*.*h"))  # a change in one of them rebuilds
    sources = [str(p) for folder in ("csrc", "csrc/cpu") for p in sorted(Path(folder).glob("*.cpp"))]
    # No errno of roots: a loop of them is then one vector instruction (csrc/cpu/adamw8bit.cpp).
    cxx = ["-O3", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden", *MACROS]
    if not wants_cuda():
        return cpp_extension.CppExtension(
            "cascade_fast._C",
            sources,
            depends=headers,
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
            optional=True,
        )
    sources += sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
    nvcc = ["-O3", "-std=c++20", "-DUSE_CUDA", *MACROS]
    return cpp_extension.CUDAExtension(
        "cascade_fast._C",
        sources,
        depends=headers,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
        optional=True,
    )


class BuildExtension(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """No compiler is not an error: say why and install without the extension, unless it is required."""

    def run(self) -> None:
        try:
            super().run()
        except (Exception, SystemExit) as error:
            if flag("CASCADE_FAST_REQUIRE_EXT"):
                raise
            print(f"cascade_fast: installed WITHOUT its extension, which did not build: {error}", file=sys.stderr)
            self.extensions = []


if cpp_extension is None:
    REASON = "torch is not importable in this build; use pip install --no-build-isolation ."
    if flag("CASCADE_FAST_REQUIRE_EXT"):
        sys.exit(f"cascade_fast: the extension cannot be built: {REASON}")
    print(f"cascade_fast: installed WITHOUT its extension: {REASON}", file=sys.stderr)

setup(
    ext_modules=[extension()] if cpp_extension and not flag("CASCADE_FAST_NO_EXT") else [],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
