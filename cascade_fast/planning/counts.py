"""Parameter counts of a base and of the stages on it, from shapes alone, and the bytes that follow from them.

Shape legend: D hidden size, F intermediate size, V vocabulary, H heads, G key/value heads, E head size, L layers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cascade_fast.base.base_pass import BaseNeeds
from cascade_fast.settings import RunSettings
from cascade_fast.stages.counts import StageCounts, StageMemory
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
    needs: BaseNeeds  # as the base pass meets them

    @classmethod
    def from_settings(cls, settings: RunSettings, base_config: Any, labelled_share: float = 1.0) -> "Shape":
        """``labelled_share``: of the tokens; only where all have a label can all enter a stage."""
        kind = get_kind(settings.stage_kind)
        asked = kind.needs(settings)
        all_enter = asked.all_enter and labelled_share == 1
        needs = dataclasses.replace(asked, all_enter=all_enter, keys_and_values=asked.keys_and_values and not all_enter)
        return cls(base_config, kind, kind.config(settings, base_config), needs)

    def memory(self, settings: RunSettings, width: int) -> StageMemory:
        """What the kind takes beyond what every stage does. ``width``: bytes of the compute dtype."""
        return self.kind.memory(settings, self.stage, width, all_enter=self.needs.all_enter)

    @property
    def counts(self) -> StageCounts:
        """Of a stage; its layers are as large as the base's."""
        return self.kind.counts(self.stage)

    def step_flops(self, settings: RunSettings) -> int:
        """Of a hard token in a training step, and of the easy tokens beside it that go through the stage, too."""
        flops = self.counts.training_flops(settings.seq_len)
        if settings.easy_tokens == "forward":
            flops += round((1 / settings.hard_ratio - 1) * self.counts.forward_flops(settings.seq_len))
        return flops

    def base_body(self) -> int:
        """Parameters of all decoder layers of the base."""
        layer = self.counts
        return self.base.num_hidden_layers * (layer.query_key() + layer.value_output_mlp() + layer.small())

    def base_layer_tokens(self, tokens: int, train_tokens: int) -> int:
        """Of a base pass over ``tokens`` tokens: each as often as it goes through a layer. Where every token enters the
        first stage, training text goes through those before the stage alone."""
        left_out = train_tokens * self.needs.last_layers if self.needs.all_enter else 0
        return tokens * self.base.num_hidden_layers - left_out

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


def kept_layer_bytes(shape: Shape, quantization: str, width: int) -> float:
    """Of the base's last layers and final norm, as the base pass keeps them for the stages; 0 where they need none."""
    layers, counts = shape.needs.last_layers, shape.counts
    if layers == 0:
        return 0.0
    matrices = layers * (counts.query_key_matrices() + counts.value_output_mlp())
    whole = layers * (counts.query_key() + counts.value_output_mlp() + counts.small()) + shape.stage.hidden_size
    return matrices * (NF4_BYTES if quantization == "nf4" else width) + (whole - matrices) * width


def optimizer_bytes(shape: Shape, optimizer: str) -> float:
    """AdamW: two float32 a parameter. 8 bit: two bytes, and for each 256 parameters two float32 absmax; what is smaller
    than ``EIGHT_BIT_MINIMUM`` elements stays in float32."""
    trained = shape.counts.trained()
    if optimizer == "adamw":
        return 8 * trained
    small = shape.counts.trained_below(EIGHT_BIT_MINIMUM)
    return 8 * small + (trained - small) * (2 + 8 / 256)


def gradient_bytes(shape: Shape, width: int, *, halves: bool) -> float:
    """Of a stage: float32, but of 16-bit copies of weights 16 bit, where there are any (``halves``)."""
    return 4.0 * shape.counts.trained() - ((4.0 - width) * shape.counts.trained_matrices() if halves else 0.0)


def has_half_weights(
    settings: RunSettings, shape: Shape, width: int, micro: int, *, on_cpu: bool, gpus: int = 1
) -> bool:
    """Whether linear layers multiply with 16-bit copies of their weights: see training/half_weights.py. ``micro``:
    tokens of a forward and backward pass. Gradients of several GPUs add up in float32."""
    trained = shape.counts.frozen() == 0 and settings.optimizer == "adamw"
    return trained and not on_cpu and width == 2 and micro >= settings.batch_tokens and gpus == 1


def saved_activation_bytes(shape: Shape, width: int, *, on_cpu: bool = True) -> int:
    """What autograd keeps of one token in one stage layer, for ``width`` bytes of compute dtype."""
    s = shape.stage
    # float32 (K, D): inputs of the two norms; on a GPU the normed as well, and in half their casts, if they learn.
    plain = on_cpu or shape.counts.frozen() > 0
    floats = 2 if plain else 4 if width < 4 else 3
    gated = 3 if on_cpu and s.activation == "silu" else 4  # of the gated MLP: silu_mul keeps its inputs alone
    halves = (2 if plain else 3) * s.hidden_size + shape.counts.attention_inner + gated * s.intermediate_size
    return floats * s.hidden_size * 4 + halves * width + 2 * 4
