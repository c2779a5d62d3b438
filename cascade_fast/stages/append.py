"""A stage: new decoder layers of the base's own architecture that take hard tokens, each for itself, to logits.

Attention over one key is the identity on its value, so a layer's attention is exactly
``o_proj(repeat_kv(v_proj(norm(x))))``: queries and keys need no compute. The seed's stage, a whole small language
model, has them all the same (their gradient is zero, only weight decay moves them); an identity stage does not.

*Warm start* (``init="identity"``, after LLaMA-Pro, arXiv 2401.02415): the stage reads the residual stream before the
base's final norm, ``o_proj`` and ``down_proj`` start at zero, the norm is the base's and so is the head, frozen.
At step 0 the stage is the base's own last step.

Parameters carry the names of transformers' Llama, so that a seed stage loads into ``LlamaForCausalLM``.

Shape legend: K tokens, D hidden size, F intermediate size, V vocabulary, H heads, G key/value heads, E head size.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from cascade_fast import ops


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
        heads = base_config.num_attention_heads
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
            kv_heads=base_config.num_key_value_heads or heads,
            head_dim=getattr(base_config, "head_dim", None) or base_config.hidden_size // heads,
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


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` in float32, rounded to the dtype that autocast multiplies in, if it is on."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_KD: Tensor) -> Tensor:
        device = x_KD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        if device == "cpu":
            rows_ND = x_KD.float().reshape(-1, x_KD.shape[-1])  # of heads, too
            return ops.rms_norm(rows_ND, self.weight.float(), self.eps, dtype=dtype).view(x_KD.shape)
        return nn.functional.rms_norm(x_KD.float(), x_KD.shape[-1:], self.weight.float(), self.eps).to(dtype)


class SingleKeyAttention(nn.Module):
    """Attention of a token to itself alone: exactly its value, projected."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.groups, self.kv_heads, self.head_dim = config.heads // config.kv_heads, config.kv_heads, config.head_dim
        size, bias = config.hidden_size, config.attention_bias
        if config.init == "random":  # as the seed's small language model; see the module's docstring
            self.q_proj = nn.Linear(size, config.heads * config.head_dim, bias=bias)
            self.k_proj = nn.Linear(size, config.kv_heads * config.head_dim, bias=bias)
            if config.query_key_norm:
                self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
                self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.v_proj = nn.Linear(size, config.kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, size, bias=config.output_bias)

    def forward(self, x_KD: Tensor) -> Tensor:
        value_KGE = self.v_proj(x_KD).unflatten(-1, (self.kv_heads, self.head_dim))
        value_KHE = value_KGE.repeat_interleave(self.groups, dim=-2)  # each key/value head serves `groups` queries
        return self.o_proj(value_KHE.flatten(-2))


class GatedMLP(nn.Module):
    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.activation = ACT2FN[config.activation]

    def forward(self, x_KD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_KD)) * self.up_proj(x_KD))


class StageLayer(nn.Module):
    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SingleKeyAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x_KD: Tensor) -> Tensor:
        x_KD = x_KD + self.self_attn(self.input_layernorm(x_KD))
        return x_KD + self.mlp(self.post_attention_layernorm(x_KD))


class Stage(nn.Module):
    """Appended stage: ``L`` layers, a final norm and an output head.

    Args:
        config: the shape.
        head_VD: the base's output head ``(V, D)``, used frozen where ``config.head == "shared"``.
        norm_D: the base's final norm ``(D,)``, where an identity stage starts from.
        seed: of the new weights; None where trained ones are about to be loaded: nothing is drawn, and a stage that
            shares the base's head may do without it (its ``head`` is None).
    """

    def __init__(
        self, config: StageConfig, *, head_VD: Tensor | None = None, norm_D: Tensor | None = None, seed: int | None = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(StageLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.head == "own" else None
        if config.head == "shared":
            if head_VD is None and seed is not None:
                raise ValueError("head_VD: None; a stage with head 'shared' needs the base's output head")
            # Not a parameter of the stage: saved once with the base, never trained.
            self.shared_head: Tensor  # None only in a stage made to be loaded into
            self.register_buffer("shared_head", head_VD, persistent=False)
        if seed is not None:
            self._initialise(norm_D, seed)

    @torch.no_grad()
    def _initialise(self, norm_D: Tensor | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        if self.config.init != "identity":
            return
        for layer in self.layers:
            assert isinstance(layer, StageLayer)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        if norm_D is not None:
            self.norm.weight.copy_(norm_D)

    @property
    def head(self) -> Tensor:
        """The output head ``(V, D)``: own and trained, or the base's and frozen."""
        return self.lm_head.weight if self.lm_head is not None else self.shared_head

    def forward(self, hidden_KD: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, normed)``, both ``(K, D)``: what the next stage reads, and what the head takes to logits.

        A stage that reads the residual stream hands the residual stream on; one that reads the last hidden state
        hands on its own, after its norm.
        """
        x_KD = hidden_KD.float()
        for layer in self.layers:
            x_KD = layer(x_KD)
        normed_KD = self.norm(x_KD)
        return (x_KD if self.config.reads == "residual" else normed_KD), normed_KD

    def decayed_only(self) -> list[nn.Parameter]:
        """Parameters that never get a gradient (queries and keys over one key): only weight decay moves them."""
        names = ("q_proj", "k_proj", "q_norm", "k_norm")
        return [p for name, p in self.named_parameters() if any(f".{n}." in name for n in names)]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
