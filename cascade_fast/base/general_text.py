"""Other text: what a run does not train on, read once at its end, to tell what training did to the model on it."""

from typing import Any

from cascade_fast.base.sequences import Sequences
from cascade_fast.settings import RunSettings


def load_general(settings: RunSettings, tokenizer: Any) -> Sequences | None:
    """None where there is no such text."""
    return None
