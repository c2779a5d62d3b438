"""What the tests of second looks begin with: the base's pass, and a copy of its last layers."""

import torch

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.criteria import get_criterion
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.stages.kind import base_needs
from cascade_fast.stages.second_look import SecondLookConfig, SecondLookStage

CPU = torch.device("cpu")
HOW = {"criterion": get_criterion("entropy"), "compute": Compute(CPU, torch.float32)}
LAYERS = 2


def passed_by_base(settings, tmp_path, **changes):
    """The base, its blocks, and its pass over them."""
    settings = make_settings({**settings, **changes})
    base = find_base(settings)
    blocks = load_sequences(settings, base.tokenizer())
    passed = base_pass(base, blocks, settings, base_needs(settings), HOW["compute"], tmp_path / "cache")
    return base, blocks, passed


def copied_stage(base, passed, *, noise=0.0, seed=0) -> SecondLookStage:
    """A copy of the base's last layers, with ``noise`` in its weights."""
    shape = SecondLookConfig.from_base(base.config, layers=LAYERS)
    weights = {**passed.layers, "norm.weight": passed.norm_D}
    stage = SecondLookStage(shape, head_VD=passed.head_VD, weights=weights)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return stage.eval()
