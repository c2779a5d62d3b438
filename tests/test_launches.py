"""Launches of training steps and of the base pass on a pretend card: what the plan counts with and docs/gpu.md shows.

Run as a script it counts: what it prints belongs into ``LAUNCHES`` and ``BASE_LAYER_LAUNCHES``, and into the table.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRESETS = {"append": "warm", "second look": "second-look", "adapters": "lora"}
SHAPE = {
    "hidden_size": 72, "intermediate_size": 192, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 500,
    "tie_word_embeddings": True,
}  # fmt: skip
# Of our operators those that are several kernels in CUDA: see docs/operators-gpu-cuda.md. The gradient of a norm's
# weight takes a second one.
SEVERAL = {
    "scatter_rows": 3, "select_hard": 2, "rms_norm_backward": 2, "add_rms_norm_backward": 2, "grad_norm": 2,
    "adamw_": 2,
}  # fmt: skip


def as_on_a_card() -> None:
    """Operators that have a CUDA kernel are one entry in the ledger each, computed by the CPU's body."""
    import pretend_gpu
    import torch

    from cascade_fast.ops import backends, reference

    for_card = torch.library.Library("cascade_fast_native", "IMPL")
    for op in backends.GPU_OPS:
        for_card.impl(op, getattr(reference, op), "CPU")
    as_on_a_card.library = for_card  # lives on with the operators
    native = backends._native_op
    stand_in_for_head_ops()

    def rows(hidden_ND, index_K, carried):  # the ledger cannot take the empty list that gather_rows returns
        return torch.index_select(hidden_ND, 0, index_K), [one[index_K] for one in carried]

    @functools.cache
    def found(op: str, key: str):
        if key != "CUDA" or op not in backends.CUDA_OPS:
            return native(op, key)
        return rows if op == "gather_rows" else native(op, "CPU")

    pretend_gpu.count_as_one(*(f"cascade_fast_native::{op}" for op in backends.CUDA_OPS))
    backends._native_op = found


def stand_in_for_head_ops() -> None:
    """Plain torch, where the extension has kernels for GPUs alone: one entry in the ledger each, too."""
    import torch

    from cascade_fast.ops import backends, reference

    library = torch.library.Library("cascade_fast_native", "IMPL")
    for op in backends.HEAD_OPS:
        library.impl(op, getattr(reference, op), "CPU")
    stand_in_for_head_ops.library = library  # it lives as long as this


def launches_of(kernel, kind: str) -> int:
    several = SEVERAL.get(kernel.op.removeprefix("cascade_fast_native.").removesuffix(".default"), 1)
    return 1 if kind == "adapters" and "rms_norm" in kernel.op else kernel.launches * several


def part_of(kernel) -> str:
    name = Path(kernel.line.file).name
    if name == "losses.py" or "cross_entropy_" in kernel.op:
        return "loss"
    of_optimizer = name == "scaler.py" or any(op in kernel.op for op in ("grad_norm", "adamw_"))
    return "optimizer" if of_optimizer else "stage"


def a_step(kind: str, layers: int, store: str, **changes: object) -> dict:
    """Of one step in the middle of an epoch: launches by part, bytes moved, syncs and copies with their lines."""
    import pretend_gpu
    from transformers import LlamaConfig

    from benchmarks import workload
    from cascade_fast.stages.tokens import StageTokens

    changes |= {"layers_per_stage": layers, "batch_tokens": 24, "store": store}
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = workload.preset_trainer(PRESETS[kind], Path(folder), "cuda", config, 4, **changes)
        parts = list(trainer.train.chunks(24))[:4]
        gathered, data = StageTokens._gathered, []

        def gather(tokens, listed):
            with pretend_gpu.ledger() as of_data:
                made = gathered(tokens, listed)
            data.extend(of_data.kernels)
            return made

        with trainer._ahead_of(parts):
            trainer.train_step(parts[0])  # makes the optimizer's state
            if store == "device":  # the host's gathering is no launch
                StageTokens._gathered = gather
            with pretend_gpu.ledger() as ledger:
                trainer.train_step(parts[1])
            StageTokens._gathered = gathered
    found = dict.fromkeys(("loss", "optimizer", "stage"), 0)
    for kernel in ledger.kernels:
        found[part_of(kernel)] += launches_of(kernel, kind)
    of_data = sum(kernel.launches for kernel in data)
    return {
        **found,
        "stage": found["stage"] - of_data,
        "data": of_data,
        "bytes": sum(kernel.bytes_read + kernel.bytes_written for kernel in ledger.kernels),
        "tokens": trainer.train.count(parts[1]),
        "syncs": [str(sync.line) for sync in ledger.syncs],
        "copies": [
            f"{copy.direction} {copy.bytes if copy.waits else 'pinned'} at {copy.line}" for copy in ledger.copies
        ],
        "copied": sum(copy.bytes for copy in ledger.copies),
    }


def base_pass(layers: int) -> int:
    import pretend_gpu
    from transformers import LlamaConfig

    from benchmarks import workload
    from cascade_fast.runtime.compute import Compute

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
        run = workload.base_pass(Path(folder), Compute.choose("cuda", "auto"), "cosine", config, 2)
        with pretend_gpu.ledger() as ledger:
            run()
    return ledger.launches


def count() -> dict:
    import pretend_gpu

    pretend_gpu.install(card="t4")
    as_on_a_card()
    from benchmarks import workload

    workload.SEQ_LEN = 32
    steps = {}
    with pretend_gpu.as_cuda():
        for kind in PRESETS:
            two, three, host = a_step(kind, 2, "device"), a_step(kind, 3, "device"), a_step(kind, 2, "host")
            layer = three["stage"] - two["stage"]
            launches = {"layer": layer, "once": two["stage"] - 2 * layer}
            launches |= {name: two[name] for name in ("loss", "optimizer")}
            steps[kind] = {"launches": launches, "device": two, "host": host}
            if kind != "append":
                forward = {"easy_tokens": "forward", "hard_ratio": 0.6}
                two, three = (a_step(kind, layers, "device", **forward) for layers in (2, 3))
                host = a_step(kind, 2, "host", **forward)
                of_layer = three["stage"] - two["stage"]
                launches["easy_layer"] = of_layer - layer
                launches["easy_once"] = two["stage"] - 2 * of_layer - launches["once"]
                steps[f"{kind}, easy tokens forward"] = {"device": two, "host": host}
        return {"steps": steps, "base layer": base_pass(3) - base_pass(2)}


@pytest.fixture(scope="module")
def counted() -> dict:
    if importlib.util.find_spec("pretend_gpu") is None:
        pytest.skip("the package pretend_gpu is not on the path")
    paths = [str(ROOT), *sys.path]  # as here
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def planned(kind: str, layers: int):
    """A step by the plan: launches and bytes where one of them takes a second."""
    from transformers import LlamaConfig

    from cascade_fast.planning.devices import find_device
    from cascade_fast.planning.times import epoch_time
    from cascade_fast.settings import make_settings

    device = dataclasses.replace(
        find_device("t4", "auto"), launch_seconds=1.0, bytes_per_second=1.0, bandwidth_fraction=1.0
    )
    changes = {"layers_per_stage": layers, "batch_tokens": 24, "seq_len": 32, "train_blocks": 25}  # 20 steps
    settings = make_settings({"preset": PRESETS[kind], **changes})
    time = epoch_time(settings, LlamaConfig(num_hidden_layers=layers, **SHAPE), device, 24)
    return time.launches / 20, time.bytes / 20


@pytest.mark.emulated
def test_the_plan_knows_the_launches_of_a_step(counted):
    from cascade_fast.planning.times import BASE_LAYER_LAUNCHES
    from cascade_fast.stages.counts import LAUNCHES

    assert {kind: counted["steps"][kind]["launches"] for kind in PRESETS} == LAUNCHES
    assert counted["base layer"] == BASE_LAYER_LAUNCHES


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["append", "second look"])
def test_the_plan_is_within_a_tenth_of_the_ledger(counted, kind):
    step = counted["steps"][kind]["device"]
    launches, moved = planned(kind, 2)
    assert launches == pytest.approx(step["loss"] + step["optimizer"] + step["stage"] + step["data"], rel=0.1)
    assert moved == pytest.approx(step["bytes"], rel=0.1)


@pytest.mark.emulated
@pytest.mark.parametrize("kind", [*PRESETS, "second look, easy tokens forward", "adapters, easy tokens forward"])
def test_a_step_waits_for_nothing_and_copies_what_it_must(counted, kind):
    step = counted["steps"][kind]
    for store, copies in (("device", 0), ("host", 1)):
        assert step[store]["syncs"] == []
        lines = [
            copy for copy in step[store]["copies"] if not re.match(r"h2d pinned at .*transfer.py:\d+ \(send\)", copy)
        ]
        assert lines == []
        assert len(step[store]["copies"]) == copies


def test_the_table_of_the_docs_is_what_the_plan_counts_with():
    from cascade_fast.planning.times import BASE_LAYER_LAUNCHES
    from cascade_fast.stages.counts import LAUNCHES

    text = (ROOT / "docs" / "gpu.md").read_text()
    rows = {
        "layer": "a layer, forward and backward", "once": "around the layers, once a step", "loss": "loss, a chunk",
        "optimizer": "optimizer",
    }  # fmt: skip
    for name, row in rows.items():
        (cells,) = re.findall(rf"^\| {row} \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
        assert [int(cell) for cell in cells] == [LAUNCHES[kind][name] for kind in PRESETS], row
    easy = {"easy_layer": "with `--easy-tokens forward`, a layer more", "easy_once": "the same, around the layers"}
    for name, row in easy.items():
        (cells,) = re.findall(rf"^\| {re.escape(row)} \| \| (\d+) \| (\d+) \|", text, re.MULTILINE)
        assert [int(cell) for cell in cells] == [LAUNCHES[kind][name] for kind in ("second look", "adapters")], row
    assert f"The base pass launches {BASE_LAYER_LAUNCHES} kernels a layer" in text


if __name__ == "__main__":
    print(json.dumps(count()))
