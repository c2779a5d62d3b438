"""Which positions of a forward pass are learnt from, told by their labels.

Shape legend: B sequences, S new tokens of a sequence, P tokens in the cache before them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cascade_fast.base.sequences import NO_LABEL


@dataclass(frozen=True)
class ShiftedLabels:
    """Of every position the token after it.

    Attributes:
        label_BS: int64, ``NO_LABEL`` where there is none.
        labelled_BS: bool, False where the position is context only.
    """

    label_BS: Tensor
    labelled_BS: Tensor

    @classmethod
    def from_labels(
        cls, labels: Tensor | None, shift_labels: Tensor | None, shape: tuple[int, int]
    ) -> "ShiftedLabels | None":
        """Of transformers' ``labels``, or of those that are shifted already; None if neither is given.

        The token after the last one is not in ``labels``. Whoever gives them may well want its logits, so the last
        position counts as labelled.

        Raises:
            ValueError: not of ``shape``, (B, S).
        """
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(
                    f"{name}: shape {tuple(given.shape)}; must have that of input_ids, {shape}, with logits_to_keep too"
                )
        if shift_labels is not None:
            return cls(shift_labels, shift_labels != NO_LABEL)
        if labels is None:
            return None
        label_BS = nn.functional.pad(labels, (0, 1), value=NO_LABEL)[:, 1:]
        last_S = torch.arange(shape[1], device=labels.device) == shape[1] - 1
        return cls(label_BS, (label_BS != NO_LABEL) | last_S)


def may_enter(attention_mask: Tensor | None, labels: ShiftedLabels | None, hidden_BSD: Tensor) -> Tensor | None:
    """``(B, S)`` bool: positions that stages may take, neither padding nor context; None: all of them.

    Args:
        attention_mask: (B, P + S), 0 for padding; one of more dimensions says nothing of positions.
    """
    enters_BS = None
    if attention_mask is not None and attention_mask.dim() == 2:
        enters_BS = attention_mask[:, -hidden_BSD.shape[1] :].bool()
    if labels is not None:
        labelled_BS = labels.labelled_BS.to(hidden_BSD.device)
        enters_BS = labelled_BS if enters_BS is None else enters_BS & labelled_BS
    return enters_BS
