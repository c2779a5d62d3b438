"""Low-rank updates of frozen linear layers (LoRA, arXiv 2106.09685): ``x W^T + (alpha / rank) (x A^T) B^T``.

A stage with an adapter holds A and B only, under PEFT's names (``lora_A``, ``lora_B``). The frozen layers are the
base's own, lent to it by :func:`lend`: in memory once, whoever else uses them, in 16 bit or in bitsandbytes' 4 bit, and
no part of the stage's weights.

Shape legend: K tokens, D a layer's inputs, F its outputs, R rank.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast.input_checks import InputError, check_fields, shown
from cascade_fast.settings import LORA_TARGETS, RunSettings
from cascade_fast.stages.rms_norm import RMSNorm


@dataclass(frozen=True)
class LoraShape:
    """Rank, scale and the linear layers that get an update, in the order of ``LORA_TARGETS``."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def from_settings(cls, settings: RunSettings) -> "LoraShape | None":
        """None where all weights are trained."""
        if settings.adapter == "none":
            return None
        asked = settings.lora_targets or LORA_TARGETS
        return cls(settings.lora_rank, settings.lora_alpha, tuple(name for name in LORA_TARGETS if name in asked))

    @classmethod
    def from_dict(cls, given: Any) -> "LoraShape":
        """What :meth:`to_dict` has given. Raises InputError where it cannot be."""
        check_fields("lora", given, {"rank": int, "alpha": float, "targets": list})
        if given["rank"] < 1 or not 0 < given["alpha"] < math.inf:
            raise InputError(f"lora: rank {given['rank']}, alpha {given['alpha']}; must be above 0, and finite")
        for name in given["targets"]:
            if name not in LORA_TARGETS:
                raise InputError(f"lora: targets: {shown(name)}; must be some of {', '.join(LORA_TARGETS)}")
        return cls(given["rank"], float(given["alpha"]), tuple(given["targets"]))

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Lent:
    """Something of the base's that a module uses and does not own: no child of it, so that neither moving nor saving
    the module touches it."""

    def __init__(self) -> None:
        self.of_base: Any = None


class LentLinear(nn.Module):
    """A frozen linear layer of the base, with a low-rank update if ``lora`` is given."""

    def __init__(self, inputs: int, outputs: int, lora: LoraShape | None) -> None:
        super().__init__()
        self.lent = _Lent()
        self.scale = 0.0 if lora is None else lora.scale
        if lora is not None:
            self.lora_A = nn.Linear(inputs, lora.rank, bias=False)
            self.lora_B = nn.Linear(lora.rank, outputs, bias=False)

    @property
    def updated(self) -> bool:
        return self.scale != 0.0

    @property
    def frozen(self) -> Any:
        return self.lent.of_base

    @property
    def can_be_fused(self) -> bool:
        """Whether the frozen layer is a plain one: neither in 4 bit nor fetched from elsewhere by accelerate."""
        return type(self.frozen) is nn.Linear and not hasattr(self.frozen, "_hf_hook")

    def forward(self, x_KD: Tensor) -> Tensor:
        return project(x_KD, (self,))[0]


class LentNorm(RMSNorm):
    """A frozen norm of the base."""

    def __init__(self, eps: float) -> None:
        nn.Module.__init__(self)
        self.lent, self.eps = _Lent(), eps

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.lent.of_base.weight


def fill_frozen(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Makes ``tensors`` the weights of ``module``, which lies on the meta device; nothing is copied. Of linear layers
    in 4 bit they are what bitsandbytes' ``Linear4bit`` saves."""
    plain = dict(tensors)
    for name, linear in list(module.named_modules()):
        begin = f"{name}.weight."
        quantized = {key.removeprefix(begin): plain.pop(key) for key in tensors if key.startswith(begin)}
        if quantized:
            parent, _, child = name.rpartition(".")
            made = _in_4bit(linear, plain.pop(f"{name}.weight"), plain.pop(f"{name}.bias", None), quantized)
            setattr(module.get_submodule(parent), child, made)
    _, unexpected = module.load_state_dict(plain, strict=False, assign=True)
    assert not unexpected, unexpected
    module.requires_grad_(False)


def _in_4bit(linear: Any, codes: Tensor, bias: Tensor | None, quantized: dict[str, Tensor]) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        codes, quantized, requires_grad=False, device=codes.device, module=made
    )
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def lend(layers: Iterable[nn.Module], norm: nn.Module, stage: nn.Module) -> None:
    """Lends ``stage`` the layers that its modules stand for, by name, and the norm after them.

    Args:
        layers: decoder layers, of transformers' or ours, one for each of the stage's.
    """
    for layer, of_base in zip(stage.layers, layers, strict=True):  # type: ignore[arg-type]
        for name, module in layer.named_modules():
            if isinstance(module, LentLinear | LentNorm):
                module.lent.of_base = of_base.get_submodule(name)
    stage.norm.lent.of_base = norm  # type: ignore[union-attr]


@torch.no_grad()
def initialise(stage: nn.Module, seed: int) -> None:
    """As PEFT begins: A uniform (Kaiming's), B zero, so that the update is zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in stage.modules():
        if isinstance(module, LentLinear) and module.updated:
            nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5), generator=generator)
            module.lora_B.weight.zero_()


def project(x_KD: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """What each of ``layers`` makes of the same inputs, each ``(K, F)``."""
    if not all(isinstance(layer, LentLinear) for layer in layers):
        return [layer(x_KD) for layer in layers]
    if not all(layer.can_be_fused for layer in layers):
        return [_added(x_KD, layer) for layer in layers]
    device = x_KD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layers[0].frozen.weight.dtype
    tensors: list[Tensor | None] = []
    for layer in layers:
        updates = (layer.lora_A.weight, layer.lora_B.weight) if layer.updated else (None, None)
        tensors += [layer.frozen.weight, layer.frozen.bias, *updates]
    return list(_Projections.apply(x_KD, [layer.scale for layer in layers], dtype, *tensors))


def _added(x_KD: Tensor, layer: LentLinear) -> Tensor:
    """With a frozen layer that multiplies in its own way: in 4 bit, or fetched from elsewhere."""
    frozen_KF = layer.frozen(x_KD)
    if not layer.updated:
        return frozen_KF
    if not torch.is_autocast_enabled(x_KD.device.type):  # else it multiplies in the inputs' dtype, and keeps no copy
        x_KD = x_KD.to(layer.lora_A.weight.dtype)
    return frozen_KF + (layer.lora_B(layer.lora_A(x_KD)) * layer.scale).to(frozen_KF.dtype)


class _Projections(torch.autograd.Function):
    """Frozen layers of the same inputs, their updates added where the products stand. No gradient of frozen weights is
    made, and of the inputs only ``(K, D)`` and ``(K, R)`` are kept."""

    @staticmethod
    def forward(ctx, x_KD: Tensor, scales: list[float], dtype: torch.dtype, *tensors: Tensor | None):
        x_KD = x_KD.to(dtype)
        weights, biases, updates_a, updates_b = (list(tensors[part::4]) for part in range(4))
        a_RD = [a.to(dtype) for a in updates_a if a is not None]
        # The scale is in B, rounded together with it.
        b_FR = [None if b is None else (b * scale).to(dtype) for b, scale in zip(updates_b, scales, strict=True)]
        ranks = [0 if a is None else a.shape[0] for a in updates_a]
        all_a_RD = torch.cat(a_RD) if a_RD else None
        low_KR = None if all_a_RD is None else x_KD @ all_a_RD.t()
        outputs, first = [], 0
        for weight, bias, b, rank in zip(weights, biases, b_FR, ranks, strict=True):
            assert weight is not None
            y_KF = nn.functional.linear(x_KD, weight.to(dtype), None if bias is None else bias.to(dtype))
            if b is not None and low_KR is not None:
                y_KF.addmm_(low_KR[:, first : first + rank], b.t())
                first += rank
            outputs.append(y_KF)
        ctx.save_for_backward(x_KD, low_KR, all_a_RD, *weights, *b_FR)
        ctx.scales, ctx.ranks, ctx.dtype = scales, ranks, dtype
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        x_KD, low_KR, all_a_RD, *rest = ctx.saved_tensors
        n, dtype = len(ctx.ranks), ctx.dtype
        weights, b_FR = rest[:n], rest[n:]
        grads = tuple(grad.to(dtype) for grad in grads)
        grad_x_KD = None
        if ctx.needs_input_grad[0]:
            grad_x_KD = grads[0] @ weights[0].to(dtype)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x_KD.addmm_(grad, weight.to(dtype))
        out: list[Tensor | None] = [None] * (4 * n)
        if all_a_RD is not None:
            lows = [grad @ b for grad, b in zip(grads, b_FR, strict=True) if b is not None]
            grad_low_KR = lows[0] if len(lows) == 1 else torch.cat(lows, dim=1)
            if grad_x_KD is not None:
                grad_x_KD.addmm_(grad_low_KR, all_a_RD)
            grad_a_RD = (grad_low_KR.t() @ x_KD).float()
            first = 0
            for i, rank in enumerate(ctx.ranks):
                if rank:
                    out[4 * i + 2] = grad_a_RD[first : first + rank]
                    out[4 * i + 3] = (grads[i].t() @ low_KR[:, first : first + rank]).float() * ctx.scales[i]
                    first += rank
        return grad_x_KD, None, None, *out
