"""Runs of several processes, one after the other: ``several_worker.py FILE`` in each.

FILE is a JSON list of settings. With ``stop_at`` the last process gets a SIGTERM in that step of the first stage. How
often gradients were summed over the processes stands in ``FILE.sums``, a number for each run.
"""

import contextlib
import json
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cascade_fast.cascade import run_cascade
from cascade_fast.command_line import together
from cascade_fast.runtime.processes import Processes
from cascade_fast.settings import make_settings
from cascade_fast.training import data_parallel
from cascade_fast.training.trainer import Interrupted, Trainer


def main() -> None:
    whole_step, file = Trainer.train_step, Path(sys.argv[1])
    sums: list[int] = []
    data_parallel._sum = _counting(data_parallel._sum, sums)
    with together() as these:
        for given in json.loads(file.read_text()):
            sums.append(0)
            Trainer.train_step = _stopping(whole_step, these, given.pop("stop_at", None))
            with contextlib.suppress(Interrupted):
                run_cascade(make_settings(given))
        if these.first:
            file.with_suffix(".sums").write_text(json.dumps(sums))


def _counting(hook, sums: list[int]):
    def counted(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sums[-1] += 1
        return hook(state, bucket)

    return counted


def _stopping(whole_step, these: Processes, stop_at: int | None):
    steps = [0]

    def train_step(self, picked):
        steps[0] += 1
        if steps[0] == stop_at and these.rank == these.count - 1:
            signal.raise_signal(signal.SIGTERM)
        return whole_step(self, picked)

    return train_step


if __name__ == "__main__":
    main()
