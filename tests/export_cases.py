"""What the tests of exports begin with: random bases, finished runs of one second look, and their logits."""

import math
from pathlib import Path

import torch
from conftest import byte_tokenizer, tiny_llama_config
from test_stage import FAMILIES
from transformers import AutoModelForCausalLM, GenerationConfig

from cascade_fast import export as command
from cascade_fast.base.model import find_base
from cascade_fast.model import export
from cascade_fast.model.configuration import cascade_config
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.exits import ExitStage
from cascade_fast.stages.second_look import SecondLookConfig, SecondLookStage

LAYERS = 2
ENTRY = 1  # of the bases' three layers
LORA = {"rank": 4, "alpha": 6.0, "targets": [*LORA_TARGETS]}
CASES = {**FAMILIES, "llama-untied": (*FAMILIES["llama"][:2], {"tie_word_embeddings": False})}


def random_base(folder: Path, family: str, dtype=torch.float32, **more) -> Path:
    """A random model of three layers, biases and norms too, with a tokenizer. ``more``: of its configuration."""
    config_class, model_class, changes = CASES[family]
    fields = {**tiny_llama_config().to_dict(), **changes, **more, "model_type": config_class.model_type}
    if "sliding_window" in changes:
        fields["sliding_window"] = 64  # longer than the text: a second look has none
    model = model_class(config_class(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=0, temperature=0.5, do_sample=True).save_pretrained(folder)
    return folder


@torch.no_grad()
def second_look_run(
    base_folder: Path, folder: Path, *, layers: int = LAYERS, threshold: float = 3.0, lora: dict | None = None
) -> Path:
    """What a run leaves whose stage is a copy of the base's last ``layers`` layers, and noise; or has updates of them,
    all of it noise."""
    base = find_base(make_settings({"base": str(base_folder), "seq_len": 2}))
    weights = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).state_dict()
    shape = SecondLookConfig.from_base(base.config, layers=layers, lora=lora)
    stage = SecondLookStage(shape, head_VD=None)
    for name, parameter in stage.named_parameters():
        if lora is None:
            parameter.copy_(weights[export.name_in_base(name, shape.entry_layer)] + 0.05 * torch.randn(parameter.shape))
        else:
            parameter.normal_(std=0.3)
    kept = [ExitStage(stage, threshold)]
    kept[0].save(folder / "stages" / "1")
    settings = {"base": str(base_folder), "out": str(folder), "dataset": "texts", "hard_ratio": 0.6}
    measured = {"test": {"tokens": 10, "base_ppl": 4.0, "cascade_ppl": 3.0}}
    config = cascade_config(base, kept, criterion="entropy", settings=settings, measured=measured, dtype="float32")
    config.save_pretrained(folder)
    return folder


def open_logits(cascade: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the cascade with every token in its stage."""
    model = CascadeForCausalLM.from_pretrained(cascade, dtype=torch.float32)
    return model(ids, thresholds=[math.inf]).logits


def plain_logits(folder: Path, ids: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05  # logits that say something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def run_export(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()  # what came before
    code = command.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
