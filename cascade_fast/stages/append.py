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

from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast.base.base_pass import BasePass
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import StageKind
from cascade_fast.stages.rms_norm import RMSNorm
from cascade_fast.stages.stage import GatedMLP, Stage, StageConfig, StageRun


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


class AppendedLayer(nn.Module):
    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SingleKeyAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x_KD: Tensor, added_KD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream, and what is still to be added to it, before and after."""
        x_KD, normed_KD = self.input_layernorm.after(x_KD, added_KD)
        x_KD, normed_KD = self.post_attention_layernorm.after(x_KD, self.self_attn(normed_KD))
        return x_KD, self.mlp(normed_KD)


class AppendedStage(Stage):
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
        if config.head == "shared" and head_VD is None and seed is not None:
            raise ValueError("head_VD: None; a stage with head 'shared' needs the base's output head")
        super().__init__(config, (AppendedLayer(config) for _ in range(config.layers)), head_VD)
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
            assert isinstance(layer, AppendedLayer)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        if norm_D is not None:
            self.norm.weight.copy_(norm_D)

    def forward(self, hidden_KD: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, normed)``, both ``(K, D)``: what the next stage reads, and what the head takes to logits.

        A stage that reads the residual stream hands the residual stream on; one that reads the last hidden state
        hands on its own, after its norm.
        """
        x_KD, added_KD = hidden_KD.float(), None
        for layer in self.layers:
            x_KD, added_KD = layer(x_KD, added_KD)
        x_KD, normed_KD = self.norm.after(x_KD, added_KD)
        return (x_KD if self.config.reads == "residual" else normed_KD), normed_KD

    def run(self, hidden_KD: Tensor) -> StageRun:
        output_KD, normed_KD = self(hidden_KD)
        return StageRun(hidden_KD, output_KD, normed_KD, next_KD=output_KD)

    def decayed_only(self) -> list[nn.Parameter]:
        """Queries and keys over one key."""
        names = ("q_proj", "k_proj", "q_norm", "k_norm")
        return [p for name, p in self.named_parameters() if any(f".{n}." in name for n in names)]


class Append(StageKind):
    """New layers after the base's last. Each token for itself, so all is as :class:`StageKind` has it."""

    name = "append"
    layer_class = AppendedLayer

    def new(
        self, settings: RunSettings, base_config: Any, passed: BasePass, before: Stage | None, number: int
    ) -> AppendedStage:
        shared = passed.head_VD if settings.head == "shared" else None
        norm_D = passed.norm_D if before is None else before.norm.weight
        return AppendedStage(
            self.config(settings, base_config), head_VD=shared, norm_D=norm_D, seed=settings.seed + number
        )

    def empty(self, config: StageConfig, head_VD: Tensor | None = None) -> AppendedStage:
        return AppendedStage(config, head_VD=head_VD, seed=None)


KIND = Append()
