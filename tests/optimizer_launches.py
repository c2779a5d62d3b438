"""Counts the launches of an optimizer's step on the pretend card; a program, as that card cannot be removed again.

Prints ``{case: launches}``. A step of the whole trainer that waits for the device ends it with an error.
"""

import json

import pretend_gpu
import torch

gpu = pretend_gpu.install(card="t4")

from test_launches import as_on_a_card, launches_of  # noqa: E402

from cascade_fast.runtime.compute import Compute  # noqa: E402
from cascade_fast.settings import make_settings  # noqa: E402
from cascade_fast.training.trainer import Trainer  # noqa: E402

# As many tensors as seven layers of SmolLM2 have, and small ones: torch takes 65,536 elements of a list at once, and
# starts as many kernels as that needs.
LAYER = [(72, 72), (24, 72), (24, 72), (72, 72), (192, 72), (192, 72), (72, 192), (72,), (72,)]
CASES = {
    "adamw float16 clip": ("adamw", torch.float16, 1.0),
    "adamw float16": ("adamw", torch.float16, 0.0),
    "adamw float32 clip": ("adamw", torch.float32, 1.0),
    "adamw float32": ("adamw", torch.float32, 0.0),
    "adamw8bit float16 clip": ("adamw8bit", torch.float16, 1.0),
    "adamw8bit float32": ("adamw8bit", torch.float32, 0.0),
}


class Model(torch.nn.Module):
    """Weights that the loss depends on, all of them."""

    def __init__(self, device):
        super().__init__()
        shapes = [*LAYER * 7, (72,)]
        self.weights = torch.nn.ParameterList([torch.full(shape, 0.01).to(device) for shape in shapes])
        self.head = torch.full((16, 72), 0.01).to(device)

    def forward(self, x_MD):
        x_MD = x_MD * sum(w.mean() for w in self.weights)
        return x_MD, x_MD


class Batches:
    batches_differ, units = False, 8

    def __len__(self):
        return self.units

    def units_of(self, tokens):
        return tokens

    def count(self, picked):
        return len(picked)

    def batches(self, picks, device):
        for picked in picks:
            labels_M = torch.zeros(len(picked), dtype=torch.int64, device=device)
            yield torch.ones(len(picked), 72, device=device), labels_M


def launches(optimizer, dtype, clip) -> int:
    device = torch.device("cuda", 0)
    settings = make_settings({"preset": "warm", "batch_tokens": 4, "optimizer": optimizer, "grad_clip": clip})
    compute = Compute(device, dtype)
    trainer = Trainer(Model(device), Batches(), Batches(), settings, name="stage", number=1, compute=compute)
    picked = torch.arange(4)
    trainer.train_step(picked)  # makes the state
    with pretend_gpu.forbid_syncs():
        trainer.train_step(picked)
        for p in trainer.parameters:
            p.grad = torch.full_like(p, 0.5)
        with pretend_gpu.ledger() as led:
            trainer._folded_step([p.grad for p in trainer.parameters])
    return sum(launches_of(kernel, "append") for kernel in led.kernels)


if __name__ == "__main__":
    with pretend_gpu.as_cuda():
        as_on_a_card()
        print(json.dumps({name: launches(*case) for name, case in CASES.items()}))
