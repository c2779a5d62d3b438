"""What all stages are: a shape, decoder layers of the base's architecture, a final norm and an output head.

Parameters carry the names of transformers' Llama. How the layers take the hard tokens is each kind's own (``kind.py``).

Shape legend: K tokens, D hidden size, V vocabulary, L layers, G key/value heads, E head size; 2 is (key, value).
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from cascade_fast import ops
from cascade_fast.base.model import attention_shape
from cascade_fast.stages.lora import LentLinear, project
from cascade_fast.stages.rms_norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The shape of a stage. ``reads`` is the base's hidden state it starts from; see ``RunSettings.reads``."""

    kind: str = "append"
    reads: str
    init: str
    head: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    initializer_range: float
    activation: str
    attention_bias: bool  # on q, k, v
    output_bias: bool  # on o
    mlp_bias: bool
    query_key_norm: bool  # Qwen3 has a norm on q and k; without q and k there is nothing to norm

    @classmethod
    def from_base(cls, base_config: Any, *, layers: int, init: str, head: str, reads: str) -> "StageConfig":
        """The stage of a base with transformers' configuration ``base_config``."""
        heads, kv_heads, head_dim = attention_shape(base_config)
        qwen2 = base_config.model_type == "qwen2"  # has biases on q, k, v that its configuration does not name
        bias = bool(getattr(base_config, "attention_bias", False))
        return cls(
            reads=reads,
            init=init,
            head=head,
            layers=layers,
            hidden_size=base_config.hidden_size,
            intermediate_size=base_config.intermediate_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=base_config.vocab_size,
            rms_norm_eps=base_config.rms_norm_eps,
            initializer_range=base_config.initializer_range,
            activation=base_config.hidden_act,
            attention_bias=bias or qwen2,
            output_bias=bias and not qwen2,
            mlp_bias=bool(getattr(base_config, "mlp_bias", False)),
            query_key_norm=base_config.model_type == "qwen3",
        )

    @property
    def kv_shape(self) -> tuple[int, int, int, int] | None:
        """(L, 2, G, E): the keys and values a token leaves; None where each token stands for itself."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    # --- the modules that layers are made of --------------------------------------------------------------------------

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> Any:
        """The linear layer called ``name``."""
        return nn.Linear(inputs, outputs, bias=bias)

    def norm(self, size: int) -> Any:
        return RMSNorm(size, self.rms_norm_eps)


class GatedMLP(nn.Module):
    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = config.linear("gate_proj", size, inner, bias=bias)
        self.up_proj = config.linear("up_proj", size, inner, bias=bias)
        self.down_proj = config.linear("down_proj", inner, size, bias=bias)
        self.activation, self.silu = ACT2FN[config.activation], config.activation == "silu"

    def forward(self, x_KD: Tensor) -> Tensor:
        gate_KF, up_KF = project(x_KD, (self.gate_proj, self.up_proj))
        if self.silu and ops.fused("silu_mul", gate_KF.device):
            return project(ops.silu_mul(gate_KF, up_KF), (self.down_proj,))[0]
        return project(self.activation(gate_KF) * up_KF, (self.down_proj,))[0]


@dataclass(frozen=True)
class StageRun:
    """What a stage makes of K tokens.

    Attributes:
        entered_KD, output_KD: what went into its first layer and what came out of its last: the score compares them.
        normed_KD: what the head takes to logits.
        next_KD: what the next stage reads.
        kv_KL2GE: keys and values that the tokens leave behind; None where each token stands for itself.
    """

    entered_KD: Tensor
    output_KD: Tensor
    normed_KD: Tensor
    next_KD: Tensor
    kv_KL2GE: Tensor | None = None


class Stage(nn.Module):
    """What the stages of every kind have. ``inputs`` below are what the kind's :class:`StageTokens` hand out.

    Args:
        config: the shape.
        layers: the decoder layers.
        head_VD: the base's output head ``(V, D)``, used frozen where ``config.head == "shared"``; None where somebody
            else applies it (``CascadeForCausalLM``).
    """

    def __init__(self, config: StageConfig, layers: Iterable[nn.Module], head_VD: Tensor | None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(layers)
        self.norm = config.norm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.head == "own" else None
        # Not a parameter of the stage: saved once with the base, never trained.
        self.shared_head: Tensor  # None with a head of its own, or without head_VD
        self.register_buffer("shared_head", head_VD if config.head == "shared" else None, persistent=False)

    @property
    def head(self) -> Tensor:
        """The output head ``(V, D)``: its own and trained, or the base's and frozen."""
        return self.lm_head.weight if self.lm_head is not None else self.shared_head

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """``(output, normed)``, both ``(K, D)``: see :class:`StageRun`."""
        raise NotImplementedError

    def run(self, inputs: Any) -> StageRun:
        """What :meth:`forward` makes, and what is left for later tokens and stages."""
        raise NotImplementedError

    def decayed_only(self) -> list[nn.Parameter]:
        """Parameters that never get a gradient: only weight decay moves them."""
        return []

    def linears(self) -> list[nn.Linear]:
        """Those of the layers that only multiply: none of an adapter, whose updates are read elsewhere."""
        modules = list(self.layers.modules())
        if any(isinstance(module, LentLinear) for module in modules):
            return []
        return [module for module in modules if type(module) is nn.Linear]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
