"""The settings of a run: one frozen dataclass, validated when made.

Each field is a flag of ``python -m cascade_fast.train`` and a key of a ``--config`` file, under the same name.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import (
    ALL,
    InputError,
    as_field,
    check_type,
    read_settings_file,
    shown,
    suggest,
    template_parts,
)
from cascade_fast.presets import PRESETS, STAGE_KINDS


def _setting(default: Any, group: str, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **extra})


CRITERIA = ["cosine", "entropy", "random"]  # criteria.register_criterion adds to them
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BASE_QUANTIZATIONS = ("none", "nf4")
STORES = ("auto", "device", "host")
EASY_TOKENS = ("skip", "forward")
CUDA_GRAPHS = ("auto", "on", "off")
SHARDS = ("none", "fsdp")
EXIT_THRESHOLDS = ("trained", "validation")
LR_SCHEDULES = ("constant", "linear", "cosine")
LOSS_ON = ("assistant", "all")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
SPLITS = ("train", "val", "test")
GENERAL = "general"  # other text than that of training, as a part of what the base pass reads
READ = (*SPLITS, GENERAL)
# What a run takes where nothing is said, as blocks of ``seq_len`` tokens; fewer where the text has fewer.
DEFAULT_BLOCKS = {"train": 320, "val": 64, GENERAL: 64}
ADAPTERS = ("none", "lora")
# What LoRA may change: every linear layer of a decoder layer, by the names of transformers' Llama.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNITS = ("tokens", "blocks")  # that splits are counted in


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Every setting of a cascade run. Defaults are those of the preset ``warm``; see ``presets.py``.

    Raises:
        InputError: on a value out of range, before any work is done.
    """

    preset: str = _setting("warm", "run", "recipe to start from; every flag given overrides it", choices=tuple(PRESETS))
    out: str | None = _setting(None, "run", "folder of the run (default: runs/<time>-<preset>)")
    resume: str = _setting(
        "never",
        "run",
        "auto: go on with the run in --out (or the newest unfinished one under runs/)",
        choices=("never", "auto"),
    )
    seed: int = _setting(42, "run", "seed of the new layers and of the order of the tokens")
    max_minutes: float | None = _setting(
        None, "run", "stop training after this many minutes, keep the best so far and report"
    )
    checkpoint_minutes: float = _setting(5.0, "run", "save a checkpoint at least this often, besides every epoch")
    cache_dir: str | None = _setting(
        None,
        "run",
        "where converted base models and base passes are kept for later runs (default: ~/.cache/cascade_fast)",
    )
    report_to: tuple[str, ...] = _setting(
        (),
        "run",
        f"trackers that follow the run, beside metrics.jsonl: {', '.join(TRACKERS)}; several may be named",
        nargs="+",
    )
    sample_prompt: tuple[str, ...] = _setting(
        (), "run", "prompts that the cascade continues after every stage", nargs="+"
    )

    base: str = _setting("smollm2-135m", "base model", "hub id, local folder, .gguf file, or smollm2-135m")
    device: str = _setting("auto", "base model", "cpu, cuda, cuda:1, ...; auto takes a GPU when there is one")
    dtype: str = _setting(
        "auto", "base model", "compute dtype; auto takes the fastest this hardware has", choices=DTYPES
    )
    base_quantization: str = _setting(
        "none",
        "base model",
        "nf4: load the base in 4 bit for the base pass (needs bitsandbytes and accelerate)",
        choices=BASE_QUANTIZATIONS,
    )
    store_dtype: str = _setting(
        "auto",
        "base model",
        "hidden states on disk: auto takes 16 bit when the values fit",
        choices=("auto", "float32"),
    )
    store: str = _setting(
        "auto", "base model", "where a GPU reads hidden states; auto: on the device if they fit", choices=STORES
    )

    dataset: str = _setting(
        "pydoc",
        "data",
        "hub id; json, jsonl, csv, parquet or txt file, or a folder of them; or pydoc (CPython's reference text)",
    )
    general_dataset: str | None = _setting(
        None,
        "data",
        "text that is not trained on, read once at the end: did training make the model worse at it? As --dataset, or "
        "none (default: pydoc, if that is not --dataset)",
    )
    text_columns: tuple[str, ...] = _setting(
        (), "data", "columns joined by newlines to make a text (default: text, or instruction input output)", nargs="+"
    )
    text_template: str | None = _setting(
        None, "data", "text with columns' names in braces, as 'Q: {question}', instead of --text-columns"
    )
    prompt_template: str | None = _setting(
        None, "data", "as --text-template: what is only read; --completion-template then makes what is learnt"
    )
    completion_template: str | None = _setting(None, "data", "as --text-template: what follows on --prompt-template")
    chat_template: str | None = _setting(
        None, "data", "file with a Jinja chat template, instead of the base's own; for rows that are conversations"
    )
    loss_on: str = _setting(
        "assistant",
        "data",
        "what is learnt and measured of a row with a prompt: the assistant's turns or the completion; or all tokens",
        choices=LOSS_ON,
    )
    encoding: str = _setting(
        "utf-8", "data", "of .txt, .csv, .json and .jsonl files, as Python names it: latin-1, cp1252"
    )
    streaming: str = _setting(
        "off",
        "data",
        "on: rows are read one by one, as far as they are needed, and never kept on disk",
        choices=("on", "off"),
        switch=True,
    )
    shuffle: str = _setting(
        "on",
        "data",
        "on: texts are shuffled before the splits are cut, the same way for every --seed; off: the data's own order",
        choices=("on", "off"),
    )
    shuffle_buffer: int = _setting(1000, "data", "rows among which --streaming shuffles")
    seq_len: int = _setting(
        128, "data", "most tokens in a sequence; longer texts are cut, shorter ones are sequences of their own"
    )
    train_tokens: int | None = _setting(
        None,
        "data",
        "tokens to train on, in whole sequences; all: what validation and test leave (default: 320 sequences' worth, "
        "or what there is)",
        all=True,
    )
    val_tokens: int | None = _setting(
        None,
        "data",
        "tokens for early stopping and acceptance (default: 64 sequences' worth, or a seventh of what there is)",
    )
    test_tokens: int | None = _setting(
        None,
        "data",
        "tokens read once, at the end (default: as many as validation if the data has them, else what is left); all: "
        "what training and validation leave",
        all=True,
    )
    train_blocks: int | None = _setting(
        None,
        "data",
        "instead of --train-tokens: blocks of exactly --seq-len tokens, shorter sequences are left out; or all",
        all=True,
    )
    val_blocks: int | None = _setting(None, "data", "instead of --val-tokens: such blocks")
    test_blocks: int | None = _setting(None, "data", "instead of --test-tokens: such blocks; or all", all=True)

    hard_ratio: float = _setting(0.6, "selection", "share of the tokens that is hard, in (0, 1]")
    criterion: str = _setting(
        "entropy",
        "selection",
        "what makes a token hard: low cosine between input and output, or high entropy of the logits; random: chance, "
        "a baseline",
        choices=CRITERIA,
    )
    val_selection: str = _setting(
        "threshold",
        "selection",
        "validation's hard tokens: by the training threshold, or by validation's own quantile",
        choices=("threshold", "quantile"),
    )
    easy_tokens: str = _setting(
        "skip",
        "selection",
        "in training they skip the stage; or they go forward through it, without gradients, for a plain model that all "
        "tokens enter",
        choices=EASY_TOKENS,
    )

    num_stages: int = _setting(2, "stages", "stages to train at most")
    stage_kind: str = _setting(
        "append",
        "stages",
        "; ".join(f"{name}: {kind.help}" for name, kind in STAGE_KINDS.items()),
        choices=STAGE_KINDS,
    )
    layers_per_stage: int = _setting(
        8, "stages", "decoder layers in each stage; all: as many as the base has", all=True
    )
    kv: str = _setting(
        "auto",
        "stages",
        "the base's keys and values for a second look: kept on disk by the base pass, or recomputed for every batch by "
        "a frozen copy of the layers; auto takes what the plan finds cheaper",
        choices=("auto", "store", "recompute"),
    )
    init: str = _setting(
        "identity",
        "stages",
        "identity: a stage starts as the base's own last step; random: as a new model",
        choices=("identity", "random"),
    )
    head: str = _setting(
        "shared", "stages", "output head: the base's own, frozen, or a new trained one", choices=("shared", "own")
    )
    adapter: str = _setting(
        "none",
        "stages",
        "none: all weights of a stage are trained; lora: a second look's layers are the base's own, frozen, with "
        "trained low-rank updates",
        choices=ADAPTERS,
    )
    lora_rank: int = _setting(16, "stages", "rank of the updates")
    lora_alpha: float = _setting(32.0, "stages", "updates are scaled by alpha / rank")
    lora_targets: tuple[str, ...] = _setting(
        (), "stages", f"linear layers with an update: some of {', '.join(LORA_TARGETS)} (default: all)", nargs="+"
    )
    exit_threshold: str = _setting(
        "trained",
        "stages",
        "which tokens enter a stage once it is trained: those as hard as it was trained on, or as many more as "
        "serve all-token validation perplexity best, which costs their layers",
        choices=EXIT_THRESHOLDS,
    )
    accept: str = _setting(
        "better",
        "stages",
        "keep a stage only if all-token validation perplexity falls, or always",
        choices=("better", "always"),
    )
    min_improvement: float = _setting(
        0.001, "stages", "relative fall of the all-token validation perplexity that counts as better"
    )

    epochs: int = _setting(2, "training", "epochs for each stage at most")
    batch_tokens: int = _setting(512, "training", "hard tokens in an optimizer step")
    micro_batch_tokens: int | None = _setting(
        None,
        "training",
        "tokens run through the stage at once; gradients of the parts of a batch add up (default: as many as fit)",
    )
    lr: float = _setting(6e-4, "training", "peak learning rate")
    lr_schedule: str = _setting("cosine", "training", "shape of the learning rate after warm-up", choices=LR_SCHEDULES)
    warmup_steps: int = _setting(10, "training", "steps of linear learning-rate warm-up")
    weight_decay: float = _setting(
        0.01, "training", "decoupled weight decay (on matrices and norms alike, as torch.optim.AdamW)"
    )
    grad_clip: float = _setting(1.0, "training", "largest gradient norm; 0 turns clipping off")
    optimizer: str = _setting(
        "adamw",
        "training",
        "adamw, or with 8-bit moments: bitsandbytes' on a GPU, our own with the same state on the CPU",
        choices=OPTIMIZERS,
    )
    cuda_graph: str = _setting(
        "auto",
        "training",
        "on: the launches of a stage's step on a GPU are recorded for each size of batch, and replayed as one; auto: "
        "off, until a GPU has shown it right",
        choices=CUDA_GRAPHS,
    )
    shard: str = _setting(
        "none",
        "training",
        "fsdp: a stage's weights, gradients and optimizer state are spread over the processes (torchrun), where one "
        "GPU is too small for them",
        choices=SHARDS,
    )
    patience: int = _setting(1, "training", "epochs without a better validation loss before a stage stops")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            check_type(f.name, value, f.type)
            if choices is not None and value not in choices:
                raise InputError(f"{f.name}: {shown(value)}; must be one of {', '.join(choices)}")
        for name in (
            "hard_ratio", "lr", "weight_decay", "grad_clip", "min_improvement", "lora_alpha", "checkpoint_minutes",
            "max_minutes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name}: {value}; must be a finite number")
        self._require("hard_ratio", 0 < self.hard_ratio <= 1, "must be in (0, 1]")
        for name in ("num_stages", "lora_rank", "epochs", "batch_tokens", "patience", "shuffle_buffer"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        layers = self.layers_per_stage
        self._require("layers_per_stage", layers == ALL or layers >= 1, "must be at least 1, or all")
        self._require("seq_len", self.seq_len >= 2, "must be at least 2")
        self._check_sizes()
        for name in ("lr", "lora_alpha"):
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("weight_decay", "grad_clip", "min_improvement", "warmup_steps"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        self._require(
            "micro_batch_tokens", self.micro_batch_tokens is None or self.micro_batch_tokens >= 1, "must be at least 1"
        )
        self._require("checkpoint_minutes", self.checkpoint_minutes > 0, "must be above 0")
        self._require("max_minutes", self.max_minutes is None or self.max_minutes > 0, "must be above 0")
        self._require("seed", 0 <= self.seed < 2**63, "must be in [0, 2^63)")
        self._check_templates()
        for name, allowed in (("report_to", TRACKERS), ("lora_targets", LORA_TARGETS)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise InputError(f"{name}: {shown(value)}; must be one of {', '.join(allowed)}")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise InputError(f"report_to: {', '.join(self.report_to)}; none goes with no other")
        for name, (values, why) in STAGE_KINDS[self.stage_kind].allows.items():
            self._require(name, getattr(self, name) in values, f"{why}: must be {' or '.join(values)}")
        if self.init == "identity" and self.head == "own":
            raise InputError("init: identity needs head: shared (a stage that starts as the base uses the base's head)")

    def _check_sizes(self) -> None:
        for unit in UNITS:
            train, val, test = (getattr(self, f"{split}_{unit}") for split in SPLITS)
            self._require(f"train_{unit}", train in (None, ALL) or train >= 1, "must be at least 1, or all")
            self._require(f"val_{unit}", val is None or val >= 1, "must be at least 1")
            self._require(f"test_{unit}", test in (None, ALL) or test >= 0, "must be at least 0, or all")
            if train == test == ALL:
                raise InputError(f"train_{unit}, test_{unit}: all; only one of them can have what the others leave")
        given = {unit: [n for n in (f"{s}_{unit}" for s in SPLITS) if getattr(self, n) is not None] for unit in UNITS}
        if given["tokens"] and given["blocks"]:
            names = ", ".join(given["tokens"] + given["blocks"])
            raise InputError(f"{names}: a run counts in tokens or in blocks; give one kind of them")
        if self.streaming == "on":
            for split in SPLITS:
                if self.size(split) == ALL:
                    raise InputError(f"{split}_{self.unit}: all; with streaming on must be a number")

    def _check_templates(self) -> None:
        asked = [n for n in ("text_columns", "text_template", "prompt_template") if getattr(self, n) not in (None, ())]
        if len(asked) > 1:
            raise InputError(f"{' and '.join(asked)} are {'both' if len(asked) == 2 else 'all'} given; give one")
        if (self.prompt_template is None) != (self.completion_template is None):
            raise InputError("prompt_template, completion_template: only one is given; they go together")
        for name in ("text_template", "prompt_template", "completion_template"):
            if getattr(self, name) is not None:
                template_parts(getattr(self, name), name)

    @property
    def unit(self) -> str:
        """``blocks`` where any split is counted in them, else ``tokens``."""
        return "blocks" if any(getattr(self, f"{split}_blocks") is not None for split in SPLITS) else "tokens"

    def size(self, split: str) -> int | None:
        """What is asked for of a split, in :attr:`unit`; None: the default."""
        size: int | None = getattr(self, f"{split}_{self.unit}")
        return size

    @property
    def general_text(self) -> str | None:
        """The dataset that is read beside that of training; None: none."""
        default = "none" if self.dataset == "pydoc" else "pydoc"
        named = default if self.general_dataset is None else self.general_dataset
        return None if named == "none" else named

    def expected_tokens(self, split: str) -> int:
        """Tokens of one of ``READ``, where the text has as many as asked. Of settled settings (see
        ``SplitSequences.settle``): what it has."""
        if split == GENERAL:
            return DEFAULT_BLOCKS[GENERAL] * self.seq_len if self.general_text else 0
        size = self.size(split)
        if size is None:
            if split == "test":
                return self.expected_tokens("val")
            return DEFAULT_BLOCKS[split] * self.seq_len
        return size * (self.seq_len if self.unit == "blocks" else 1)

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise InputError(f"{name}: {getattr(self, name)!r}; {allowed}")

    @property
    def reads(self) -> str:
        """Which hidden state of the base a stage reads: the residual stream before the final norm (what an identity
        stage continues) or before the layers it copies, or the last hidden state after the norm (as the seed did)."""
        return "residual" if self.init == "identity" else "last_hidden"

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON values."""
        return {f.name: _plain(f, getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(f: "dataclasses.Field[Any]", value: Any) -> Any:
    if f.metadata.get("all") and value == ALL:
        return "all"
    return list(value) if isinstance(value, tuple) else value


_FIELDS = {f.name: f for f in dataclasses.fields(RunSettings)}
# What may differ between a run and its resumption: where things lie and when to stop, not what is computed.
RESUME_MAY_CHANGE = (
    "out", "resume", "max_minutes", "checkpoint_minutes", "cache_dir", "report_to", "sample_prompt", "store", "shard",
)  # fmt: skip


def make_settings(overrides: dict[str, Any], settings_file: str | None = None) -> RunSettings:
    """The settings of a run: the preset's, then the YAML file's, then ``overrides`` (the flags given).

    Raises:
        InputError: an unknown name, a value of the wrong type or out of range, or a file that cannot be read.
    """
    from_file = read_settings_file(Path(settings_file)) if settings_file is not None else {}
    given = {**from_file, **overrides}
    preset = given.get("preset", "warm")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(f"preset: {shown(preset)}; must be one of {', '.join(PRESETS)}")
    recipe = PRESETS[preset]
    if any(given.get(f"{split}_tokens") is not None for split in SPLITS):  # a preset counts in blocks, if at all
        recipe = {name: value for name, value in recipe.items() if not name.endswith("_blocks")}
    merged = {**recipe, **given}
    for name in merged:
        if name not in _FIELDS:
            near = suggest(name, _FIELDS)
            hint = f"; did you mean {near} ({explain(near)})?" if near else ""
            raise InputError(f"{shown(name)[1:-1]}: no such setting{hint}")
    return RunSettings(**{name: as_field(_FIELDS[name], value) for name, value in merged.items()})


def saved_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run has saved, for :func:`make_settings`. A run from before there was ``shuffle`` took its
    texts in the data's own order."""
    check_type("settings", settings, dict)
    return {"shuffle": "off", **settings}


def explain(name: str) -> str:
    """The beginning of a setting's help."""
    return str(_FIELDS[name].metadata["help"]).split(";")[0]
