"""Parameter counts of a base and of the stages on it, from shapes alone, and the bytes that follow from them.

Shape legend: D hidden size, F intermediate size, V vocabulary, H heads, G key/value heads, E head size, L layers.
"""

from dataclasses import dataclass
from typing import Any

from cascade_fast.settings import RunSettings
from cascade_fast.stages.counts import StageCounts
from cascade_fast.stages.kind import StageKind, get_kind
from cascade_fast.stages.stage import StageConfig

NF4_BYTES = 0.5 + 4 / 64  # half a byte and a float32 absmax for 64 weights (arXiv 2305.14314)
EIGHT_BIT_MINIMUM = 4096  # bitsandbytes keeps the state of smaller tensors in float32


@dataclass(frozen=True)
class Shape:
    """A base, by transformers' configuration, and the stages on it."""

    base: Any
    kind: StageKind
    stage: StageConfig

    @classmethod
    def from_settings(cls, settings: RunSettings, base_config: Any) -> "Shape":
        kind = get_kind(settings.stage_kind)
        return cls(base_config, kind, kind.config(settings, base_config))

    @property
    def counts(self) -> StageCounts:
        """Of a stage; its layers are as large as the base's."""
        return self.kind.counts(self.stage)

    def base_body(self) -> int:
        """Parameters of all decoder layers of the base."""
        layer = self.counts
        return self.base.num_hidden_layers * (layer.query_key() + layer.value_output_mlp() + layer.small())

    def base_parameters(self) -> int:
        heads = 1 if self.base.tie_word_embeddings else 2
        return heads * self.counts.head + self.base_body() + self.stage.hidden_size

    def base_quantized(self) -> int:
        """Weights that become 4-bit: the matrices of the decoder layers, not embeddings, head, norms and biases."""
        return self.base.num_hidden_layers * (self.counts.query_key_matrices() + self.counts.value_output_mlp())


def base_weight_bytes(shape: Shape, quantization: str, width: int) -> float:
    """Of the loaded base; ``width`` is the compute dtype's bytes."""
    quantized = shape.base_quantized() if quantization == "nf4" else 0
    return quantized * NF4_BYTES + (shape.base_parameters() - quantized) * width


def optimizer_bytes(shape: Shape, optimizer: str) -> float:
    """AdamW: two float32 a parameter. 8 bit: two bytes, and for each 256 parameters two float32 absmax; what is smaller
    than ``EIGHT_BIT_MINIMUM`` elements stays in float32."""
    trained = shape.counts.trained()
    if optimizer == "adamw":
        return 8 * trained
    s = shape.stage
    # Norms are the small tensors (biases as well, where a family has them).
    small = s.layers * shape.counts.small() + s.hidden_size if s.hidden_size < EIGHT_BIT_MINIMUM else 0
    return 8 * small + (trained - small) * (2 + 8 / 256)


def saved_activation_bytes(shape: Shape, width: int, *, on_cpu: bool = True) -> int:
    """What autograd keeps of one token in one stage layer, for ``width`` bytes of compute dtype."""
    s = shape.stage
    # float32 (K, D): inputs of the two norms; on a GPU the normed as well, and in half their casts.
    floats = 2 if on_cpu else 4 if width < 4 else 3
    halves = (2 if on_cpu else 3) * s.hidden_size + shape.counts.attention_inner + 4 * s.intermediate_size
    return floats * s.hidden_size * 4 + halves * width + 2 * 4
