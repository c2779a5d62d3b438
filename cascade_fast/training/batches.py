"""What a trainer asks of the data."""

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """What a module is trained or measured on, by units: a token, or a sequence of them."""

    batches_differ: bool  # in the shapes of what they hold

    @property
    def units(self) -> int: ...

    def __len__(self) -> int:
        """Tokens whose loss counts."""

    def units_of(self, tokens: int) -> int:
        """How many units hold about ``tokens`` tokens."""

    def chunks(self, tokens: int) -> Sequence[Tensor]:
        """All units in order, in parts of about ``tokens`` tokens."""

    def count(self, picked: Tensor) -> int:
        """How many tokens the units ``picked`` hold."""

    def batches(self, picks: Sequence[Tensor], device: torch.device) -> Generator[tuple[Any, Tensor], None, None]:
        """For each of ``picks``, some units: what the module is called with, and the labels ``(M,)``."""
