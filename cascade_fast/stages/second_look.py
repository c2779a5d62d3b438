"""A second look: a trainable copy of the base's last layers that reads hard tokens again, in their context.

A hard token re-enters at the residual stream before the first of these layers. In each layer its query attends, at its
true position, to the keys and values of its sequence so far: the stage's own at hard tokens; at all others what the
exits before have left, the base's own to begin with. An easy token costs nothing here but its keys and values, which
the base has computed anyway (they are its KV cache). Before training the stage repeats what the base has done, so
that the cascade is the base.

Parameters carry the names of transformers' Llama, so that the base's layers load into a stage and back.

Shape legend: B sequences of a pack, S sequence length, N = B * S tokens, K hard tokens among them, Q most hard tokens
of one sequence, L layers, D hidden size, H heads, G key/value heads, E head size, V vocabulary; 2 is (key, value).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast.base.base_pass import BasePass
from cascade_fast.base.fill_store import BaseNeeds
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute, padded_rows
from cascade_fast.settings import RunSettings
from cascade_fast.stages.attention import AttentionInputs, attend
from cascade_fast.stages.kind import StageKind
from cascade_fast.stages.lora import LentLinear, LentNorm, LoraShape, Updates, fill_frozen, initialise, lend, project
from cascade_fast.stages.second_look_sizes import AdapterCounts, AdapterMemory, SecondLookCounts, SecondLookMemory
from cascade_fast.stages.stage import GatedMLP, Stage, StageConfig, StageRun
from cascade_fast.stages.tokens import Recompute, SequencePack, SequenceTokens

# Those whose angle at a position does not depend on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class SecondLookConfig(StageConfig):
    """The shape of a stage that copies the base's layers from ``entry_layer`` on. ``rope`` is transformers'
    ``rope_parameters``, ``positions`` its ``max_position_embeddings``."""

    kind: str = "second-look"
    entry_layer: int
    positions: int
    rope: dict[str, Any]
    lora: dict[str, Any] | None = None  # fields of LoraShape; None: all weights are trained

    def __post_init__(self) -> None:
        if self.lora is not None:
            LoraShape.from_dict(self.lora)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> Any:
        if self.lora is None:
            return super().linear(name, inputs, outputs, bias=bias)
        lora = LoraShape.from_dict(self.lora)
        return LentLinear(inputs, outputs, lora if name in lora.targets else None)

    def norm(self, size: int) -> Any:
        return super().norm(size) if self.lora is None else LentNorm(self.rms_norm_eps)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "lora" or value is not None}

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """(L, 2, G, E): a token's keys and values."""
        return self.layers, 2, self.kv_heads, self.head_dim

    @classmethod
    def from_base(
        cls,
        base_config: Any,
        *,
        layers: int,
        init: str = "identity",
        head: str = "shared",
        reads: str = "residual",
        lora: dict[str, Any] | None = None,
    ) -> "SecondLookConfig":
        """The shape of a copy of the last ``layers`` layers of a base with transformers' ``base_config``. A copy has
        the one ``init``, ``head`` and ``reads`` of the defaults, whatever is asked."""
        shape = StageConfig.from_base(base_config, layers=layers, init="identity", head="shared", reads="residual")
        return cls(
            **{**shape.to_dict(), "kind": "second-look"},
            entry_layer=base_config.num_hidden_layers - layers,
            positions=base_config.max_position_embeddings,
            rope=dict(base_config.rope_parameters),
            lora=lora,
        )


Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
Stream = tuple[Tensor, Tensor | None]  # the residual stream, and what is still to be added to it, (K, D) both


class SecondLookAttention(nn.Module):
    def __init__(self, config: SecondLookConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = config.linear("q_proj", size, config.heads * config.head_dim, bias=bias)
        self.k_proj = config.linear("k_proj", size, config.kv_heads * config.head_dim, bias=bias)
        self.v_proj = config.linear("v_proj", size, config.kv_heads * config.head_dim, bias=bias)
        self.o_proj = config.linear("o_proj", config.heads * config.head_dim, size, bias=config.output_bias)
        self.query_key_norm = config.query_key_norm
        if config.query_key_norm:
            self.q_norm = config.norm(config.head_dim)
            self.k_norm = config.norm(config.head_dim)

    def heads_of(self, x_KD: Tensor, dtype: torch.dtype) -> Heads:
        """Queries, keys and values ``(K, H or G, E)``, not yet rotated."""
        query, key, value = project(x_KD, (self.q_proj, self.k_proj, self.v_proj))
        query_KHE = query.unflatten(-1, (self.heads, self.head_dim))
        key_KGE = key.unflatten(-1, (self.kv_heads, self.head_dim))
        value_KGE = value.unflatten(-1, (self.kv_heads, self.head_dim))
        if self.query_key_norm:
            query_KHE, key_KGE = self.q_norm(query_KHE), self.k_norm(key_KGE)
        return query_KHE.to(dtype), key_KGE.to(dtype), value_KGE.to(dtype)

    def forward(self, heads: Heads, inputs: AttentionInputs, layer: int, left: list[Tensor] | None) -> Tensor:
        """What attention adds, ``(K, D)``. ``left``, if given, gets the tokens' keys and values ``(K, 2, G, E)``."""
        attended_KHE = attend(*heads, inputs, layer, left)
        return project(attended_KHE.flatten(1), (self.o_proj,))[0]


class SecondLookLayer(nn.Module):
    def __init__(self, config: SecondLookConfig) -> None:
        super().__init__()
        self.input_layernorm = config.norm(config.hidden_size)
        self.self_attn = SecondLookAttention(config)
        self.post_attention_layernorm = config.norm(config.hidden_size)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_KD: Tensor, added_KD: Tensor | None, inputs: AttentionInputs, layer: int, left: list[Tensor] | None
    ) -> Stream:
        """The residual stream, and what is still to be added to it, before and after."""
        x_KD, heads = self._begin((x_KD, added_KD), inputs)
        return self._end(x_KD, self.self_attn(heads, inputs, layer, left))

    def with_easy(
        self,
        hard: Stream,
        easy: Stream,
        hard_inputs: AttentionInputs,
        easy_inputs: AttentionInputs,
        left: list[Tensor] | None,
    ) -> tuple[Stream, Stream]:
        """The same of hard and easy tokens, which attend to each other. Easy ones have no gradient.

        Hard ones go first: autocast keeps the copies of weights that it makes first, with their gradients or without.
        """
        x_KD, heads = self._begin(hard, hard_inputs)
        with torch.no_grad():
            easy_x_KD, easy_heads = self._begin(easy, easy_inputs)
            over_easy = hard_inputs.over(*easy_heads[1:], beneath=easy_inputs)
            over_hard = easy_inputs.over(*heads[1:], beneath=hard_inputs)
        hard = self._end(x_KD, self.self_attn(heads, over_easy, 0, left))
        with torch.no_grad():
            easy = self._end(easy_x_KD, self.self_attn(easy_heads, over_hard, 0, None))
        return hard, easy

    def _begin(self, stream: Stream, inputs: AttentionInputs) -> tuple[Tensor, Heads]:
        x_KD, normed_KD = self.input_layernorm.after(*stream)
        return x_KD, self.self_attn.heads_of(normed_KD, inputs.kv_L2PE.dtype)

    def _end(self, x_KD: Tensor, attended_KD: Tensor) -> Stream:
        x_KD, normed_KD = self.post_attention_layernorm.after(x_KD, attended_KD)
        return x_KD, self.mlp(normed_KD)


class SecondLookStage(Stage):
    """The base's layers from ``config.entry_layer`` on, its final norm, and its output head, frozen.

    Args:
        config: the shape.
        head_VD: the base's output head ``(V, D)``; None where somebody else applies it (``CascadeForCausalLM``).
        weights: names and tensors to start from: the base's own (see ``BasePass.layers``), or those of the stage
            before. None where trained ones are about to be loaded.
    """

    config: SecondLookConfig

    def __init__(
        self, config: SecondLookConfig, *, head_VD: Tensor | None, weights: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(config, (SecondLookLayer(config) for _ in range(config.layers)), head_VD)
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # late: see auto_classes.py

        self.rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.positions,
                rope_parameters=dict(config.rope),
            )
        )
        self.updates: Updates | None = None  # of layers that are lent
        if weights is not None:
            self.load_state_dict(weights)

    def forward(self, pack: SequencePack, left: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``(output, normed)``, both ``(K, D)``: the residual stream after the last layer, and what the head takes to
        logits. ``left``, if given, gets the tokens' keys and values ``(K, 2, G, E)`` of every layer."""
        stream, inputs = self._begin(pack, leaves=left is not None)
        if self.updates is not None:
            self.updates.place()
        if pack.easy is None:
            for number, layer in enumerate(self.layers):
                stream = layer(*stream, inputs, number, left)
        else:
            easy, easy_inputs = self._begin(pack.easy, leaves=False)
            layers: Any = self.layers
            for layer in layers:
                stream, easy = layer.with_easy(stream, easy, inputs, easy_inputs, left)
        x_KD, normed_KD = self.norm.after(*stream)
        if inputs.at_once:  # elsewhere there is no padding to leave out, and a slice's gradient is two kernels
            tokens = pack.hidden_KD.shape[0]
            x_KD, normed_KD = x_KD[:tokens], normed_KD[:tokens]
        return x_KD, normed_KD

    def _begin(self, pack: SequencePack, *, leaves: bool) -> tuple[Stream, AttentionInputs]:
        x_KD = pack.hidden_KD.float()
        cos_1KE, sin_1KE = self.rotary(x_KD, pack.position_K[None])
        inputs = AttentionInputs.from_pack(
            pack, self.config.heads, self.config.kv_shape, cos_1KE[0], sin_1KE[0], leaves=leaves
        )
        return (padded_rows(x_KD) if inputs.at_once else x_KD, None), inputs

    @torch.no_grad()
    def keys_and_values(self, hidden_BSD: Tensor, position_BS: Tensor | None = None) -> Tensor:
        """``(B, S, L, 2, G, E)`` of whole sequences, every token of which goes through these layers: for a stage that
        has not been trained, the base's own. A row may hold several sequences, as their positions say (None: one)."""
        rows, width = hidden_BSD.shape[:2]
        row_N = torch.arange(rows * width, device=hidden_BSD.device)
        left: list[Tensor] = []
        column_N = row_N % width
        position_N = column_N if position_BS is None else position_BS.flatten()
        begin_N = None if position_BS is None else column_N - position_N
        hidden_ND = hidden_BSD.flatten(0, 1)
        pack = SequencePack(hidden_ND, position_N, row_N, row_N, width, None, (rows, width), begin_K=begin_N)
        self(pack, left)
        return torch.stack(left, dim=1).unflatten(0, (rows, width))

    def run(self, pack: SequencePack) -> StageRun:
        left: list[Tensor] = []
        output_KD, normed_KD = self(pack, left)
        # The next look enters where this one did.
        return StageRun(pack.hidden_KD, output_KD, normed_KD, next_KD=pack.hidden_KD, kv_KL2GE=torch.stack(left, dim=1))


class SecondLook(StageKind):
    """The base's last layers again, trained, in which hard tokens attend to their whole text.

    Trained are all weights of a copy, or with an adapter low-rank updates of the base's own layers, which stay frozen.
    """

    name = "second-look"
    config_class = SecondLookConfig
    layer_class = SecondLookLayer
    attends = True

    def describe(self, config: StageConfig) -> str:
        assert isinstance(config, SecondLookConfig)
        if config.lora is None:
            return f"copies of its last {config.layers} layers trained to read its *hard* tokens again"
        return f"LoRA adapters of its last {config.layers} layers trained to read its *hard* tokens again"

    def check(self, base: str, base_config: Any, settings: RunSettings) -> None:
        """Raises InputError where a copy cannot be what the base is."""
        if settings.base_quantization != "none" and settings.adapter == "none":
            raise InputError(
                f"base_quantization: {settings.base_quantization!r}; must be none with stage_kind {self.name}, which "
                "copies the base's layers; or --adapter lora, which leaves them as they are"
            )
        if settings.easy_tokens == "forward" and settings.num_stages > 1:
            raise InputError(
                f"num_stages: {settings.num_stages}; must be 1 with easy_tokens forward, after which every token enters"
            )
        if settings.easy_tokens == "forward" and settings.kv == "store":
            raise InputError("kv: 'store'; must be auto or recompute with easy_tokens forward, which reads none")
        has, layers = base_config.num_hidden_layers, settings.layers_per_stage
        if layers > has:
            raise InputError(
                f"layers_per_stage: {layers}; a second look copies the last layers of {base!r}, which has {has}"
            )
        rope_type = base_config.rope_parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise InputError(
                f"stage_kind: {self.name}; {base!r} has rotary positions of type {rope_type}, must be one of "
                f"{', '.join(ROPE_TYPES)}"
            )
        window = getattr(base_config, "sliding_window", None)
        if window is not None and window < settings.seq_len:
            raise InputError(
                f"seq_len: {settings.seq_len}; {base!r} attends to the last {window} tokens only, which a second look "
                f"does not: must be at most {window}"
            )

    def needs(self, settings: RunSettings) -> BaseNeeds:
        return BaseNeeds(
            settings.reads,
            last_layers=settings.layers_per_stage,
            keys_and_values=settings.kv != "recompute" and settings.easy_tokens == "skip",
            context=True,
            all_enter=settings.hard_ratio == 1,
        )

    def config(self, settings: RunSettings, base_config: Any) -> SecondLookConfig:
        lora = LoraShape.from_settings(settings)
        return SecondLookConfig.from_base(
            base_config, layers=settings.layers_per_stage, lora=None if lora is None else lora.to_dict()
        )

    def new(
        self, settings: RunSettings, base_config: Any, passed: BasePass, before: Stage | None, number: int
    ) -> SecondLookStage:
        """A copy of the stage before, the first of the base's own layers. Adapters begin without effect."""
        shape = self.config(settings, base_config)
        weights = None if before is None else before.state_dict()
        if before is None and shape.lora is None:
            weights = {**passed.layers, "norm.weight": passed.norm_D}
        stage = SecondLookStage(shape, head_VD=passed.head_VD, weights=weights)
        if weights is None:
            initialise(stage, settings.seed + number)
        self.lend(stage, passed)
        return stage

    def empty(self, config: StageConfig, head_VD: Tensor | None = None) -> SecondLookStage:
        assert isinstance(config, SecondLookConfig)
        return SecondLookStage(config, head_VD=head_VD)

    def lend(self, stage: Stage, passed: BasePass) -> None:
        config = stage.config
        assert isinstance(config, SecondLookConfig)
        if config.lora is None:
            return
        if not passed.lent:
            with torch.device("meta"):
                full = dataclasses.replace(config, lora=None)
                layers, norm = nn.ModuleList(map(SecondLookLayer, [full] * full.layers)), full.norm(full.hidden_size)
            fill_frozen(layers, {name.removeprefix("layers."): tensor for name, tensor in passed.layers.items()})
            fill_frozen(norm, {"weight": passed.norm_D})
            in_4bit = any(type(module).__name__ == "Linear4bit" for module in layers.modules())
            passed.lent.update(layers=layers, norm=norm, together=None if in_4bit else {})
            passed.layers.clear()  # mapped from a file, of which there will be a copy with room for updates
        assert isinstance(stage, SecondLookStage)
        together = passed.lent["together"] if config.lora["targets"] else None  # else updates of others would count
        stage.updates = lend(passed.lent["layers"], passed.lent["norm"], stage, together)

    def lend_base(self, stage: Stage, base: Any) -> None:
        config = stage.config
        assert isinstance(config, SecondLookConfig)
        if config.lora is not None:
            lend(base.model.layers[config.entry_layer :], base.model.norm, stage)

    def recompute(
        self, settings: RunSettings, base_config: Any, passed: BasePass, compute: Compute
    ) -> Recompute | None:
        if settings.kv != "recompute" or passed.all_enter:
            return None
        if settings.easy_tokens == "forward" and all(len(s.labelled_index()) == len(s) for s in passed.stores.values()):
            return None  # every token enters
        shape = self.config(settings, base_config)
        if shape.lora is None:
            stage = self.new(settings, base_config, passed, None, 1)
        else:  # the base's layers alone
            stage = SecondLookStage(dataclasses.replace(shape, lora={**shape.lora, "targets": []}), head_VD=None)
            self.lend(stage, passed)
        frozen = stage.eval().requires_grad_(False).to(compute.device)
        kv_dtype = passed.stores["train"].handed_on_dtype

        def keys_and_values(hidden_BSD: Tensor, position_BS: Tensor | None) -> Tensor:
            with compute.autocast():
                return frozen.keys_and_values(hidden_BSD, position_BS).to(kv_dtype)

        return keys_and_values

    def tokens(
        self,
        stores: Sequence[HiddenStore],
        index_K: Tensor,
        recompute: Recompute | None = None,
        *,
        easy_too: bool = False,
    ) -> SequenceTokens:
        return SequenceTokens(stores, index_K, recompute, easy_too=easy_too)

    def mergeable(self, stages: Sequence[StageConfig]) -> bool:
        return len(stages) == 1

    def counts(self, config: StageConfig) -> SecondLookCounts:
        assert isinstance(config, SecondLookConfig)
        return (
            SecondLookCounts(config) if config.lora is None else AdapterCounts(config, LoraShape.from_dict(config.lora))
        )

    def memory(
        self, settings: RunSettings, config: StageConfig, width: int, *, all_enter: bool = False
    ) -> SecondLookMemory:
        counts = self.counts(config)
        if isinstance(counts, AdapterCounts):
            return AdapterMemory(settings, counts, width, all_enter)
        return SecondLookMemory(settings, counts, width, all_enter)


KIND = SecondLook()
