"""Steps that are recorded and replayed: they are the plain ones.

``Recorder`` does on the CPU what a CUDA graph does on a GPU: it keeps the operators of one step, with the memory that
they read and write and the numbers that they were given, and runs these again. What a step reads beside them is lost.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import english_texts
from cuda_cases import ROOT, needs_pretend_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import hardest_of_store
from cascade_fast.stages.kind import base_needs, find_base_for_stages, get_kind
from cascade_fast.training.adamw import AdamW
from cascade_fast.training.graphs import CudaRecorder, StepGraphs, check_graphs
from cascade_fast.training.optimizers import set_learning_rate
from cascade_fast.training.stage_trainer import StageTrainer

LOOK = {"stage_kind": "second-look"}
KINDS = {
    "append": {},
    "append, a head of its own": {"init": "random", "head": "own"},  # and parameters that only decay
    "second look": {**LOOK, "kv": "store"},
    "second look, recompute": {**LOOK, "kv": "recompute"},
    "adapters, every token": {**LOOK, "adapter": "lora", "lora_rank": 4, "hard_ratio": 1.0},
}
CPU = torch.device("cpu")


class _Taped(TorchDispatchMode):
    """Keeps every operator that runs, and what memory was before any of them wrote to it."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made: dict[int, torch.UntypedStorage] = {}  # within the step

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a number"
        written = func._schema.is_mutable
        if written:
            names = [a.name for a in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tree_flatten(given.get(argument.name))[0]:
                        self._keep(tensor)
        out = func(*args, **kwargs)
        tensors = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        read = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        fresh = [t for t in tensors if t.untyped_storage().data_ptr() not in read]
        for tensor in fresh:
            self.made[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        if written or fresh:  # else it is a view
            self.tape.append((func, args, kwargs, out if fresh else None))
        return out

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
            self.before[storage.data_ptr()] = (storage, storage.clone())


class Recorder:
    def __init__(self) -> None:
        self.runs, self.records, self.replays = 0, 0, 0

    def run(self, step) -> None:
        self.runs += 1
        step()

    def record(self, step):
        self.records += 1
        with _Taped() as taped:
            step()
        for storage, before in taped.before.values():
            storage.copy_(before)  # nothing has happened
        for storage in taped.made.values():
            torch.tensor([], dtype=torch.uint8).set_(storage).fill_(255)  # NaN

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, out in taped.tape:
                again = func(*args, **kwargs)
                if out is not None:
                    tree_map(lambda o, a: o.copy_(a) if isinstance(o, torch.Tensor) else o, out, again)

        return torch.no_grad()(replay)


def trainers(tiny_base, folder: Path, kind: str, device=CPU, dtype=torch.float32) -> list[StageTrainer]:
    """Two of the same, on texts of several lengths, which share rows of a pack."""
    folder.mkdir(parents=True)
    texts = folder / "texts.jsonl"
    rows = [{"text": text[: 9 + 7 * (i % 4)]} for i, text in enumerate(english_texts(60, 40))]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = make_settings({
        "base": str(tiny_base), "dataset": str(texts), "general_dataset": "none", "seq_len": 32, "train_tokens": 700,
        "val_tokens": 200, "test_tokens": 0, "layers_per_stage": 2, "epochs": 2, "batch_tokens": 80, "lr": 1e-3,
        "warmup_steps": 2, "store_dtype": "float32", "device": "cpu", "seed": 7, "store": "host", **KINDS[kind],
    })  # fmt: skip
    base = find_base_for_stages(settings)
    sequences = load_sequences(settings, base.tokenizer())
    settings, here = sequences.settle(settings), Compute(CPU, torch.float32)
    of, compute, made = get_kind(settings.stage_kind), Compute(device, dtype), []
    for number in range(2):
        passed = base_pass(base, sequences, settings, base_needs(settings), here, folder / "cache")
        passed = passed.to(device, layers=settings.adapter != "none")
        store = passed.stores["train"]
        tokens = of.tokens(
            [store], hardest_of_store(store, settings.hard_ratio).index_K,
            of.recompute(settings, base.config, passed, compute),
        )  # fmt: skip
        run = folder / str(number)
        run.mkdir()
        made.append(
            StageTrainer(
                of.new(settings, base.config, passed, None, 1), tokens, tokens, settings, number=1, folder=run,
                compute=compute, log=MetricsLog(run / "log.jsonl"), log_size=0,
            )
        )  # fmt: skip
        made[-1].folds = True  # as on a GPU
    return made


def record_steps(trainer: StageTrainer, recorder) -> None:
    trainer.train = trainer.train.in_buckets()
    trainer.graphs = StepGraphs(trainer.step_on_tensors, trainer.optimizer, trainer.device, recorder)


def compare(plain: StageTrainer, graphs: StageTrainer, epochs: int, tolerance: float = 1e-6) -> None:
    """Epochs of both."""
    for epoch in range(1, epochs + 1):
        for trainer in (plain, graphs):
            trainer.epoch, trainer.step = epoch, 0
            assert trainer._run_epoch()
        torch.testing.assert_close(graphs.totals, plain.totals, rtol=tolerance, atol=0)
        assert graphs.totals[1:].tolist() == plain.totals[1:].tolist()
    for (name, ours), theirs in zip(graphs.module.named_parameters(), plain.module.parameters(), strict=True):
        assert ours.isfinite().all()
        # What gradients near 0 differ by, AdamW makes as large as a part of its step.
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=3e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_are_the_plain_ones(tiny_base, tmp_path, kind):
    plain, graphs = trainers(tiny_base, tmp_path / "runs", kind)
    recorder = Recorder()
    record_steps(graphs, recorder)
    compare(plain, graphs, 3)
    assert recorder.replays > graphs.steps_per_epoch
    assert recorder.runs + recorder.replays == 3 * graphs.steps_per_epoch


def test_recorded_steps_of_our_adamw(tiny_base, tmp_path):
    """The optimizer of a GPU that has its operator: on the CPU plain torch."""
    plain, graphs = trainers(tiny_base, tmp_path / "runs", "second look")
    for trainer in (plain, graphs):
        trainer.optimizer = AdamW(trainer.parameters, trainer.settings.lr, trainer.settings.weight_decay)
    recorder = Recorder()
    record_steps(graphs, recorder)
    compare(plain, graphs, 3)
    assert recorder.replays > graphs.steps_per_epoch


def test_a_number_of_the_first_step_would_show(tiny_base, tmp_path):
    """That the comparison finds what a graph would keep: here a learning rate that is no tensor."""
    plain, graphs = trainers(tiny_base, tmp_path / "runs", "append")
    record_steps(graphs, Recorder())
    step = graphs.step_on_tensors

    def with_a_number(inputs, label_M, count, lr) -> None:
        set_learning_rate(graphs.optimizer, graphs._learning_rate(graphs.step))
        step(inputs, label_M, count, lr)

    graphs.graphs.step = with_a_number
    with pytest.raises(AssertionError, match="not close"):
        compare(plain, graphs, 3)


def test_packs_are_filled_up_to_few_sizes(tiny_base, tmp_path):
    tokens = trainers(tiny_base, tmp_path / "runs", "second look")[0].train
    picks = [torch.arange(tokens.units)[i : i + 5] for i in range(tokens.units - 5)]
    sizes, filled = [set(), set()], 0
    for of, found in zip((tokens, tokens.in_buckets()), sizes, strict=True):
        for picked, (pack, label_K) in zip(picks, of.batches(picks, CPU), strict=True):
            found.add((len(label_K), pack.queries, pack.shape, pack.begin_K is None))
            filled += len(label_K) > of.count(picked)
            assert len(set(pack.slot_K.tolist())) == len(set(pack.row_K.tolist())) == len(label_K)
            assert pack.slot_K.max() < pack.shape[0] * pack.queries
    assert filled > len(picks) / 2
    assert len(sizes[1]) < len(sizes[0])


@pytest.mark.parametrize(
    ("device", "micro", "settings", "named"),
    [
        ("cpu", 512, {}, "device: 'cpu'; must be a GPU"),
        ("cuda", 512, {"optimizer": "adamw8bit"}, "optimizer: 'adamw8bit'; must be adamw"),
        ("cuda", 100, {}, "a batch of 512 tokens in parts of 100"),
        ("cuda", 512, {"preset": "lora", "base_quantization": "nf4"}, "base_quantization: 'nf4'; must be none"),
    ],
)
def test_what_cannot_be_recorded_is_named(device, micro, settings, named):
    compute = Compute(torch.device(device), torch.float32)
    check_graphs(make_settings(settings), compute, micro)  # auto: off
    with pytest.raises(InputError, match=named):
        check_graphs(make_settings({**settings, "cuda_graph": "on"}), compute, micro)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_of_steps_are_the_plain_steps(tiny_base, tmp_path, kind, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    plain, graphs = trainers(tiny_base, tmp_path / "runs", kind, device, dtype)
    record_steps(graphs, CudaRecorder(device))
    compare(plain, graphs, 3, 1e-4 if dtype == torch.float32 else 1e-2)
    assert graphs.graphs.recorded


@needs_pretend_gpu
def test_steps_of_filled_packs_on_a_pretend_card(tiny_base, tmp_path):
    """Its copies from the host arrive late, its memory is NaN until it is written."""
    arguments = [__file__, str(tiny_base), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Beside the graph: two numbers set, and two or seven tensors of the batch copied.
    for kind, launches in (("append", 4), ("second look", 9)):
        assert found[kind] == {"launches": launches, "syncs": []}


# --- in a process of its own ------------------------------------------------------------------------------------------


class Closures(Recorder):
    """Calls the step again, as the pretend card knows no graphs; counts what is launched within."""

    launches = 0

    def record(self, step):
        import pretend_gpu

        self.records += 1

        def replay() -> None:
            self.replays += 1
            with pretend_gpu.ledger() as within:
                step()
            self.launches = within.launches

        return replay


def on_a_pretend_card(base: Path, folder: Path, kind: str) -> dict:
    import pretend_gpu

    plain, graphs = trainers(base, folder / kind, kind, torch.device("cuda"))
    recorder = Closures()
    record_steps(graphs, recorder)
    compare(plain, graphs, 3)
    assert recorder.replays > 4, (kind, recorder.records, recorder.replays)
    picks = list(graphs.train.chunks(80))[:1] * 3
    with graphs._ahead_of(picks):
        graphs.train_step(picks[0])  # which may be the first of its size, and the next the one that is recorded
        graphs.train_step(picks[1])
        with pretend_gpu.ledger() as ledger:
            graphs.train_step(picks[2])
    return {"launches": ledger.launches - recorder.launches, "syncs": [str(sync.line) for sync in ledger.syncs]}


def main(base: str, folder: str) -> None:
    import pretend_gpu

    pretend_gpu.install(card="t4", poison=True, late_copies=True)
    with pretend_gpu.as_cuda():
        found = {kind: on_a_pretend_card(Path(base), Path(folder), kind) for kind in ("append", "second look")}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
