"""Loss scale, gradient clip and steps left out, folded into the optimizer's own kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cascade_fast import ops


class FoldingScaler(torch.amp.GradScaler):
    """A gradient scaler, its scale and state those of torch's, whose :meth:`fold` reads every gradient once.

    ``unscale_``, ``clip_grad_norm_`` and ``step`` pass over all gradients three times before the optimizer does, and
    wait for the device unless the optimizer is one of torch's fused ones. Here one pass finds the norm of the scaled
    gradients; the optimizer divides them by the loss scale and the clip's factor as it reads them, and leaves the step
    out when told so.
    """

    def fold(self, optimizer: Any, gradients: Sequence[Tensor], clip: float) -> Tensor | None:
        """A step of ``optimizer`` with ``gradients`` of the scaled loss, and the update of the scale.

        Never waits for the device. Enabled, it leaves out a step with a gradient that is not finite.

        Args:
            optimizer: honours its attributes ``grad_scale``, which gradients are divided by, and ``found_inf``, 1
                where the step is left out, as torch's fused optimizers do: both 0-dimensional float32 on the device.
            gradients: all that the optimizer will read, one at least.
            clip: the largest norm that unscaled gradients keep; 0 does not clip.

        Returns:
            The norm of the gradients, scaled by the loss scale, 0-dimensional; None if it was not needed.
        """
        scale, growth = (self._scale, self._growth_tracker) if self.is_enabled() else (None, None)
        if scale is None and clip == 0:
            optimizer.step()
            return None
        norm, factor, found_inf = ops.grad_norm(gradients, scale, clip)
        left_out = None if scale is None else found_inf
        optimizer.grad_scale, optimizer.found_inf = factor, left_out
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        if scale is not None and growth is not None and left_out is not None:
            factors = (self._growth_factor, self._backoff_factor)
            torch._amp_update_scale_(scale, growth, left_out, *factors, self._growth_interval)  # as update() does
        return norm
