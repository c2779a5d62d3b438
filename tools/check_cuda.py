"""Compiles every GPU kernel for every supported architecture, without a GPU, and records what each one needs.

``make check-cuda``. CUDA: each ``csrc/cuda/*.cu`` goes through ``nvcc -c`` with torch's headers (nothing is linked, so
a CPU torch will do). Triton: each kernel listed in ``cascade_kernels.launchers.AOT`` is compiled ahead of time, then
read by ptxas. The table goes to ``build/cuda_resources.json``; a compile error, a register spill or more than 48 KB
of shared memory makes the exit status 1. It proves that kernels compile and fit, not that they are right.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_75", "sm_80", "sm_90")
MAX_SHARED = 48 * 1024  # what a kernel gets without opting in to more
MACROS = ("-DUSE_CUDA", "-DPy_LIMITED_API=0x030a0000", "-DTORCH_TARGET_VERSION=0x020a000000000000")  # as setup.py


class CheckError(Exception):
    """A kernel that does not compile, or a tool that is missing."""


def parse_ptxas(log: str, body: str) -> list[dict]:
    """Rows of the table from the output of ``ptxas -v``."""
    rows: list[dict] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
            row = {"kernel": entry[1], "body": body, "arch": entry[2]}
            rows.append(row | {"registers": 0, "spill_bytes": 0, "shared_bytes": 0})
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if rows:  # a device function that was not inlined counts with the kernel before it
                rows[-1]["spill_bytes"] += int(spill[1]) + int(spill[2])
        elif used := re.search(r"Used (\d+) registers", line):
            rows[-1]["registers"] = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                rows[-1]["shared_bytes"] = int(shared[1])
    return rows


def readable(names: list[str]) -> list[str]:
    """Demangled kernel names without parameter lists; the mangled ones where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    # "void cascade::kernel<cascade::Float16, (int)16>(...)" becomes "kernel<Float16, 16>"
    short = [re.sub(r"^void |cascade::|\(int\)", "", line) for line in lines.splitlines()]
    return [name.split("(")[0] for name in short]


def check_cu(source: Path, archs: list[str]) -> list[dict]:
    """Compile one .cu for all architectures and return its rows."""
    from torch.utils.cpp_extension import include_paths

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CheckError("nvcc is not on PATH: install a CUDA toolkit, or check the Triton kernels with --triton-only")
    includes = [f"-I{path}" for path in include_paths()]
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-c", "-O3", "-std=c++20", *MACROS, *includes, *targets, "--resource-usage", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if done.returncode != 0:
        raise CheckError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    rows = parse_ptxas(done.stdout + done.stderr, "cuda")
    for row, name in zip(rows, readable([row["kernel"] for row in rows]), strict=False):
        row["kernel"] = name
    return rows


def triton_kernels() -> list[dict]:
    """``AOT`` of this checkout's ``kernels/launchers.py``; empty when there is none."""
    if not (ROOT / "kernels" / "launchers.py").exists():
        return []
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
    package = types.ModuleType("cascade_kernels")  # this checkout's, whatever is installed
    package.__path__ = [str(ROOT / "kernels")]
    sys.modules["cascade_kernels"] = package
    return getattr(importlib.import_module("cascade_kernels.launchers"), "AOT", [])


def run_ptxas(ptx: str, name: str) -> str:
    """What ptxas says about a PTX text: of several versions around, the first that knows the text's version."""
    import triton

    bundled = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    candidates = [*map(str, bundled), *filter(None, [shutil.which("ptxas")])]
    if not candidates:
        raise CheckError("ptxas is neither in the triton package nor on PATH")
    target = re.search(r"\.target (sm_\w+)", ptx)[1]  # sm_90a for sm_90
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        for ptxas in candidates:
            command = [ptxas, "-v", f"-arch={target}", f"{folder}/k.ptx", "-o", f"{folder}/k.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0 or "Unsupported .version" not in done.stderr:
                break
    if done.returncode != 0:
        raise CheckError(f"{name}: ptxas fails for {target}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def check_triton(entry: dict, arch: str) -> list[dict]:
    """Compile one entry of ``AOT`` for one architecture: Triton to PTX and cubin, ptxas for the numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(entry["kernel"], entry["signature"], entry["constexprs"], entry.get("attrs"))
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target=target, options={"num_warps": entry["num_warps"]})
    except Exception as error:  # Triton has no common class for what its passes raise
        raise CheckError(f"{entry['name']} does not compile for {arch}: {error}") from error
    rows = parse_ptxas(run_ptxas(compiled.asm["ptx"], entry["name"]), "triton")
    for row in rows:
        row["kernel"], row["arch"] = entry["name"], arch
        row["shared_bytes"] += compiled.metadata.shared  # Triton's shared memory is dynamic: ptxas does not see it
    return rows


def problems(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        where = f"{row['body']} {row['kernel']} {row['arch']}"
        if row["spill_bytes"]:
            found.append(f"{where}: spills {row['spill_bytes']} bytes")
        if row["shared_bytes"] > MAX_SHARED:
            found.append(f"{where}: {row['shared_bytes']} bytes of shared memory, more than {MAX_SHARED}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help=".cu files (default: all of csrc/cuda)")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one; may be repeated (default: all)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--triton-only", action="store_true", help="leave out the .cu files; needs no nvcc")
    only.add_argument("--cuda-only", action="store_true", help="leave out the Triton kernels")
    parser.add_argument("--jobs", type=int, default=2, help="nvcc processes at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cuda_resources.json", help="the table")
    args = parser.parse_args(argv)
    archs = args.arch or list(ARCHS)

    rows, failures = [], []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        sources = args.sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        sources = [] if args.triton_only else sources
        tasks = [pool.submit(check_cu, source, archs) for source in sources]
        for task in tasks:
            try:
                rows += task.result()
            except CheckError as error:
                failures.append(str(error))
    entries = [] if args.cuda_only else triton_kernels()
    for entry in entries:
        for arch in archs:
            try:
                rows += check_triton(entry, arch)
            except CheckError as error:
                failures.append(str(error))
    if not rows and not failures:
        failures.append("nothing was checked")
    failures += problems(rows)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'kernel':<44} {'body':<7} {'arch':<6} {'regs':>5} {'spill':>6} {'shared':>7}")
    for row in rows:
        numbers = f"{row['registers']:>5} {row['spill_bytes']:>6} {row['shared_bytes']:>7}"
        print(f"{row['kernel']:<44} {row['body']:<7} {row['arch']:<6} {numbers}")
    print(f"{len(rows)} kernels: {len(sources)} .cu files and {len(entries)} Triton kernels for {', '.join(archs)}")
    for failure in dict.fromkeys(failures):
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
