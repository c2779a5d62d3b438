"""The norm of a stage's layers."""

import torch
from torch import Tensor, nn

from cascade_fast import ops


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` in float32, rounded to the dtype that autocast multiplies in, if it is on."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def after(self, x_KD: Tensor, added_KD: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x + added`` (None: ``x``), and its norm."""
        if added_KD is None:
            return x_KD, self(x_KD)
        if added_KD.dtype == _compute_dtype(x_KD.device) and ops.fused("add_rms_norm", x_KD.device):
            return ops.add_rms_norm(x_KD, added_KD, self.weight.float(), self.eps)
        x_KD = x_KD + added_KD
        return x_KD, self(x_KD)

    def forward(self, x_KD: Tensor) -> Tensor:
        dtype = _compute_dtype(x_KD.device)
        if ops.fused("rms_norm", x_KD.device):
            rows_ND = x_KD.float().reshape(-1, x_KD.shape[-1])  # of heads, too
            return ops.rms_norm(rows_ND, self.weight.float(), self.eps, dtype=dtype).view(x_KD.shape)
        return nn.functional.rms_norm(x_KD.float(), x_KD.shape[-1:], self.weight.float(), self.eps).to(dtype)


def _compute_dtype(device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
