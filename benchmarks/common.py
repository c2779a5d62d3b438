"""What every benchmark here does: interleaved timing, ratios, the environment, a table, a line in the ledger.

Variants take turns within one run, so that whatever else the machine does falls on all of them; a *ratio* is taken
within each round, and its median over the rounds is the result.
"""

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def percentiles(values: list[float]) -> dict[str, float]:
    """``{"p20", "p50", "p80"}`` of a list."""
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: str = "cpu", burst: int = 3
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. A round runs every variant ``burst`` times in a row and keeps the median,
    so that no variant pays for the state in which another one leaves caches and free memory. The first round is
    thrown away."""

    def once(run: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        del result  # outside the clock: giving memory back is part of no variant
        return taken

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            seconds[name].append(statistics.median(once(run) for _ in range(burst)))
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], slow: str, fast: str, of_work: float = 1.0) -> dict[str, float]:
    """How many times ``fast`` beats ``slow`` (times the share of the work it does), round by round."""
    return percentiles([of_work * s / f for s, f in zip(seconds[slow], seconds[fast], strict=True)])


def peak_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Most memory that torch holds during ``run`` beyond what it held before, on the CPU; and what it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result


def environment(device: str = "cpu") -> dict[str, object]:
    """What a reader needs to judge a number."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    changed = [line for line in git("status", "--porcelain", "-uno").splitlines() if "benchmarks/results" not in line]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else ""),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "huge_pages": huge_pages(),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def huge_pages() -> str:
    """The system's transparent huge pages: ``always``, ``madvise``, ``never`` or ``unknown``."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "unknown"


def print_table(title: str, rows: list[tuple[str, dict[str, float]]], unit: str, scale: float = 1.0) -> None:
    print(f"\n{title:<52}{'p20':>10}{'p50':>10}{'p80':>10}  {unit}")
    for name, values in rows:
        print(f"  {name:<50}" + "".join(f"{values[p] * scale:>10.2f}" for p in ("p20", "p50", "p80")))


def record(name: str, result: dict[str, object]) -> Path:
    """Appends one line to the committed ledger ``benchmarks/results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
    return path
