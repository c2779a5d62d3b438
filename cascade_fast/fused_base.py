"""The frozen base's forward pass with what stands between its matrix products fused, on the CPU.

transformers' RMSNorm is eight passes over the hidden states there, its gated MLP three; together a quarter of a base
pass. The weights stay where they are; results differ from transformers' by the rounding of intermediate values.
"""

import functools

import torch
from torch import Tensor, nn

from cascade_fast import ops

# transformers' classes that compute weight * x / rms(x) with the weight as it is (Gemma's adds 1 to it).
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


def fuse(model: nn.Module) -> nn.Module:
    """Lets the norms and gated MLPs of a CPU model run through :mod:`cascade_fast.ops`; for inference."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in RMS_NORMS:
            module.forward = functools.partial(_rms_norm, module)  # type: ignore[method-assign]
        elif kind in GATED_MLPS and isinstance(module.act_fn, _silu()):
            module.forward = functools.partial(_gated_mlp, module)  # type: ignore[method-assign]
    return model


@functools.cache
def _silu() -> type:
    """transformers' own class of the activation, which is not torch's."""
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _rms_norm(module: nn.Module, hidden: Tensor) -> Tensor:
    eps: float = module.variance_epsilon  # type: ignore[assignment]
    weight_D: Tensor = module.weight.to(torch.float32)  # type: ignore[assignment, operator]
    rows_ND = hidden.reshape(-1, hidden.shape[-1])
    return ops.rms_norm(rows_ND, weight_D, eps, dtype=hidden.dtype).view(hidden.shape)


def _gated_mlp(module: nn.Module, hidden: Tensor) -> Tensor:
    rows_ND = hidden.reshape(-1, hidden.shape[-1])
    inner_NF = ops.silu_mul(module.gate_proj(rows_ND), module.up_proj(rows_ND))  # type: ignore[operator]
    return module.down_proj(inner_NF).view(hidden.shape)  # type: ignore[operator]
