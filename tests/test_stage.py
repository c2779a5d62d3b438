"""The stage: exactly transformers' layers over one key, the seed's parameter counts, the warm start."""

import pytest
import torch
from conftest import tiny_llama_config
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.stage import StageConfig

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
# SmolLM2-135M's shape.
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def _random_stage(base_config, layers: int = 2, seed: int = 1) -> AppendedStage:
    return AppendedStage(
        StageConfig.from_base(base_config, layers=layers, init="random", head="own", reads="last_hidden"), seed=seed
    )


def hugging_face_names(stage: AppendedStage) -> dict[str, torch.Tensor]:
    """The stage's weights under the names of a whole language model with a tied head."""
    state = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in stage.state_dict().items()}
    return {**state, "model.embed_tokens.weight": state["lm_head.weight"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_stage_is_the_family_s_model_over_sequences_of_length_one(family):
    config_class, model_class, changes = FAMILIES[family]
    base_config = config_class(
        **{**tiny_llama_config().to_dict(), "num_hidden_layers": 2, **changes, "model_type": config_class.model_type}
    )
    stage = _random_stage(base_config)
    with torch.no_grad():
        for parameter in stage.parameters():  # biases and norms too: zeros and ones would hide a mistake
            parameter.normal_(std=0.3)
    model = model_class(base_config)
    model.load_state_dict(hugging_face_names(stage))
    hidden = torch.randn(17, base_config.hidden_size)
    expected = model(inputs_embeds=hidden[:, None], output_hidden_states=True)
    output, normed = stage(hidden)
    torch.testing.assert_close(normed, expected.hidden_states[-1][:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output, normed)
    torch.testing.assert_close(normed @ stage.head.T, expected.logits[:, 0], rtol=1e-4, atol=1e-4)


def test_the_seed_s_stage_has_the_seed_s_parameters():
    with torch.device("meta"):
        config = StageConfig.from_base(LlamaConfig(**SMOLLM2), layers=8, init="random", head="own", reads="last_hidden")
        assert sum(p.numel() for p in _parameters_on_meta(config)) == 56_632_896


def _parameters_on_meta(config: StageConfig):
    from unittest import mock

    with mock.patch.object(AppendedStage, "_initialise"):
        return list(AppendedStage(config).parameters())


def _identity_stage(dtype=torch.float32):
    base = LlamaForCausalLM(tiny_llama_config()).to(dtype).eval()
    with torch.no_grad():
        base.model.norm.weight.normal_(1.0, 0.2)
    shape = StageConfig.from_base(base.config, layers=3, init="identity", head="shared", reads="residual")
    return base, AppendedStage(
        shape, head_VD=base.lm_head.weight.detach(), norm_D=base.model.norm.weight.detach(), seed=3
    )


def test_an_identity_stage_is_the_base_s_own_last_step():
    base, stage = _identity_stage()
    kept = {}
    base.model.norm.register_forward_pre_hook(lambda _m, args: kept.update(residual=args[0]))
    logits = base(torch.randint(0, 300, (3, 20))).logits
    residual = kept["residual"].flatten(0, 1)
    output, normed = stage(residual)
    assert torch.equal(output, residual)
    torch.testing.assert_close(normed @ stage.head.T, logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_an_identity_stage_learns_and_leaves_the_head_alone():
    _, stage = _identity_stage()
    names = {name for name, _ in stage.named_parameters()}
    assert not any("q_proj" in n or "k_proj" in n or "head" in n for n in names)
    assert "shared_head" not in stage.state_dict()
    head = stage.head.clone()
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    hidden, labels = torch.randn(32, 32), torch.randint(0, 300, (32,))
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(stage(hidden)[1] @ stage.head.T, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(stage.head, head)


def test_same_seed_same_weights():
    one, two, other = (_random_stage(tiny_llama_config(), seed=s) for s in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_shared_head_has_to_be_given():
    shape = StageConfig.from_base(tiny_llama_config(), layers=1, init="identity", head="shared", reads="residual")
    with pytest.raises(ValueError, match="head_VD: None"):
        AppendedStage(shape)


def test_only_queries_and_keys_have_no_gradient():
    stage = _random_stage(tiny_llama_config())
    stage(torch.randn(5, 32))[1].sum().backward()
    without = {id(p) for p in stage.decayed_only()}
    assert len(without) == 4  # q and k of two layers
    for name, parameter in stage.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in without or name == "lm_head.weight")
