"""The launches of a layer that the plan counts with are those of a training step on a pretend card.

Run as a script it counts: what it prints belongs into ``LAYER_LAUNCHES``.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRESETS = {"append": "warm", "second look": "second-look", "adapters": "lora"}


def count() -> dict[str, float]:
    """Launches of a layer: of steps with three layers less those with one."""
    import pretend_gpu

    pretend_gpu.install(card="t4")
    from transformers import LlamaConfig

    from benchmarks.workload import preset_trainer, steps_of

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500, tie_word_embeddings=True,
    )  # fmt: skip
    found = {}
    with pretend_gpu.as_cuda(), tempfile.TemporaryDirectory() as folder:
        for kind, preset in PRESETS.items():
            launches = []
            for layers in (1, 3):
                changes = {"layers_per_stage": layers, "batch_tokens": 256}
                trainer = preset_trainer(preset, Path(folder) / f"{kind}{layers}", "cuda", config, 4, **changes)
                step = steps_of(trainer, 1)
                step()  # the first one also makes the optimizer's state
                with pretend_gpu.ledger() as ledger:
                    step()
                launches.append(ledger.launches)
            found[kind] = (launches[1] - launches[0]) / 2
    return found


@pytest.mark.skipif(importlib.util.find_spec("pretend_gpu") is None, reason="pretend_gpu is not on the path")
def test_the_plan_knows_the_launches_of_a_layer():
    from cascade_fast.stages.counts import LAYER_LAUNCHES

    paths = [str(ROOT), *sys.path]  # as here
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted == pytest.approx(LAYER_LAUNCHES, rel=0.1), "LAYER_LAUNCHES in cascade_fast/stages/counts.py"


if __name__ == "__main__":
    print(json.dumps(count()))
