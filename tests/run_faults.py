"""What the tests of killed and damaged runs share: the server of commands, a small run, and when two runs are alike."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

# What depends on the process and not on what it computes: times, memory and the checksum over them.
TIMES = {
    "seconds", "tokens_per_second", "mfu", "matmul_flops_per_second", "peak_rss_bytes", "memory", "base_pass_seconds",
    "base_pass_reused", "sha256",
}  # fmt: skip
MAY_CHANGE = {"out", "resume", "checkpoint_minutes", "max_minutes", "cache_dir"}


class FaultServer:
    """``fault_server.py``, as a context manager."""

    def __init__(self) -> None:
        # One thread: the point is the bits, not the speed, and processes of many threads cannot be forked.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> "FaultServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, request: dict) -> dict | None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *argv: str | Path,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
        die_at: int | None = None,
        die_when: str | None = None,
        fill_at: int | None = None,
    ) -> "Forked":
        faults = {"folder": folder and str(folder), "die_at": die_at, "die_when": die_when, "fill_at": fill_at}
        return Forked(self, {"argv": [str(part) for part in argv], "environment": environment or {}, **faults})

    def run(self, folder: Path | None, *argv: str | Path, **faults) -> dict:
        return self.start(*argv, folder=folder, **faults).answer()


class Forked:
    """A command in a process of its own, forked by the server; to be used as a ``subprocess.Popen``."""

    def __init__(self, server: FaultServer, request: dict) -> None:
        self.server, self.args = server, request["argv"]
        self.pid, self._answer = server.ask(request)["pid"], None

    @property
    def returncode(self) -> int | None:
        return self._answer and self._answer["code"]

    def poll(self) -> int | None:
        if self._answer is None:
            self._answer = self.server.ask({"pid": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def answer(self, timeout: float = 600) -> dict:
        """What it left, once it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self._answer

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        answer = self.answer(timeout)
        return answer["out"], answer["err"]


def small_run(base: Path, folder: Path, kind: str, *more: str) -> list[str]:
    """A run of two stages of two layers in ``folder``, with its own cache there: about half a second."""
    return [
        "train", "--base", str(base), "--dataset", "pydoc", "--seq-len", "32", "--train-blocks", "12",
        "--val-blocks", "4", "--layers-per-stage", "2", "--epochs", "2", "--batch-tokens", "64", "--lr", "3e-3",
        "--dtype", "float32", "--device", "cpu", "--num-stages", "2", "--accept", "always", "--patience", "3",
        "--checkpoint-minutes", "0.0000001", "--stage-kind", kind, "--out", str(folder / "run"),
        "--cache-dir", str(folder / "cache"), "--resume", "auto", *more,
    ]  # fmt: skip


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES | MAY_CHANGE}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs that should be the same bit for bit."""
    found = []
    results = [without_times(json.loads((p / "results.json").read_text())) for p in (one, other)]
    if results[0] != results[1]:
        found.append("results.json")
    assert results[0]["stages"], "nothing was trained"
    for number in range(1, results[0]["final"]["stages_kept"] + 1):
        weights = [load_file(p / f"stages/{number}/model.safetensors") for p in (one, other)]
        if weights[0].keys() != weights[1].keys() or any(
            not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
        ):
            found.append(f"stages/{number}")
    return found


def epochs_told(run: Path) -> list[tuple[int, int]]:
    """(stage, epoch) of every epoch's line in ``metrics.jsonl``."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["stage"], line["epoch"]) for line in lines if line["event"] == "epoch"]


def is_one_line(answer: dict) -> bool:
    """Whether a command has refused as it should: exit code 2 and one line that says why."""
    lines = answer["err"].strip().splitlines()
    return answer["code"] == 2 and len(lines) == 1 and lines[0].startswith("error: ")
