"""What a stage has and costs, from its shape alone: parameters, FLOPs, memory.

Shape legend: D hidden size, F intermediate size, V vocabulary, H heads, G key/value heads, E head size, L layers.
"""

from dataclasses import dataclass

from cascade_fast.settings import RunSettings
from cascade_fast.stages.stage import StageConfig


@dataclass(frozen=True)
class StageCounts:
    """Parameters and FLOPs of a stage that takes each token for itself, and of the base's layers, which are alike."""

    config: StageConfig

    # Kernels of a layer in eager mode, forward 35 and backward 75; counted with TorchDispatchMode.
    layer_launches = 110

    @property
    def attention_inner(self) -> int:
        return self.config.heads * self.config.head_dim

    @property
    def head(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    # --- of a layer ---------------------------------------------------------------------------------------------------

    def query_key(self) -> int:
        """Projections of queries and keys with their biases and norms."""
        c = self.config
        inner = self.attention_inner + c.kv_heads * c.head_dim
        return inner * (c.hidden_size + c.attention_bias) + (2 * c.head_dim if c.query_key_norm else 0)

    def query_key_matrices(self) -> int:
        c = self.config
        return c.hidden_size * (self.attention_inner + c.kv_heads * c.head_dim)

    def value_output_mlp(self) -> int:
        """Matrices that a stage of single tokens multiplies with."""
        c = self.config
        return c.hidden_size * (c.kv_heads * c.head_dim + self.attention_inner + 3 * c.intermediate_size)

    def small(self) -> int:
        """Norms, and biases of everything but queries and keys."""
        c = self.config
        return (
            2 * c.hidden_size
            + c.attention_bias * c.kv_heads * c.head_dim
            + c.output_bias * c.hidden_size
            + c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)
        )

    # --- of the stage -------------------------------------------------------------------------------------------------

    def layer_matrices(self) -> int:
        """Of a layer: what it multiplies with."""
        return self.value_output_mlp()

    def layer_trained(self) -> int:
        """Of a layer: parameters with a gradient; queries and keys over one key have none."""
        return self.value_output_mlp() + self.small()

    def matrices(self) -> int:
        """Matrices that the stage multiplies with, its head left out."""
        return self.config.layers * self.layer_matrices()

    def trained(self) -> int:
        """Parameters with a gradient."""
        own = self.head if self.config.head == "own" else 0
        return self.config.layers * self.layer_trained() + self.config.hidden_size + own

    def parameters(self) -> int:
        unused = self.config.layers * self.query_key() if self.config.init == "random" else 0
        return self.trained() + unused

    def attention_flops(self, seq_len: int) -> int:
        """Of a token's forward pass, scores and weighted values; masked ones are computed too."""
        return 0

    def training_flops(self, seq_len: int) -> int:
        """Of a hard token in a step, forward and backward: two for each multiply-add, twice that again for the
        gradients of input and weight."""
        head_factor = 6 if self.config.head == "own" else 4  # a frozen head has no gradient of its own
        return 6 * self.matrices() + head_factor * self.head + 3 * self.attention_flops(seq_len)


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a kind takes beyond what every stage does: none where each token stands for itself.

    Args:
        width: bytes of the compute dtype.
    """

    settings: RunSettings
    counts: StageCounts
    width: int

    @property
    def stored(self) -> int:
        """Bytes of a number in the base's hidden store: float16 of a float32 base, where it fits."""
        return 4 if self.settings.store_dtype == "float32" else 2

    @property
    def kv_numbers(self) -> int:
        """Numbers in the keys and values that a token leaves."""
        return 0

    def training_bytes(self, tokens: int, on_cpu: bool) -> float:
        """Of a batch of ``tokens`` hard tokens, through a step."""
        return 0.0

    def evaluation_bytes(self, tokens: int, on_cpu: bool) -> float:
        """Of a batch without gradients."""
        return 0.0

    def base_pass_bytes(self, tokens: int, base_layers: int) -> float:
        """Of ``tokens`` tokens on their way through the base."""
        return 0.0
