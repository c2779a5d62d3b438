"""Skip the MLP of one layer of a Llama model for easy tokens. Random weights, a few seconds on a CPU.

The tokens' difficulty is the cosine between their embedding and what the MLP would read. A share of hard tokens is
chosen first; its threshold then serves generation, where tokens come one by one and none can be ranked.

    python examples/skip_layer.py
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cascade_fast.hard_token_gather import HardTokenGather


class MLPOnHardTokens(nn.Module):
    """Replaces a decoder layer's MLP. The layer adds its result to the residual stream; 0 leaves a token as it is."""

    def __init__(self, mlp: nn.Module, embed_tokens: nn.Module, gather: HardTokenGather) -> None:
        super().__init__()
        self.mlp, self.gather = mlp, gather
        self.computed = self.seen = 0
        self.threshold: Tensor | None = None  # of the last call
        embed_tokens.register_forward_hook(self._keep_embedding)

    def _keep_embedding(self, _module: nn.Module, _args: tuple, embedded_BSD: Tensor) -> None:
        self.embedded_BSD = embedded_BSD

    def forward(self, x_BSD: Tensor) -> Tensor:
        hard = self.gather(self.embedded_BSD, x_BSD)
        self.computed, self.seen = self.computed + hard.index_K.numel(), self.seen + x_BSD[..., 0].numel()
        self.threshold = hard.threshold
        return hard.scatter(self.mlp(hard.hidden_KD), into=torch.zeros_like(x_BSD))

    def share(self) -> float:
        """The share of tokens computed since the last time it was asked for."""
        share = self.computed / self.seen
        self.computed = self.seen = 0
        return share


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    ids_BS = torch.randint(0, config.vocab_size, (4, 64))
    with torch.inference_mode():
        plain_BSV = model(ids_BS).logits

        layer = model.model.layers[2]
        skipping = MLPOnHardTokens(layer.mlp, model.model.embed_tokens, HardTokenGather(hard_ratio=1.0))
        layer.mlp = skipping
        torch.testing.assert_close(model(ids_BS).logits, plain_BSV)
        print(f"hard_ratio 1.0: computed {skipping.share():.1%} of the tokens, logits equal to the plain model's")

        skipping.gather = HardTokenGather(hard_ratio=0.6)
        change = (model(ids_BS).logits - plain_BSV).abs().mean()
        print(
            f"hard_ratio 0.6: computed {skipping.share():.1%} of the tokens, logits change by {change:.4f} on average"
        )

        skipping.gather = HardTokenGather(threshold=skipping.threshold)
        model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=32, do_sample=False)
        print(f"generation, threshold {skipping.gather.threshold:.4f}: computed {skipping.share():.1%} of the tokens")


if __name__ == "__main__":
    main()
