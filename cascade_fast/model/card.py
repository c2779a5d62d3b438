"""The model card (``README.md``) of a cascade, made from its configuration and the license that its base states."""

import re
from pathlib import Path
from typing import Any

import yaml

from cascade_fast.base.model import SMOLLM2, SMOLLM2_HUB_ID
from cascade_fast.criteria import score_label
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.runtime.console import format_count, literal, markdown_table
from cascade_fast.stages.kind import get_kind

_RECIPE = (
    "preset", "dataset", "seq_len", "train_tokens", "val_tokens", "train_blocks", "val_blocks", "shuffle", "hard_ratio",
    "criterion", "stage_kind", "layers_per_stage", "init", "head", "epochs", "batch_tokens", "lr", "lr_schedule",
    "weight_decay", "optimizer", "seed",
)  # fmt: skip


def render_card(config: CascadeConfig, *, parameters: int, license: dict[str, str] | None = None) -> str:
    """The card as Markdown, with the metadata that the hub reads. ``license``: see :func:`base_license`."""
    license = license or {}
    parts = [_metadata(config, license), *_body(config, parameters, license)]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_license(config: CascadeConfig, base_folder: str | None) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of the base as its own model card has them; nothing where it
    does not say, as no license is invented."""
    if config.base.get("name") == SMOLLM2 or config.base.get("source") == SMOLLM2_HUB_ID:
        return {"license": "apache-2.0"}  # both on the hub and in the package
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(Path(base_folder or "") / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one that cannot be read
        return {}
    fields = {name: found.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in fields.items() if isinstance(value, str)} if "license" in found else {}


def _metadata(config: CascadeConfig, license: dict[str, str]) -> str:
    fields: dict[str, Any] = {"library_name": "cascade_fast", "pipeline_tag": "text-generation"}
    fields |= {"tags": ["cascade", "early-exit"], **license}
    hub_id = _hub_id(config)
    if hub_id is not None:
        fields["base_model"] = hub_id
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _hub_id(config: CascadeConfig) -> str | None:
    """Of the base, if it is on the hub: what came from there has a revision."""
    if config.base.get("name") == SMOLLM2:
        return SMOLLM2_HUB_ID
    return config.base.get("source") if config.base.get("revision") else None


def _body(config: CascadeConfig, parameters: int, license: dict[str, str]) -> list[str]:
    name = _public(config.base.get("name") or config.base_config.model_type)
    source = _public(config.base.get("source") or "source unknown")
    held = "base and stages" if config.self_contained else "the stages; the base is fetched by name and checked"
    return [
        f"# CASCADE on {name}",
        f"A frozen language model with {len(config.stages)} stage(s){_stages(config)}. Every token leaves at the "
        "first exit where it is no longer hard, with the logits of that exit. It always passes the whole base first: a "
        "cascade costs more than its base, never less.",
        markdown_table(
            ["", ""],
            [
                ["base", f"{name} ({source}), {config.num_hidden_layers} layers{_bits(config)}"],
                ["base fingerprint", _fingerprint(config.base.get("fingerprint"))],
                ["license of the base", literal(license.get("license", "not known here: see the base"))],
                ["parameters", f"{parameters:,} ({format_count(parameters)})"],
                ["this folder holds", held],
            ],
        ),
        "## Exits",
        markdown_table(
            ["stage", "layers", "a token enters if its score is at or below"],
            [[str(n), str(s["layers"]), f"{s['threshold']:.4f}"] for n, s in enumerate(config.stages, 1)],
        ),
        f"Score: {score_label(config.criterion)}; low = hard.",
        *_measured(config),
        *_settings(config),
        "## Use",
        "```python\nimport cascade_fast\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its hub id\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer("Python is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))\n"
        "print(model(**inputs, output_exits=True).exits)  # 0: the base, k: stage k\n```",
    ]


def _stages(config: CascadeConfig) -> str:
    return f", {get_kind(config.kind).describe(config.stage_config(1))}" if config.stages else ""


def _bits(config: CascadeConfig) -> str:
    return "" if config.quantization == "none" else f", in 4 bit ({config.quantization})"


def _measured(config: CascadeConfig) -> list[str]:
    rows = [
        [split, f"{m['tokens']:,}", f"{m['base_ppl']:.4f}", f"{m['cascade_ppl']:.4f}",
         f"{m['cascade_ppl'] / m['base_ppl'] - 1:+.2%}"]
        for split, m in sorted(config.measured.items(), reverse=True)
    ]  # fmt: skip
    if not rows:
        return []
    note = "Over all tokens, each at its own exit."
    if "validation" in config.measured:
        note += " Validation chose epochs and stages."
    if "test" in config.measured:
        note += " Test was looked at once, at the end."
    return [
        "## Measured",
        markdown_table(["split", "tokens", "base perplexity", "cascade perplexity", "change"], rows),
        note,
    ]


def _settings(config: CascadeConfig) -> list[str]:
    rows = [[name, _public(str(config.settings[name]))] for name in _RECIPE if config.settings.get(name) is not None]
    return ["## Data and settings", markdown_table(["setting", "value"], rows)] if rows else []


def _fingerprint(value: str | None) -> str:
    text = value or "unknown"
    return f"`{text}`" if re.fullmatch(r"\w+", text) else literal(text)


def _public(name: str) -> str:
    """For Markdown; of a folder or file only the last part: where it lay on the machine of training tells nobody
    anything."""
    return literal(Path(name).name if name.startswith(("/", ".", "~")) else name)
