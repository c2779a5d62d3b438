"""Low-rank updates of frozen linear layers (LoRA, arXiv 2106.09685): ``x W^T + (alpha / rank) (x A^T) B^T``.

A stage with an adapter holds A and B only, under PEFT's names (``lora_A``, ``lora_B``). The frozen layers are the
base's own, lent to it by :func:`lend`: in memory once, whoever else uses them, in 16 bit or in bitsandbytes' 4 bit, and
no part of the stage's weights.

Shape legend: K tokens, D a layer's inputs, F its outputs, R rank.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast import ops
from cascade_fast.input_checks import InputError, check_fields, shown
from cascade_fast.settings import LORA_TARGETS, RunSettings
from cascade_fast.stages.products import products, sums_in_products
from cascade_fast.stages.rms_norm import RMSNorm

# The linear layers of a decoder layer that take the same inputs.
TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


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


@dataclass
class _Lent:
    """Something of the base's that a module uses and does not own: no child of it, so that neither moving nor saving
    the module touches it. ``together``: see :func:`lend`. ``weight_D``: of a norm, in float32, where it is kept."""

    of_base: Any = None
    weight_D: Tensor | None = None
    together: "FusedProjections | None" = None


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
    def frozen(self) -> Any:
        return self.lent.of_base

    def forward(self, x_KD: Tensor) -> Tensor:
        """With a frozen layer that multiplies in its own way: the base's own, in 4 bit too."""
        frozen_KF = self.frozen(x_KD)
        if not self.scale:
            return frozen_KF
        if not torch.is_autocast_enabled(x_KD.device.type):  # else the products' dtype is autocast's
            x_KD = x_KD.to(self.lora_A.weight.dtype)
        return frozen_KF + (self.lora_B(self.lora_A(x_KD)) * self.scale).to(frozen_KF.dtype)


class LentNorm(RMSNorm):
    """A frozen norm of the base."""

    def __init__(self, eps: float) -> None:
        nn.Module.__init__(self)
        self.lent, self.eps = _Lent(), eps

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.lent.of_base.weight if self.lent.weight_D is None else self.lent.weight_D


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


def lend(
    layers: Iterable[nn.Module],
    norm: nn.Module,
    stage: nn.Module,
    together: "dict[tuple[int, str], FusedProjections] | None" = None,
) -> "Updates | None":
    """Lends ``stage`` the layers that its modules stand for, by name, and the norm after them.

    Args:
        layers: decoder layers, of transformers' or ours, one for each of the stage's.
        together: what is made of them for training, by layer and first name; filled by the first stage that is lent
            these layers, and used by all. None: the layers are called as they are, since others use them too, or since
            they are in 4 bit.

    Returns:
        The stage's updates, to be placed before it runs; None without ``together``.
    """
    updates = Updates()
    for number, (layer, of_base) in enumerate(zip(stage.layers, layers, strict=True)):  # type: ignore[arg-type]
        for name, module in layer.named_modules():
            if isinstance(module, LentLinear | LentNorm):
                module.lent = _Lent(of_base.get_submodule(name))
            if isinstance(module, LentNorm) and together is not None:  # else every step would make it anew
                module.lent.weight_D = module.weight.float()
        if together is None:
            continue
        for names in TOGETHER:
            members: list[Any] = [layer.get_submodule(name) for name in names]
            if (number, names[0]) not in together:
                together[number, names[0]] = FusedProjections(members)
            members[0].lent.together = together[number, names[0]]
            updates.add(members, together[number, names[0]])
    stage.norm.lent = _Lent(norm)  # type: ignore[union-attr]
    return None if together is None else updates


@torch.no_grad()
def initialise(stage: nn.Module, seed: int) -> None:
    """As PEFT begins: A uniform (Kaiming's), B zero, so that the update is zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in stage.modules():
        if isinstance(module, LentLinear) and module.scale:
            nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5), generator=generator)
            module.lora_B.weight.zero_()


def project(x_KD: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """What each of ``layers`` makes of the same inputs, each ``(K, F)``."""
    together = layers[0].lent.together if isinstance(layers[0], LentLinear) else None
    if together is None:
        return products(x_KD, layers) if sums_in_products(x_KD, layers) else [layer(x_KD) for layer in layers]
    updates = [weight for layer in layers if layer.scale for weight in (layer.lora_A.weight, layer.lora_B.weight)]
    return list(_Project.apply(x_KD, together, *updates))


class FusedProjections:
    """Frozen layers of the same inputs with room for their updates, for training.

    Beside each weight ``W`` (F, D) stand R columns, R the sum of all ranks: B of its own update, and zeros where the
    others' are. With ``low = x A^T`` beside ``x``, one product makes ``x W^T + low B^T``; and one makes the gradients
    of ``x`` and ``low`` of that of the outputs. The frozen layers' weights become parts of these.

    Attributes:
        weights: ``(F, D + R)`` each.
        a_RD: all A, times the scale.
        ranks: of each layer's update; 0: it has none.
        parts: of the R columns, of each layer; None: it has no update.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.ranks = [layer.lora_A.weight.shape[0] if layer.scale else 0 for layer in layers]
        ends = list(itertools.accumulate(self.ranks))
        self.parts = [slice(end - rank, end) if rank else None for end, rank in zip(ends, self.ranks, strict=True)]
        frozen = [layer.frozen for layer in layers]
        self.inputs = frozen[0].weight.shape[1]
        self.scale = max(layer.scale for layer in layers)  # one for all that have an update
        self.biases = [one.bias for one in frozen]
        self.a_RD = frozen[0].weight.new_zeros(ends[-1], self.inputs)
        self.weights = []
        for one in frozen:
            weight_FC = one.weight.new_zeros(one.weight.shape[0], self.inputs + ends[-1])
            weight_FC[:, : self.inputs] = one.weight
            self.weights.append(weight_FC)
            one.weight = nn.Parameter(weight_FC[:, : self.inputs], requires_grad=False)


class Updates:
    """The low-rank updates of a stage, and where they stand beside the frozen weights."""

    def __init__(self) -> None:
        self.all_a: list[Tensor] = []
        self.all_b: list[Tensor] = []
        self.places_a: list[Tensor] = []
        self.places_b: list[Tensor] = []
        self.scale = 1.0

    def add(self, layers: Sequence[Any], together: FusedProjections) -> None:
        for layer, weight_FC, part in zip(layers, together.weights, together.parts, strict=True):
            if part is not None:
                self.scale = together.scale
                self.all_a.append(layer.lora_A.weight)
                self.all_b.append(layer.lora_B.weight)
                self.places_a.append(together.a_RD[part])
                self.places_b.append(weight_FC[:, together.inputs :][:, part])

    @torch.no_grad()
    def place(self) -> None:
        """As they are now: before every run, since stages share the frozen weights and steps change the updates."""
        ops.scale_into_(self.places_a, self.all_a, self.scale)
        ops.scale_into_(self.places_b, self.all_b, 1.0)


class _Project(torch.autograd.Function):
    """Of the inputs only ``(K, D)`` and ``(K, R)`` are kept; no gradient of frozen weights is made."""

    @staticmethod
    def forward(ctx, x_KD: Tensor, together: FusedProjections, *updates: Tensor):
        both_KC = ops.low_rank(x_KD.to(together.a_RD.dtype), together.a_RD)
        ctx.save_for_backward(both_KC)
        ctx.together = together
        pairs = zip(together.weights, together.biases, strict=True)
        return tuple(nn.functional.linear(both_KC, weight_FC, bias_F) for weight_FC, bias_F in pairs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        (both_KC,) = ctx.saved_tensors
        together: FusedProjections = ctx.together
        grads = tuple(grad.to(both_KC.dtype) for grad in grads)
        grad_KC = grads[0] @ together.weights[0]
        for grad, weight_FC in zip(grads[1:], together.weights[1:], strict=True):
            grad_KC.addmm_(grad, weight_FC)
        if not together.a_RD.shape[0]:
            return grad_KC, None
        grad_x_KD, grad_a_RD, grads_b = ops.low_rank_backward(
            grad_KC, both_KC, together.a_RD, grads, together.ranks, together.scale
        )
        updates: list[Tensor] = []
        for grad_b, part in zip(grads_b, together.parts, strict=True):
            if part is not None:
                updates += [grad_a_RD[part], grad_b]
        return grad_x_KD, None, *updates
