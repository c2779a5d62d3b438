"""What a run starts from: its base and its text."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cascade_fast.base.general_text import load_general
from cascade_fast.base.model import BaseModel, check_cache
from cascade_fast.base.splits import SplitSequences
from cascade_fast.base.texts import load_sequences
from cascade_fast.runtime.compute import Compute, keep_freed_memory, release_memory
from cascade_fast.runtime.console import working
from cascade_fast.runtime.processes import processes
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import find_base_for_stages, with_layers
from cascade_fast.training.prompt_samples import check_prompts


@dataclass(frozen=True)
class RunInputs:
    """``settings``: with what base and text settle of them."""

    settings: RunSettings
    base: BaseModel
    tokenizer: Any
    sequences: SplitSequences


def read_inputs(settings: RunSettings, compute: Compute) -> RunInputs:
    """Finds the base and reads the text. Of several processes the first one downloads and converts.

    Raises:
        InputError: a base, a text or a setting that cannot be used.
    """
    these = processes()
    if compute.device.type == "cpu":
        keep_freed_memory()
    check_cache(settings)
    with working("finding the base and reading its weights, for its fingerprint"), these.first_before_others():
        base = find_base_for_stages(settings)
    settings = with_layers(settings, base.config)
    tokenizer = base.tokenizer()
    check_prompts(settings, base, tokenizer)
    with working("reading the text and making tokens of it"), these.first_before_others():
        sequences = load_sequences(settings, tokenizer)
        sequences = dataclasses.replace(sequences, general=load_general(settings, tokenizer))
    release_memory()  # of tokenization
    return RunInputs(sequences.settle(settings), base, tokenizer, sequences)
