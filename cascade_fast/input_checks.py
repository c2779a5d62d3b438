"""What comes from outside, checked: types of values, YAML files, text templates, and the names other trainers use."""

import dataclasses
import difflib
import os
import string
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ALL = -1  # ``all`` as a number of tokens or blocks; once the text is read its real number takes its place
SHOWN_CHARACTERS = 400  # of a wrong value, in a message


class InputError(ValueError):
    """A setting that cannot work; the message names the setting, its value and what is allowed."""


# --- types ----------------------------------------------------------------------------------------------------------

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", dict: "a map", list: "a list"}


def shown(value: Any) -> str:
    """A wrong value for a message: a list or a map by that word, since it may be of any size."""
    if isinstance(value, (list, tuple, set)):
        return "a list"
    if isinstance(value, dict):
        return "a map"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a huge number"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the annotation ``kind``: int, float (an int will do), str, bool, dict, list, tuples of
    one type, unions of these. A bool is no number here."""
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, typing.get_args(kind)[0]) for one in value)
    if origin is float and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023  # becomes a float
    return isinstance(value, origin) and (origin is bool or not isinstance(value, bool))


def in_words(kind: Any) -> str:
    """An annotation for a message."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(in_words(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of texts"
    return "empty" if kind is type(None) else _WORDS.get(typing.get_origin(kind) or kind, str(kind))


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises InputError where ``value`` is not of the annotation ``kind``."""
    if not fits(value, kind):
        raise InputError(f"{name}: {shown(value)}; must be {in_words(kind)}")


def check_fields(where: str, given: Any, kinds: Mapping[str, Any], optional: Iterable[str] = ()) -> None:
    """Raises InputError unless ``given`` is a map with the names of ``kinds`` and values of those annotations.

    ``optional``: names that may be absent. ``where`` begins the message.
    """
    if not isinstance(given, dict):
        raise InputError(f"{where}: {shown(given)}; must be a map")
    missing = [name for name in kinds if name not in given and name not in optional]
    if missing:
        raise InputError(f"{where}: has no {', '.join(missing)}")
    for name, value in given.items():
        if name not in kinds:
            raise InputError(f"{where}: {shown(name)}; no such field: must be one of {', '.join(kinds)}")
        check_type(f"{where}: {name}", value, kinds[name])


# --- values of settings ---------------------------------------------------------------------------------------------


def as_field(f: "dataclasses.Field[Any]", value: Any) -> Any:
    """``value`` as the type of the setting ``f``: YAML reads 1e-4 as text, ``on`` as true and one column as no list.

    Raises:
        InputError: it cannot be.
    """
    name = f.name
    kinds = typing.get_args(f.type) or (f.type,)  # `int | None` -> (int, NoneType)
    if value is None:
        if type(None) in kinds or f.default == ():
            return f.default if f.default == () else None
        raise InputError(f"{name}: empty; must be given a value")
    if f.default == ():
        return _texts(name, value)
    if f.metadata.get("choices") == ("on", "off") and isinstance(value, bool):
        return "on" if value else "off"
    if int in kinds or float in kinds:
        return _number(f, value, int if int in kinds else float)
    if not isinstance(value, str):
        raise InputError(f"{name}: {shown(value)}; must be text{_quotes(value)}")
    if "\0" in value:
        raise InputError(f"{name}: {shown(value)}; must not hold the character zero")
    return value


def _number(f: "dataclasses.Field[Any]", value: Any, kind: type[int] | type[float]) -> int | float:
    name, may_be_all = f.name, f.metadata.get("all")
    if may_be_all and value == "all":
        return ALL
    allowed = ("an integer" if kind is int else "a number") + (", or all" if may_be_all else "")
    try:
        number = kind(value)
        if isinstance(value, bool) or (kind is int and number != float(value)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: {shown(value)}; must be {allowed}") from None
    if may_be_all and number == ALL:  # only the word means that
        raise InputError(f"{name}: {number}; must be at least {0 if name.startswith('test') else 1}, or all")
    return number


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{name}: {shown(text)}; must be text{_quotes(text)}, or a list of texts")
    return texts


def _quotes(value: Any) -> str:
    """YAML reads yes, 2024-01-01 and 007 as something else than text."""
    return "" if isinstance(value, (list, tuple, dict)) else " (in quotes, if it is meant so)"


def one_line(error: BaseException) -> str:
    """An error's message with its lines joined and control characters as Python writes them; one that is not ours cut
    where it gets long. Of the system's errors, which file and what is wrong."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)!r}: {error.strerror}"
    ours = isinstance(error, InputError)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in (text if ours else text[: 2 * SHOWN_CHARACTERS]))
    return text if ours or len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


# --- templates ------------------------------------------------------------------------------------------------------


def template_parts(template: str, setting: str = "text_template") -> list[tuple[str, str | None]]:
    """A text template as (text, column that follows it or None). ``{{`` and ``}}`` are braces of the text.

    Raises:
        InputError: anything between braces but a column's name, or a brace without its other.
    """
    plain = "between braces stands a column's name alone, as in {text}; {{ and }} are braces of the text"
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{setting}: {shown(template)}; {error}: {plain}") from None
    for _, name, spec, conversion in found:
        if name is None:
            continue
        if not name or name.isdigit() or any(c in name for c in "[]{}.") or spec or conversion:
            field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise InputError(f"{setting}: {{{shown(field)[1:-1]}}} in {shown(template)}; {plain}")
    return [(literal, name) for literal, name, _, _ in found]


# --- YAML -----------------------------------------------------------------------------------------------------------


def read_settings_file(path: Path) -> dict[str, Any]:
    """The ``name: value`` lines of a YAML file, a dash in a name as an underscore.

    Raises:
        InputError: not to be read, no YAML, not UTF-8, something else than such lines, or a name given twice; with the
            line.
    """
    import yaml

    where = f"config: {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InputError(f"{where}, line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{where} cannot be read: {reason}") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{where}; must hold 'name: value' lines")
        _check_keys(where, node)
        content = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{where}{at}: {one_line(ValueError(error.problem or error.context))}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise InputError(f"{where}, line {line}: character {error.character!r} is not allowed in YAML") from None
    except RecursionError:
        raise InputError(f"{where}; lists or maps within one another too deeply") from None
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}; a value cannot be read: {one_line(error)}") from None  # as 2024-13-45
    return {_setting_name(name): value for name, value in content.items()}


def _check_keys(where: str, node: Any) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise InputError(f"{where}, line {line}: a list or map as a name; must hold 'name: value' lines")
        name = _setting_name(key.value)
        if name in lines:
            raise InputError(f"{where}, line {line}: {shown(name)[1:-1]} is given twice, first in line {lines[name]}")
        lines[name] = line


def _setting_name(key: Any) -> str:
    return str(key).replace("-", "_")


# --- names ----------------------------------------------------------------------------------------------------------

# Names of Hugging Face (TrainingArguments, TRL, run_clm.py), LLaMA-Factory, axolotl, torchtune and others, by ours for
# the same.
_THEIR_NAMES = {
    "base": (
        "base_model", "model", "model_id", "model_name", "model_name_or_path", "model_path",
        "pretrained_model_name_or_path", "tokenizer_name",
    ),
    "base_quantization": ("load_in_4bit", "quantization", "quantization_bit"),
    "batch_tokens": ("batch_size", "per_device_train_batch_size", "train_batch_size"),
    "cache_dir": ("dataset_prepared_path", "tokenized_path"),
    "chat_template": ("chat_template_jinja", "chat_template_path", "conversation_template", "template"),
    "checkpoint_minutes": ("save_steps", "save_strategy"),
    "completion_template": (
        "completion_column", "completion_field", "field_output", "output_column", "response_column",
        "response_template",
    ),
    "dataset": (
        "data", "data_dir", "data_file", "data_files", "data_path", "dataset_dir", "dataset_name", "dataset_path",
        "datasets", "pretraining_dataset", "train_data", "train_dataset", "train_file",
    ),
    "dtype": ("bf16", "fp16", "mixed_precision", "torch_dtype"),
    "encoding": ("charset", "file_encoding"),
    "epochs": ("max_epochs", "max_steps", "num_epochs", "num_train_epochs"),
    "grad_clip": ("clip_grad_norm", "gradient_clip_val", "gradient_clipping", "max_grad_norm"),
    "loss_on": (
        "assistant_only_loss", "completion_only_loss", "mask_inputs", "mask_prompt", "masking_strategy",
        "roles_to_train", "train_on_completions_only", "train_on_input", "train_on_inputs", "train_on_prompt",
        "train_on_responses_only",
    ),
    "lr": ("learning_rate",),
    "lr_schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "max_minutes": ("max_time",),
    "micro_batch_tokens": ("gradient_accumulation_steps", "micro_batch_size"),
    "optimizer": ("optim",),
    "out": ("output", "output_dir", "run_name"),
    "patience": ("early_stopping_patience",),
    "prompt_template": (
        "field_instruction", "instruction_template", "prompt_column", "prompt_field", "query_column",
    ),
    "report_to": (
        "log_with", "logger", "logging", "logging_backend", "tracker", "trackers", "use_tensorboard", "use_wandb",
        "wandb_project",
    ),
    "resume": ("resume_from_checkpoint",),
    "sample_prompt": ("eval_prompts", "sample_prompts"),
    "seed": ("random_seed",),
    "seq_len": (
        "block_size", "context_length", "cutoff_len", "max_length", "max_seq_len", "max_seq_length", "model_max_length",
        "sequence_len", "sequence_length",
    ),
    "shuffle": ("shuffle_dataset", "shuffle_merged_datasets"),
    "shuffle_buffer": ("buffer_size", "shuffle_buffer_size", "streaming_multipack_buffer_size"),
    "streaming": ("dataset_streaming", "stream"),
    "test_tokens": ("max_predict_samples", "max_test_samples", "test_size"),
    "text_columns": ("dataset_text_field", "text_column", "text_column_name", "text_field"),
    "text_template": ("formatting_func", "prompt_format"),
    "train_tokens": ("max_samples", "max_tokens", "max_train_samples", "train_size"),
    "val_tokens": (
        "eval_size", "max_eval_samples", "max_val_samples", "val_set_size", "val_size", "validation_size",
        "validation_split_percentage",
    ),
    "warmup_steps": ("num_warmup_steps", "warmup_ratio"),
}  # fmt: skip
OTHER_NAMES = {theirs: ours for ours, names in _THEIR_NAMES.items() for theirs in names}


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` stands for in another trainer, or that is spelt alike; None if none."""
    known, name = list(known), name.lower().replace("-", "_")
    if OTHER_NAMES.get(name) in known:
        return OTHER_NAMES[name]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
