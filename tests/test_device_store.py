"""Hidden states beside a GPU: batches are the CPU's, bit for bit, wherever the stores are. Between two looks at the
loss a step waits for nothing, and copies nothing where they are on the GPU, one pinned buffer where they are not.

Steps run on a pretend card, in a process of its own, where the package pretend_gpu is on the path.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import english_texts

from cascade_fast.planning.base_configs import base_configuration
from cascade_fast.planning.devices import find_device
from cascade_fast.planning.memory import CONTEXT_BYTES, GIB, LIST_BYTES
from cascade_fast.planning.plan import make_plan
from cascade_fast.selection import hard_count
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import hardest_of_store, select_below
from cascade_fast.stages.kind import get_kind

LOOK = {"stage_kind": "second-look"}
KINDS = {
    "append": {},
    "second look": {**LOOK, "kv": "store"},
    "second look, recompute": {**LOOK, "kv": "recompute"},
    "adapters, every token": {**LOOK, "adapter": "lora", "lora_rank": 4, "hard_ratio": 1.0},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(tiny_base, tmp_path_factory) -> dict:
    """What :func:`main` prints."""
    if importlib.util.find_spec("pretend_gpu") is None:
        pytest.skip("the package pretend_gpu is not on the path")
    folder = tmp_path_factory.mktemp("device store")
    texts = folder / "texts.jsonl"  # of several lengths, so that packs share rows
    rows = [{"text": text[: 9 + 7 * (i % 4)]} for i, text in enumerate(english_texts(80, 40))]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_base), str(texts), str(folder)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.emulated
@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_cpu(found, kind, store):
    seen = found[kind][store]
    assert seen["steps"] > 4
    assert seen["hard tokens"] == "equal"
    assert seen["different"] == []
    assert seen["later stage different"] == []


@pytest.mark.emulated
@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_and_copies_what_it_must(found, kind, store):
    """An epoch: its only syncs are those of the look at its end, whose totals are all that comes back."""
    seen = found[kind][store]
    assert seen["syncs"] == ["wait_for", "_look"]
    assert seen["to the host"] == ["_look"]
    assert seen["to the device"] == ["send, pinned, non-blocking"] * (1 if store == "device" else seen["steps"])


def planned(memory_gib: float | None = None, **settings):
    device = find_device("t4", "auto", memory_gib=memory_gib)
    return make_plan(make_settings(settings), base_configuration("smollm2-135m"), device)


def test_the_plan_keeps_hidden_states_on_the_gpu_where_they_fit():
    blocks, stored = 320 + 64, 576 * 2  # the defaults: of training and validation; float16
    of_base, lists = blocks * 128 * stored, 320 * 128 * 0.6 * LIST_BYTES
    one, two = planned(num_stages=1), planned(num_stages=2)
    assert one.settings.store == two.settings.store == "device"
    assert one.memory.store_on_gpu == of_base + lists
    # Of the second stage: what the first has left, in float32, 60 % of the tokens; the base's for validation.
    left = hard_count(0.6, blocks * 128) * 576 * 4
    assert two.memory.store_on_gpu == max(of_base, left + 64 * 128 * stored) + lists
    host = planned(num_stages=1, store="host")
    assert host.memory.store_on_gpu == 0
    assert host.store_line.startswith("store: host")
    for of_store, of_host in zip(one.memory.phases[1:], host.memory.phases[1:], strict=True):
        sent = of_host.lasting["the next batch"]
        assert of_store.peak - of_host.peak == pytest.approx(of_base + lists - sent)
    small = (host.memory.needed + CONTEXT_BYTES) / GIB + 0.01
    assert planned(small, num_stages=1).settings.store == "host"
    assert planned(small, num_stages=1).fits
    asked = planned(small, num_stages=1, store="device")
    assert asked.settings.store == "device"
    assert not asked.fits or asked.memory.micro_batch_tokens < 512


def test_keys_and_values_of_every_exit_are_counted():
    look = {"stage_kind": "second-look", "layers_per_stage": 8, "kv": "store"}
    kv, tokens = 8 * 2 * 3 * 64, (320 + 64) * 128
    one, two = (planned(**look, num_stages=n).memory.store_on_gpu for n in (1, 2))
    assert one == tokens * (576 + kv) * 2 + 320 * 128 * (0.6 * LIST_BYTES + 8)
    assert two - one == hard_count(0.6, tokens) * (576 + kv) * 4


# --- in a process of its own ------------------------------------------------------------------------------------------


def tensors_of(batch) -> dict[str, torch.Tensor]:
    inputs, label_K = batch
    parts = {"hidden_KD": inputs} if isinstance(inputs, torch.Tensor) else vars(inputs)
    return {"label_K": label_K} | {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}


def differing(tokens, reference, picks, device) -> list[str]:
    """What of some batches is not, bit for bit, that of the CPU; keys and values that are recomputed: to rounding."""
    names = set()
    for batch, expected in zip(tokens.batches(picks, device), reference.batches(picks, CPU), strict=True):
        ours, theirs = tensors_of(batch), tensors_of(expected)
        names |= ours.keys() ^ theirs.keys()
        for name in ours.keys() & theirs.keys():
            rounding = 1e-5 if name == "kv_BSL2GE" and tokens.recompute is not None else 0.0
            here = ours[name].cpu() if ours[name].device.type == "cuda" else torch.empty(0)
            same = here.shape == theirs[name].shape and torch.allclose(here, theirs[name], rtol=0, atol=rounding)
            names |= set() if same else {name}
    return sorted(names)


def left_by_a_stage(store, index_K, seed):
    """A store of these tokens with other hidden states, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {name: array[index_K] for name, array in store.arrays.items()}
    wide = {n: torch.randn(arrays[n].shape, generator=generator) for n in ("hidden", "kv") if n in arrays}
    return type(store)(store.folder, {**arrays, **wide}, store.meta)


def of_a_kind(kind: str, changes: dict, folder: Path) -> dict:
    import pretend_gpu

    from cascade_fast.base.base_pass import base_pass
    from cascade_fast.base.texts import load_sequences
    from cascade_fast.runtime.compute import Compute
    from cascade_fast.runtime.metrics_log import MetricsLog
    from cascade_fast.stages.kind import base_needs, find_base_for_stages
    from cascade_fast.training.stage_trainer import StageTrainer

    settings = make_settings({**changes, **KINDS[kind]})
    base = find_base_for_stages(settings)
    sequences = load_sequences(settings, base.tokenizer())
    settings = sequences.settle(settings)
    needs, here = base_needs(settings), Compute(CPU, torch.float32)
    passed = base_pass(base, sequences, settings, needs, here, folder / "cache")
    compute = Compute(torch.device("cuda"), torch.float16)
    of, train = get_kind(settings.stage_kind), passed.stores["train"]
    on_gpu = passed.to(compute.device, layers=settings.adapter != "none")
    recompute = of.recompute(settings, base.config, passed, here)
    exact = of.recompute(settings, base.config, on_gpu, dataclasses.replace(compute, dtype=torch.float32))
    expected = hardest_of_store(train, settings.hard_ratio)
    reference, found = of.tokens([train], expected.index_K, recompute), {}
    for place in ("device", "host"):
        near = train.to(compute.device) if place == "device" else train
        selection = hardest_of_store(near, settings.hard_ratio)
        same = torch.equal(selection.index_K, expected.index_K) and selection.threshold == expected.threshold
        tokens = of.tokens([near], selection.index_K, exact)
        picks = torch.randperm(tokens.units).split(tokens.units_of(settings.batch_tokens))
        seen = {"hard tokens": "equal" if same else "different", "later stage different": []}
        seen["different"] = differing(tokens, reference, picks, compute.device)
        if settings.hard_ratio < 1:
            later = left_by_a_stage(train, expected.index_K, 0)
            if recompute is not None:
                later.arrays["kv"] = torch.randn(len(later), *of.config(settings, base.config).kv_shape)
            again = select_below(later["score"], later["score"].median())
            moved = later.to(compute.device) if place == "device" else later
            a, b = of.tokens([near, moved], again, exact), of.tokens([train, later], again, recompute)
            seen["later stage different"] = differing(a, b, torch.arange(a.units).split(3), compute.device)
        stage = of.new(settings, base.config, on_gpu, None, 1)
        tokens = of.tokens([near], selection.index_K, of.recompute(settings, base.config, on_gpu, compute))
        run = folder / f"{kind} {place}"
        run.mkdir()
        trainer = StageTrainer(
            stage, tokens, tokens, settings, number=1, folder=run, compute=compute, log=MetricsLog(run / "log.jsonl"),
            log_size=0,
        )  # fmt: skip
        assert trainer._run_epoch()  # the optimizer makes its state
        trainer.epoch, trainer.step, steps = 2, 0, trainer.steps_per_epoch
        with pretend_gpu.ledger() as ledger:
            assert trainer._run_epoch()
        assert trainer.step == steps
        seen |= {
            "steps": steps,
            "syncs": [sync.line.function for sync in ledger.syncs],
            "to the host": [copy.line.function for copy in ledger.copies if copy.direction == "d2h"],
            "to the device": [
                f"{copy.line.function}, {'pinned' if copy.pinned else 'pageable'}, "
                f"{'non-blocking' if copy.non_blocking else 'blocking'}"
                for copy in ledger.copies
                if copy.direction == "h2d"
            ],
        }
        found[place] = seen
    return found


def main(base: str, texts: str, folder: str) -> None:
    import pretend_gpu

    settings = {
        "base": base, "dataset": texts, "general_dataset": "none", "seq_len": 32, "train_tokens": 800,
        "val_tokens": 300, "test_tokens": 0, "layers_per_stage": 2, "epochs": 2, "batch_tokens": 80, "lr": 1e-3,
        "warmup_steps": 2, "store_dtype": "float32", "seed": 7,
    }  # fmt: skip
    pretend_gpu.install(card="t4", poison=True, late_copies=True)
    with pretend_gpu.as_cuda():
        found = {kind: of_a_kind(kind, settings, Path(folder)) for kind in KINDS}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
