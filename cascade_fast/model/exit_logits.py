"""The logits of all tokens, put together exit by exit: the largest tensor of a forward pass.

Shape legend: B sequences, S positions that the cascade sees, N = B * S tokens, K of them at an exit, T positions whose
logits somebody wants, U of them distinct, W = B * U, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cascade_fast.criteria import token_entropy
from cascade_fast.losses import chunk_tokens

Head = Callable[[Tensor], Tensor]


class ExitLogits:
    """Logits of the positions ``column_T`` (None: all) of ``batch`` sequences with S = ``positions``.

    Logits of other positions are computed only where their entropy is asked for, and not kept.
    """

    def __init__(self, batch: int, positions: int, column_T: Tensor | None, *, vocab_size: int) -> None:
        self.chunk = chunk_tokens(vocab_size, torch.float32)
        self.shape = batch, positions
        self.row_N: Tensor | None = None  # of a token among those kept; -1 if it is not. None: all are, in order
        if column_T is not None:
            column_U, self.back_T = torch.unique(column_T, return_inverse=True)
            row_BS = torch.full((batch, positions), -1, device=column_T.device)
            self.shape = batch, len(column_U)
            row_BS[:, column_U] = torch.arange(math.prod(self.shape), device=column_T.device).view(self.shape)
            self.row_N = row_BS.flatten()
        self.logits_WV: Tensor | None = None

    def put(self, head: Head, normed_KD: Tensor, token_K: Tensor, *, entropy: bool = False) -> Tensor:
        """Keeps what ``head`` says of the tokens ``token_K`` (ascending), in the place of what was there.

        Returns:
            Where asked for, the entropy of every one of them, (K,) float32, those included that are not kept; else
            nothing, (0,).
        """
        if self.row_N is None:
            logits_KV = head(normed_KD)
            self._keep(logits_KV, token_K)
            return token_entropy(logits_KV) if entropy else logits_KV.new_empty(0)
        row_K = self.row_N[token_K]
        wanted_J, other_J = (row_K >= 0).nonzero().squeeze(1), (row_K < 0).nonzero().squeeze(1)
        entropy_K = torch.empty(len(token_K) if entropy else 0, device=normed_KD.device)
        if len(wanted_J):
            logits_JV = head(normed_KD[wanted_J])
            self._keep(logits_JV, row_K[wanted_J])
            if entropy:
                entropy_K[wanted_J] = token_entropy(logits_JV)
        if entropy:
            with torch.no_grad():
                for part_C in other_J.split(self.chunk):
                    entropy_K[part_C] = token_entropy(head(normed_KD[part_C]))
        return entropy_K

    def _keep(self, logits_KV: Tensor, row_K: Tensor) -> None:
        if len(row_K) == math.prod(self.shape):
            self.logits_WV = logits_KV
            return
        if self.logits_WV is None:
            self.logits_WV = logits_KV.new_empty(math.prod(self.shape), logits_KV.shape[1])
        self.logits_WV = self.logits_WV.index_copy_(0, row_K, logits_KV.to(self.logits_WV.dtype))

    def together(self) -> Tensor:
        """``(B, T, V)``, once every token has come to its exit."""
        assert self.logits_WV is not None
        logits_BUV = self.logits_WV.unflatten(0, self.shape)
        return logits_BUV if self.row_N is None else logits_BUV[:, self.back_T]
