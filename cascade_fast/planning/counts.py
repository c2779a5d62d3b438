"""Parameter counts of a base and of the stages on it, from shapes alone, and the bytes that follow from them.

Shape legend: D hidden size, F intermediate size, V vocabulary, H heads, G key/value heads, E head size, L layers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cascade_fast.settings import RunSettings
from cascade_fast.stages.append import StageConfig

NF4_BYTES = 0.5 + 4 / 64  # half a byte and a float32 absmax for 64 weights (arXiv 2305.14314)
EIGHT_BIT_MINIMUM = 4096  # bitsandbytes keeps the state of smaller tensors in float32


@dataclass(frozen=True)
class Shape:
    """Parameter counts of a base and of the stages on it. ``base`` is transformers' configuration."""

    base: Any
    stage: StageConfig

    @classmethod
    def of(cls, settings: RunSettings, base_config: Any) -> "Shape":
        stage = StageConfig.from_base(
            base_config, layers=settings.layers_per_stage, init=settings.init, head=settings.head, reads=settings.reads
        )
        return cls(base_config, dataclasses.replace(stage, kind=settings.stage_kind))

    @property
    def attends(self) -> bool:
        """Whether a stage has queries and keys that do something."""
        return self.stage.kind == "second-look"

    @property
    def attention_inner(self) -> int:
        return self.stage.heads * self.stage.head_dim

    @property
    def head(self) -> int:
        return self.stage.vocab_size * self.stage.hidden_size

    def query_key(self) -> int:
        """Of a layer: projections of queries and keys with their biases and norms."""
        s = self.stage
        inner = self.attention_inner + s.kv_heads * s.head_dim
        return inner * (s.hidden_size + s.attention_bias) + (2 * s.head_dim if s.query_key_norm else 0)

    def query_key_matrices(self) -> int:
        s = self.stage
        return s.hidden_size * (self.attention_inner + s.kv_heads * s.head_dim)

    def value_output_mlp(self) -> int:
        """Matrices of a layer that a stage of single tokens multiplies with."""
        s = self.stage
        return s.hidden_size * (s.kv_heads * s.head_dim + self.attention_inner + 3 * s.intermediate_size)

    def stage_matrices(self) -> int:
        """Matrices that a stage multiplies with, its head left out."""
        return self.stage.layers * (self.value_output_mlp() + self.attends * self.query_key_matrices())

    def small(self) -> int:
        """Of a layer: norms, and biases of everything but queries and keys."""
        s = self.stage
        return (
            2 * s.hidden_size
            + s.attention_bias * s.kv_heads * s.head_dim
            + s.output_bias * s.hidden_size
            + s.mlp_bias * (2 * s.intermediate_size + s.hidden_size)
        )

    def base_body(self) -> int:
        """Parameters of all decoder layers of the base."""
        return self.base.num_hidden_layers * (self.query_key() + self.value_output_mlp() + self.small())

    def base_parameters(self) -> int:
        heads = 1 if self.base.tie_word_embeddings else 2
        return heads * self.head + self.base_body() + self.stage.hidden_size

    def base_quantized(self) -> int:
        """Weights that become 4-bit: the matrices of the decoder layers, not embeddings, head, norms and biases."""
        return self.base.num_hidden_layers * (self.query_key_matrices() + self.value_output_mlp())

    def stage_trained(self) -> int:
        """Parameters with a gradient; queries and keys of a seed stage have none."""
        own = self.head if self.stage.head == "own" else 0
        layer = self.value_output_mlp() + self.small() + self.attends * self.query_key()
        return self.stage.layers * layer + self.stage.hidden_size + own

    def stage_parameters(self) -> int:
        unused = self.stage.layers * self.query_key() if self.stage.init == "random" else 0
        return self.stage_trained() + unused


def base_weight_bytes(shape: Shape, quantization: str, width: int) -> float:
    """Of the loaded base; ``width`` is the compute dtype's bytes."""
    quantized = shape.base_quantized() if quantization == "nf4" else 0
    return quantized * NF4_BYTES + (shape.base_parameters() - quantized) * width


def optimizer_bytes(shape: Shape, optimizer: str) -> float:
    """AdamW: two float32 a parameter. 8 bit: two bytes, and for each 256 parameters two float32 absmax; what is smaller
    than ``EIGHT_BIT_MINIMUM`` elements stays in float32."""
    trained = shape.stage_trained()
    if optimizer == "adamw":
        return 8 * trained
    s = shape.stage
    # Norms are the small tensors (biases as well, where a family has them).
    small = s.layers * shape.small() + s.hidden_size if s.hidden_size < EIGHT_BIT_MINIMUM else 0
    return 8 * small + (trained - small) * (2 + 8 / 256)


def saved_activation_bytes(shape: Shape, width: int, *, on_cpu: bool = True) -> int:
    """What autograd keeps of one token in one stage layer, for ``width`` bytes of compute dtype."""
    s = shape.stage
    # float32 (K, D): inputs of the two norms; on a GPU the normed as well, and in half their casts.
    floats = 2 if on_cpu else 4 if width < 4 else 3
    halves = (2 if on_cpu else 3) * s.hidden_size + shape.attention_inner + 4 * s.intermediate_size
    return floats * s.hidden_size * 4 + halves * width + 2 * 4
