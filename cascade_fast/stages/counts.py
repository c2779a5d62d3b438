"""What a stage has and costs, from its shape alone: parameters, FLOPs, memory.

Shape legend: D hidden size, F intermediate size, V vocabulary, H heads, G key/value heads, E head size, L layers.
"""

from dataclasses import dataclass

from cascade_fast.settings import RunSettings
from cascade_fast.stages.stage import StageConfig

# Kernels of a training step in float16 on a GPU that has ours, counted on a pretend card: of a layer there and back,
# and of what a step has once: the stage around its layers and the sums of losses, the loss of one chunk, the
# optimizer; "easy": what easy tokens that go through the stage add. docs/gpu.md explains them; tests/test_launches.py
# counts them again.
LAUNCHES = {
    "append": {"layer": 25, "once": 17, "loss": 10, "optimizer": 5},
    "second look": {"layer": 36, "once": 55, "loss": 10, "optimizer": 5, "easy_layer": 19, "easy_once": 38},
    "adapters": {"layer": 69, "once": 57, "loss": 10, "optimizer": 5, "easy_layer": 31, "easy_once": 39},
}


@dataclass(frozen=True)
class StageCounts:
    """Parameters and FLOPs of a stage that takes each token for itself, and of the base's layers, which are alike."""

    config: StageConfig

    launches = LAUNCHES["append"]

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

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of every linear layer."""
        c, inner = self.config, self.attention_inner
        into, out = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        key_value = (c.hidden_size, c.kv_heads * c.head_dim)
        return {
            "q_proj": (c.hidden_size, inner),
            "k_proj": key_value,
            "v_proj": key_value,
            "o_proj": (inner, c.hidden_size),
            "gate_proj": into,
            "up_proj": into,
            "down_proj": out,
        }

    def largest_matrix(self) -> int:
        return max(inputs * outputs for inputs, outputs in self.linear_sizes().values())

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

    def trained_matrices(self) -> int:
        """Those of them with a gradient. Autocast copies these, and no others."""
        return self.matrices()

    def frozen(self) -> int:
        """Parameters of the base's that the stage uses as they are, its head left out."""
        return 0

    def trained(self) -> int:
        """Parameters with a gradient."""
        own = self.head if self.config.head == "own" else 0
        return self.config.layers * self.layer_trained() + self.config.hidden_size + own

    def trained_below(self, elements: int) -> int:
        """Parameters with a gradient in tensors of fewer elements: norms (biases as well, where a family has them)."""
        small = self.config.layers * self.small() + self.config.hidden_size
        return small if self.config.hidden_size < elements else 0

    def largest_trained(self) -> int:
        """Elements of the largest tensor with a gradient, its head left out."""
        return self.largest_matrix()

    def parameters(self) -> int:
        unused = self.config.layers * self.query_key() if self.config.init == "random" else 0
        return self.trained() + unused

    def attention_flops(self, seq_len: int) -> int:
        """Of a token's forward pass, scores and weighted values; masked ones are computed too."""
        return 0

    def forward_flops(self, seq_len: int) -> int:
        """Of a token that goes through the layers without gradients, the head left out."""
        return 2 * self.matrices() + self.attention_flops(seq_len)

    def training_flops(self, seq_len: int) -> int:
        """Of a hard token in a step, forward and backward: two for each multiply-add, as many again for the gradient of
        the input, and for that of the weight where it is trained."""
        head_factor = 6 if self.config.head == "own" else 4
        products = 4 * self.matrices() + 2 * self.trained_matrices()
        return products + head_factor * self.head + 3 * self.attention_flops(seq_len)


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a kind takes beyond what every stage does: none where each token stands for itself.

    Args:
        width: bytes of the compute dtype.
        all_enter: whether every token enters the first stage, so that nobody reads the base's keys and values.
    """

    settings: RunSettings
    counts: StageCounts
    width: int
    all_enter: bool = False

    @property
    def stored(self) -> int:
        """Bytes of a number in the base's hidden store: float16 of a float32 base, where it fits."""
        return 4 if self.settings.store_dtype == "float32" else 2

    @property
    def kv_numbers(self) -> int:
        """Numbers in the keys and values that a token leaves."""
        return 0

    @property
    def recomputes(self) -> bool:
        """Whether the base's keys and values are made anew for every batch."""
        return False

    def training_bytes(self, tokens: int, on_cpu: bool) -> float:
        """Of a batch of ``tokens`` hard tokens, through a step."""
        return 0.0

    def evaluation_bytes(self, tokens: int, on_cpu: bool) -> float:
        """Of a batch without gradients."""
        return 0.0

    def base_pass_bytes(self, tokens: int, base_layers: int) -> float:
        """Of ``tokens`` tokens on their way through the base."""
        return 0.0
