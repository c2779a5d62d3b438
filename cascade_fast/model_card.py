"""The model card (``README.md``) of a cascade, made from its configuration alone."""

from pathlib import Path

from cascade_fast.configuration import CascadeConfig
from cascade_fast.metrics import format_count, markdown_table

_RECIPE = (
    "preset", "dataset", "seq_len", "train_blocks", "val_blocks", "hard_ratio", "criterion", "stage_kind",
    "layers_per_stage", "init", "head", "epochs", "batch_tokens", "lr", "lr_schedule", "weight_decay", "optimizer",
    "seed",
)  # fmt: skip
_CRITERIA = {"entropy": "minus the entropy of the logits, in nats", "cosine": "cosine between what goes in and out"}


def render_card(config: CascadeConfig, *, parameters: int) -> str:
    """The card as Markdown, with the metadata that the hub reads."""
    return "\n\n".join(part for part in (_metadata(config), *_body(config, parameters)) if part) + "\n"


def _metadata(config: CascadeConfig) -> str:
    lines = ["library_name: cascade_fast", "pipeline_tag: text-generation", "tags: [cascade, early-exit]"]
    source = config.base.get("source") or ""
    if source.count("/") == 1 and " " not in source and not source.startswith((".", "/", "~")):
        lines.append(f"base_model: {source}")
    return "\n".join(["---", *lines, "---"])


def _body(config: CascadeConfig, parameters: int) -> list[str]:
    name = _public(config.base.get("name") or config.base_config.model_type)
    source = _public(config.base.get("source") or "source unknown")
    held = "base and stages" if config.self_contained else "the stages; the base is fetched by name and checked"
    return [
        f"# CASCADE on {name}",
        f"A frozen language model with {len(config.stages)} stage(s), {_stages(config)}. Every token leaves at the "
        "first exit where it is no longer hard, with the logits of that exit. It always passes the whole base first: a "
        "cascade costs more than its base, never less.",
        markdown_table(
            ["", ""],
            [
                ["base", f"{name} ({source}), {config.num_hidden_layers} layers{_bits(config)}"],
                ["base fingerprint", f"`{config.base.get('fingerprint', 'unknown')}`"],
                ["parameters", f"{parameters:,} ({format_count(parameters)})"],
                ["this folder holds", held],
            ],
        ),
        "## Exits",
        markdown_table(
            ["stage", "layers", "a token enters if its score is at or below"],
            [[str(n), str(s["layers"]), f"{s['threshold']:.4f}"] for n, s in enumerate(config.stages, 1)],
        ),
        f"Score: {_CRITERIA[config.criterion]}; low = hard.",
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
    if config.kind == "second-look":
        return f"copies of its last {config.stages[0]['layers']} layers trained to read its *hard* tokens again"
    return "new layers trained on its *hard* tokens"


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


def _public(name: str) -> str:
    """A folder's or file's last part: where it lay on the machine of training tells nobody anything."""
    return Path(name).name if name.startswith(("/", ".", "~")) else name
