"""``samples.json``: how base and cascade of a finished run write on from some validation text.

The text is that of ``heat_map.json``, so that nothing but the run's folder and its base is needed.
"""

from pathlib import Path
from typing import Any

from cascade_fast.criteria import model_criteria
from cascade_fast.model.continuation import continue_texts
from cascade_fast.model.loading import load_model
from cascade_fast.records import routed_by
from cascade_fast.reporting.heat_map import read_heat_map, read_record
from cascade_fast.runtime.files import write_json
from cascade_fast.runtime.run_folder import read_results

FILE = "samples.json"
FORMAT = 1
SAMPLES = 3
PROMPT_TOKENS = 32
NEW_TOKENS = 40


def make_samples(folder: Path, device: str = "auto") -> bool:
    """Writes ``samples.json`` into the folder of a finished run, unless it is there; whether it was written.

    A run that kept no stage, or whose criterion no model can be run by, has nothing to show.

    Raises:
        InputError: the run's files are damaged or its base is not found.
    """
    results = read_results(folder)
    content = read_heat_map(folder)
    prompts = [] if content is None else sample_prompts(content)
    if (
        (folder / FILE).exists()
        or not prompts
        or results.final.stages_kept == 0
        or routed_by(results.settings) not in model_criteria()
    ):
        return False
    model, tokenizer = load_model(str(folder), device=device, dtype="auto", base_path=None)
    base, cascade = (
        continue_texts(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, base_alone=alone, special_tokens=False)
        for alone in (True, False)
    )
    samples = [
        {"prompt": before.prompt, "base": before.text, "cascade": after.text}
        for before, after in zip(base, cascade, strict=True)
    ]
    write_json(folder / FILE, {"format": FORMAT, "samples": samples})
    return True


def sample_prompts(heat_map: dict[str, Any]) -> list[str]:
    """The first tokens of ``SAMPLES`` sequences, spread over those of the heat map; half of a short one. Where some
    begin with context, as with a user's question, all of that: what is written on is the answer."""
    blocks = heat_map["blocks"]
    blocks = [block for block in blocks if block["exits"][0] is None] or blocks
    picked = blocks[:: max(1, len(blocks) // SAMPLES)][:SAMPLES]
    prompts = ["".join(block["texts"][: _prompt_tokens(block)]) for block in picked]
    return [prompt for prompt in prompts if prompt]


def _prompt_tokens(block: dict[str, Any]) -> int:
    if block["exits"][0] is not None:
        return min(PROMPT_TOKENS, len(block["texts"]) // 2)
    # The first prediction that counts is of the text one further on.
    return 1 + next((n for n, exit_ in enumerate(block["exits"]) if exit_ is not None), len(block["exits"]))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run; none if it has no such file.

    Raises:
        InputError: a file that is damaged, or of another format.
    """
    content = read_record(folder / FILE, FORMAT, needs=("samples",))
    return [] if content is None else content["samples"]
