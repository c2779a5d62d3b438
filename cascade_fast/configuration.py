"""``CascadeConfig``: what a cascade is made of, in Hugging Face's ``config.json``. A finished run writes it too."""

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from cascade_fast.config import RESUME_MAY_CHANGE, ConfigError
from cascade_fast.files import check_json
from cascade_fast.second_look import SecondLookConfig
from cascade_fast.stage import StageConfig

STAGE_CONFIGS: dict[str, type[StageConfig]] = {"append": StageConfig, "second-look": SecondLookConfig}
MODEL_CRITERIA = ("cosine", "entropy")  # a random score is a baseline of training, nothing to run a model by


class CascadeConfig(PreTrainedConfig):
    """A base and its stages.

    Args:
        base_config: transformers' configuration of the base.
        base: where the base comes from: ``name``, ``source``, ``revision``, ``fingerprint`` (SHA-256 of its
            configuration and weights, checked when stages are loaded onto it) and ``quantization``.
        criterion: ``cosine`` or ``entropy``.
        stages: in order, all of one kind, each ``threshold`` and the fields of :class:`StageConfig` or
            :class:`SecondLookConfig`. A token enters a stage iff its score is at or below the threshold (-inf: none
            does).
        self_contained: whether the folder holds the base's weights too.
        settings, measured: how the stages were trained and what came of it; for the model card.

    Raises:
        ConfigError: an unknown criterion or kind of stage, stages that do not go together, or a threshold that is NaN.
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
        if not isinstance(base_config, PreTrainedConfig):
            fields = dict(base_config or {})
            base_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        self.base_config = base_config
        self.base = base or {}
        self.criterion = criterion
        self.stages = stages or []
        self.self_contained = self_contained
        self.settings = settings or {}
        self.measured = measured or {}
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        if self.criterion not in MODEL_CRITERIA:
            raise ConfigError(f"criterion: {self.criterion!r}; must be one of {', '.join(MODEL_CRITERIA)}")
        for number, stage in enumerate(self.stages, 1):
            kind = stage.get("kind", "append")
            if kind not in STAGE_CONFIGS:
                raise ConfigError(
                    f"stages: stage {number} is of kind {kind!r}; must be one of {', '.join(STAGE_CONFIGS)}"
                )
            if not isinstance(stage.get("threshold"), (int, float)) or math.isnan(stage["threshold"]):
                raise ConfigError(f"stages: stage {number} has threshold {stage.get('threshold')}; must be a number")
        for name in ("kind", "reads", "entry_layer"):
            found = {stage.get(name) for stage in self.stages}
            if len(found) > 1:
                raise ConfigError(f"stages: {name} is {' and '.join(map(repr, found))}; must be the same for all")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As everywhere in transformers; raises ConfigError where the folder holds no finished cascade."""
        if config_dict.get("model_type") != cls.model_type:
            raise ConfigError(
                f"config.json: model_type {config_dict.get('model_type')!r}; must be {cls.model_type!r} "
                "(a training run has it once it is finished)"
            )
        config_dict = dict(config_dict)
        commit = config_dict.pop("_commit_hash", None)  # which transformers adds
        check_json("config.json", config_dict)
        return super().from_dict({**config_dict, "_commit_hash": commit} if commit else config_dict, **kwargs)

    @property
    def thresholds(self) -> list[float]:
        return [stage["threshold"] for stage in self.stages]

    @property
    def kind(self) -> str:
        """Of the stages."""
        return self.stages[0].get("kind", "append") if self.stages else "append"

    @property
    def quantization(self) -> str:
        """Of the base; see ``RunConfig.base_quantization``."""
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
        return STAGE_CONFIGS[self.kind](**fields)

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


AutoConfig.register(CascadeConfig.model_type, CascadeConfig, exist_ok=True)
