"""The model card (``README.md``) of a cascade or of what is exported from one, made from its configuration and the
license that its base states."""

import re
from pathlib import Path
from typing import Any

import yaml

from cascade_fast.base.model import SMOLLM2, SMOLLM2_HUB_ID
from cascade_fast.criteria import score_label
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.runtime.console import format_count, literal, markdown_table
from cascade_fast.selection import EVERY_TOKEN
from cascade_fast.stages.kind import get_kind

_RECIPE = (
    "preset", "dataset", "seq_len", "train_tokens", "val_tokens", "train_blocks", "val_blocks", "shuffle",
    "hard_ratio", "criterion", "train_criterion", "route_criterion", "stage_kind", "layers_per_stage", "init", "head",
    "epochs", "batch_tokens", "lr", "lr_schedule", "weight_decay", "optimizer", "seed",
)  # fmt: skip


def render_card(config: CascadeConfig, *, parameters: int, license: dict[str, str] | None = None) -> str:
    """The card as Markdown, with the metadata that the hub reads. ``license``: see :func:`base_license`."""
    license = license or {}
    parts = [_metadata(config, license), *_body(config, parameters, license)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_merged_card(
    config: CascadeConfig, *, model_class: str, dtype: str, parameters: int, license: dict[str, str]
) -> str:
    """The card of the plain model that a cascade of one second look is where every token enters its stage."""
    name, entry = _base_name(config), config.entry_layer
    trained = f"its layers {entry} to {config.num_hidden_layers - 1}" if entry else "all its layers"
    return _exported_card(
        config,
        license,
        title=f"{name}, a second look merged",
        what=f"A plain `{model_class}`: {name}, {trained} fine-tuned on hard tokens as a cascade's second look. It is "
        "that cascade with every token in its stage, at the cost of the base.",
        rows=[["parameters", f"{parameters:,} ({format_count(parameters)}), {dtype}"]],
        imports="",
        loads='model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n",
        library="transformers",
        relation="finetune",
    )


def render_adapter_card(
    config: CascadeConfig, *, fields: dict[str, Any], parameters: int, license: dict[str, str]
) -> str:
    """The card of the adapter that a cascade of one second look is. ``fields``: its ``adapter_config.json``."""
    name = _base_name(config)
    imports, how = "from peft import PeftModel\n", ""
    if config.quantization != "none":
        imports += "from transformers import BitsAndBytesConfig\n"
        how = (
            ", quantization_config=BitsAndBytesConfig(\n"
            f'    load_in_4bit=True, bnb_4bit_quant_type="{config.quantization}"\n)'
        )
    return _exported_card(
        config,
        license,
        title=f"{name}, a second look as a LoRA adapter",
        what=f"A LoRA adapter of {name}, trained on hard tokens as a cascade's second look. Base and adapter are that "
        "cascade with every token in its stage, at the cost of the base.",
        rows=[
            ["trained parameters", f"{parameters:,} ({format_count(parameters)})"],
            ["rank, alpha", f"{fields['r']}, {fields['lora_alpha']}"],
            ["linear layers", ", ".join(map(literal, fields["target_modules"]))],
            ["in layers", f"{config.entry_layer} to {config.num_hidden_layers - 1}"],
        ],
        imports=imports,
        loads=f"name = {_hub_id(config) or 'the folder of the base'!r}\n"
        f"base = AutoModelForCausalLM.from_pretrained(name{how})\n"
        "model = PeftModel.from_pretrained(base, folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)\n",
        library="peft",
        relation="adapter",
    )


def _exported_card(
    config: CascadeConfig,
    license: dict[str, str],
    *,
    title: str,
    what: str,
    rows: list[list[str]],
    imports: str,
    loads: str,
    library: str,
    relation: str,
) -> str:
    # Those of the run are of the cascade at its threshold; they are this model's where every token passes that.
    measured = _measured(config) if config.thresholds[0] >= EVERY_TOKEN else []
    rows = [*_base_rows(config, license), *rows, ["layers a token", f"{config.num_hidden_layers}, as the base"]]
    parts = [
        _metadata(config, license, library=library, tags=("cascade",), relation=relation),
        f"# {title}",
        what,
        markdown_table(["", ""], rows),
        *measured,
        *_settings(config),
        "## Use",
        f"```python\n{imports}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "."  # this folder, or its hub id\n{loads}'
        'inputs = tokenizer("Python is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))\n```",
    ]
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


def _metadata(
    config: CascadeConfig,
    license: dict[str, str],
    *,
    library: str = "cascade_fast",
    tags: tuple[str, ...] = ("cascade", "early-exit"),
    relation: str | None = None,
) -> str:
    """What the hub reads. ``relation``: to the base, as the hub names it."""
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": [*tags], **license}
    hub_id = _hub_id(config)
    if hub_id is not None:
        fields["base_model"] = hub_id
        fields |= {} if relation is None else {"base_model_relation": relation}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _hub_id(config: CascadeConfig) -> str | None:
    """Of the base, if it is on the hub: what came from there has a revision."""
    if config.base.get("name") == SMOLLM2:
        return SMOLLM2_HUB_ID
    return config.base.get("source") if config.base.get("revision") else None


def _body(config: CascadeConfig, parameters: int, license: dict[str, str]) -> list[str]:
    name = _base_name(config)
    held = "base and stages" if config.self_contained else "the stages; the base is fetched by name and checked"
    return [
        f"# CASCADE on {name}",
        f"A frozen language model with {len(config.stages)} stage(s){_stages(config)}. Every token leaves at the "
        "first exit where it is no longer hard, with the logits of that exit. It always passes the whole base first: a "
        "cascade costs more than its base, never less.",
        markdown_table(
            ["", ""],
            [
                *_base_rows(config, license),
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


def _base_name(config: CascadeConfig) -> str:
    return _public(config.base.get("name") or config.base_config.model_type)


def _base_rows(config: CascadeConfig, license: dict[str, str]) -> list[list[str]]:
    source = _public(config.base.get("source") or "source unknown")
    return [
        ["base", f"{_base_name(config)} ({source}), {config.num_hidden_layers} layers{_bits(config)}"],
        ["base fingerprint", _fingerprint(config.base.get("fingerprint"))],
        ["license of the base", literal(license.get("license", "not known here: see the base"))],
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
