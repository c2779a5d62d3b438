"""What the tests of second looks begin with: the base's pass, a copy of its last layers, or adapters of them."""

import dataclasses
from pathlib import Path

import torch
from conftest import byte_tokenizer, tiny_llama_config
from test_stage import FAMILIES
from torch import nn

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.criteria import get_criterion
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.stages.kind import base_needs
from cascade_fast.stages.lora import lend
from cascade_fast.stages.second_look import KIND, SecondLookConfig, SecondLookLayer, SecondLookStage

CPU = torch.device("cpu")
HOW = {"criterion": get_criterion("entropy"), "compute": Compute(CPU, torch.float32)}
LAYERS = 2


def family_model(family: str, *, sliding_window: int | None = None) -> nn.Module:
    """A random model of one of ``FAMILIES``. Biases and norms too: zeros and ones would hide a mistake."""
    config_class, model_class, changes = FAMILIES[family]
    fields = {**tiny_llama_config().to_dict(), **changes, "model_type": config_class.model_type}
    model = model_class(config_class(**{**fields, "sliding_window": sliding_window}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def save_family_base(folder: Path, family: str) -> Path:
    """The same in a folder with a tokenizer, to be read with the ``seq_len`` of ``tiny_settings``."""
    window = 32 if family == "mistral" else None  # seq_len: the shortest that hides nothing
    family_model(family, sliding_window=window).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


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


def adapter_stage(settings, base, passed) -> SecondLookStage:
    """The first stage of a run with adapters, lent the base's layers, as it begins."""
    return KIND.new(make_settings(settings), base.config, passed, None, 1)


def lent_stage(shape: SecondLookConfig, *, quantization: str = "none", dtype=torch.float32) -> SecondLookStage:
    """A stage with adapters, lent random layers in ``dtype`` or in 4 bit. B is not zero."""
    stage = SecondLookStage(shape, head_VD=torch.zeros(shape.vocab_size, shape.hidden_size))
    full = dataclasses.replace(shape, lora=None)
    layers = nn.ModuleList(SecondLookLayer(full) for _ in range(shape.layers)).to(dtype)
    if quantization == "nf4":
        for name, module in list(layers.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(layers.get_submodule(parent), child, _in_4_bit(module))
    together = {} if quantization == "none" else None
    norm = full.norm(shape.hidden_size).requires_grad_(False)
    stage.updates = lend(layers.requires_grad_(False), norm, stage, together)
    return stage


def _in_4_bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    how = {"quant_type": "nf4", "compress_statistics": False}
    made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, **how)
    made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **how)
    return made.to("cpu")  # which quantises it


def draw_updates(stage: nn.Module, *, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """``stage`` with random A and B in place of those it begins with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return stage
