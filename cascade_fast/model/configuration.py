"""``CascadeConfig``: what a cascade is made of, in Hugging Face's ``config.json``. A finished run writes it too."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from cascade_fast.base.model import FAMILY, BaseModel, check_model
from cascade_fast.criteria import model_criteria
from cascade_fast.input_checks import InputError, check_fields, check_type, one_line, shown
from cascade_fast.presets import STAGE_KINDS
from cascade_fast.records import RunRecord, RunResults, routed_by
from cascade_fast.resume import RESUME_MAY_CHANGE
from cascade_fast.runtime.files import check_json
from cascade_fast.stages.exits import ExitStage
from cascade_fast.stages.kind import get_kind
from cascade_fast.stages.stage import StageConfig

REFERENCE_FIELDS = ("name", "source", "revision", "fingerprint", "quantization")
MEASURED_FIELDS = {"tokens": int, "base_ppl": float, "cascade_ppl": float}
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation")


class CascadeConfig(PreTrainedConfig):
    """A base and its stages.

    Args:
        base_config: transformers' configuration of the base.
        base: where the base comes from: ``name``, ``source``, ``revision``, ``fingerprint`` (SHA-256 of its
            configuration and weights, checked when stages are loaded onto it) and ``quantization``.
        criterion: ``cosine``, ``entropy``, or one that is registered here and now.
        stages: in order, all of one kind, each ``threshold`` and the fields of :class:`StageConfig` or
            :class:`SecondLookConfig`. A token enters a stage iff its score is at or below the threshold (-inf: none
            does).
        self_contained: whether the folder holds the base's weights too.
        settings, measured: how the stages were trained and what came of it; for the model card.

    Raises:
        InputError: a value of the wrong type or out of range, a base that is none of the Llama family, or stages that
            do not fit it or one another.
    """

    model_type = "cascade"
    sub_configs: ClassVar = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: Any = None,
        base: dict[str, Any] | None = None,
        criterion: str = "entropy",
        stages: list[dict[str, Any]] | None = None,
        self_contained: bool = True,
        settings: dict[str, Any] | None = None,
        measured: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.base_config = _base_config({} if base_config is None else base_config)
        self.base = {} if base is None else base
        self.criterion = criterion
        self.stages = [] if stages is None else stages
        self.self_contained = self_contained
        self.settings = {} if settings is None else settings
        self.measured = {} if measured is None else measured
        self.check()
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raises InputError as the class does; called when made, and again where another base takes its place."""
        if self.criterion not in model_criteria():
            raise InputError(f"criterion: {shown(self.criterion)}; must be one of {', '.join(model_criteria())}")
        for name, kind in (("self_contained", bool), ("base", dict), ("settings", dict), ("measured", dict)):
            check_type(name, getattr(self, name), kind)
        check_type("stages", self.stages, list)
        for name in REFERENCE_FIELDS:
            check_type(f"base: {name}", self.base.get(name), str | None)
        for split, numbers in self.measured.items():
            check_fields(f"measured: {split}", numbers, MEASURED_FIELDS)
        kinds = [_kind_of(number, stage) for number, stage in enumerate(self.stages, 1)]
        _check_same("kind", kinds)
        for number, stage in enumerate(self.stages, 1):
            _check_stage(number, stage, self.base_config)
        for name in ("reads", "entry_layer"):
            _check_same(name, [stage.get(name) for stage in self.stages])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As everywhere in transformers; raises InputError as :meth:`from_dict`, OSError where nothing is found."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (InputError, OSError):
            raise
        except Exception as error:  # a file that holds no map
            raise InputError(f"config.json: cannot be read: {one_line(error)}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As everywhere in transformers.

        Raises:
            InputError: the folder holds no finished cascade, or its configuration is damaged.
        """
        check_type("config.json", config_dict, dict)
        if config_dict.get("model_type") != cls.model_type:
            raise InputError(
                f"config.json: model_type {shown(config_dict.get('model_type'))}; must be {cls.model_type!r} "
                "(a training run has it once it is finished)"
            )
        fields = dict(config_dict)
        commit = fields.pop("_commit_hash", None)  # which transformers adds
        check_json("config.json", fields)
        # A file may name another attention, which may be a repository of kernels: that is the caller's to say.
        fields = {name: value for name, value in fields.items() if name not in ATTENTION_FIELDS}
        try:
            return super().from_dict({**fields, "_commit_hash": commit} if commit else fields, **kwargs)
        except InputError as error:
            raise InputError(f"config.json: {error}") from error
        except Exception as error:  # transformers checks its own fields, and raises many kinds
            raise InputError(f"config.json: cannot be read: {one_line(error)}") from error

    @property
    def thresholds(self) -> list[float]:
        return [stage["threshold"] for stage in self.stages]

    @property
    def kind(self) -> str:
        """Of the stages."""
        return _kind_of(1, self.stages[0]) if self.stages else StageConfig.kind

    @property
    def attends(self) -> bool:
        """Whether tokens in a stage attend to their text."""
        return get_kind(self.kind).attends

    @property
    def quantization(self) -> str:
        """Of the base; see ``RunSettings.base_quantization``."""
        return self.base.get("quantization") or self.settings.get("base_quantization", "none")

    @property
    def entry_layer(self) -> int | None:
        """The first of the base's layers that a second look copies; None for appended stages."""
        return self.stages[0].get("entry_layer") if self.stages else None

    @property
    def reads(self) -> str:
        """The base's hidden state that appended stages read: ``residual`` or ``last_hidden``."""
        return self.stages[0]["reads"] if self.stages else "last_hidden"

    def stage_config(self, number: int) -> StageConfig:
        """The shape of stage ``number``, from 1."""
        fields = {name: value for name, value in self.stages[number - 1].items() if name != "threshold"}
        return get_kind(self.kind).config_class(**fields)

    def portable_settings(self) -> dict[str, Any]:
        """The settings without those that only say where and when the run took place."""
        return {name: v for name, v in self.settings.items() if name not in RESUME_MAY_CHANGE}

    # What transformers asks of a language model's configuration is the base's to answer.

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        return self.base_config

    @property
    def vocab_size(self) -> int:
        return self.base_config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.base_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.base_config.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.base_config.max_position_embeddings


def _base_config(given: Any) -> PreTrainedConfig:
    """transformers' configuration of the base, made of its fields if it is none yet."""
    if isinstance(given, PreTrainedConfig):
        return given
    check_type("base_config", given, dict)
    fields = {name: value for name, value in given.items() if name not in ATTENTION_FIELDS}
    kind = fields.pop("model_type", "llama")
    if kind not in FAMILY:
        raise InputError(f"base_config: model_type {shown(kind)}; must be one of {', '.join(FAMILY)}")
    check_model("base_config", fields)
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # transformers' checks raise many kinds
        raise InputError(f"base_config: {one_line(error)}") from error


def _kind_of(number: int, stage: Any) -> str:
    check_type(f"stages: stage {number}", stage, dict)
    kind = stage.get("kind", StageConfig.kind)  # the first runs had none
    if not isinstance(kind, str) or kind not in STAGE_KINDS:
        raise InputError(f"stages: stage {number} is of kind {shown(kind)}; must be one of {', '.join(STAGE_KINDS)}")
    return kind


def _check_same(name: str, values: list[Any]) -> None:
    different = list(dict.fromkeys(values))
    if len(different) > 1:
        raise InputError(f"stages: {name} is {' and '.join(map(shown, different))}; must be the same for all")


def _check_stage(number: int, stage: dict[str, Any], base_config: Any) -> None:
    """Raises InputError unless ``stage`` has the fields of its kind, and the sizes of the base."""
    where, kind = f"stages: stage {number}", _kind_of(number, stage)
    kinds = {field.name: field.type for field in dataclasses.fields(get_kind(kind).config_class)}
    check_fields(where, stage, {**kinds, "threshold": float}, optional=("kind", "lora"))
    if math.isnan(stage["threshold"]):
        raise InputError(f"{where}: threshold {stage['threshold']}; must not be NaN")
    for name, allowed in (("init", ("identity", "random")), ("head", ("shared", "own"))):
        if stage[name] not in allowed:
            raise InputError(f"{where}: {name} {shown(stage[name])}; must be one of {', '.join(allowed)}")
    if stage["reads"] not in ("residual", "last_hidden"):
        raise InputError(f"{where}: reads {shown(stage['reads'])}; must be residual or last_hidden")
    check_model(where, stage, layers="layers")
    try:
        asked = {name: stage[name] for name in ("layers", "init", "head", "reads", "lora") if name in stage}
        expected = get_kind(kind).shape(base_config, **asked).to_dict()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # a base whose sizes do not go together
        raise InputError(f"base_config: {one_line(error)}") from error
    for name, value in expected.items():
        if name == "rope":  # other releases of transformers have other entries
            same = all(value[entry] == stage["rope"][entry] for entry in value.keys() & stage["rope"].keys())
        else:
            same = stage.get(name, kind) == value
        if not same:
            raise InputError(f"{where}: {name} {shown(stage[name])}; must be {shown(value)}, as the base has it")


AutoConfig.register(CascadeConfig.model_type, CascadeConfig, exist_ok=True)


# --- a finished run ---------------------------------------------------------------------------------------------------


def cascade_config(base: BaseModel, stages: Sequence[ExitStage], *, criterion: str, **more: Any) -> CascadeConfig:
    """Of a cascade whose stages lie in a folder, and its base elsewhere. ``more``: of :class:`CascadeConfig`."""
    return CascadeConfig(
        base_config=base.config,
        base={name: getattr(base, name) for name in REFERENCE_FIELDS},
        criterion=criterion,
        stages=[{**kept.stage.config.to_dict(), "threshold": kept.threshold} for kept in stages],
        self_contained=False,
        **more,
    )


def finished_run_config(
    record: RunRecord, results: RunResults, base: BaseModel, stages: Sequence[ExitStage]
) -> dict[str, Any]:
    """``config.json`` of a finished run: its record together with the cascade's configuration, so that the folder loads
    as a model. ``stages``: those that are kept."""
    criterion = routed_by(results.settings)
    if criterion not in model_criteria():  # loading it says so
        return {**record.to_dict(), "model_type": CascadeConfig.model_type, "criterion": criterion}
    final, tokens = results.final, results.tokens
    measured = {"validation": (tokens.val, results.base.val_ppl, final.all_token_val_ppl)}
    if final.base_test_ppl is not None and final.all_token_test_ppl is not None:
        measured["test"] = tokens.test, final.base_test_ppl, final.all_token_test_ppl
    config = cascade_config(
        base,
        stages,
        criterion=criterion,
        settings=results.settings,
        measured={split: dict(zip(MEASURED_FIELDS, numbers, strict=True)) for split, numbers in measured.items()},
        architectures=["CascadeForCausalLM"],
        dtype=record.machine["dtype"],
    )
    run = record.to_dict()
    return {**run, **{name: value for name, value in json.loads(config.to_json_string()).items() if name not in run}}
