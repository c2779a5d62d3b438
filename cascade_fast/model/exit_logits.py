"""The logits of all tokens, put together exit by exit: the largest tensor of a forward pass.

Shape legend: B sequences, S positions that the cascade sees, N = B * S tokens, K of them at an exit, T positions whose
logits somebody wants, U of them distinct, W = B * U, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cascade_fast.losses import chunk_tokens

Head = Callable[[Tensor], Tensor]
ChunkScore = Callable[[slice | Tensor, Tensor], Tensor]  # of the rows of a chunk and their logits


class ExitLogits:
    """Logits of the positions ``column_T`` (None: all) of ``batch`` sequences with S = ``positions``.

    Logits of other positions are computed only where they are scored, and not kept.
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

    def put(self, head: Head, normed_KD: Tensor, token_K: Tensor, *, score: ChunkScore | None = None) -> Tensor:
        """Keeps what ``head`` says of the tokens ``token_K`` (ascending), in the place of what was there.

        Args:
            score: ``score(rows, logits_CV) -> (C,)`` of some of the K tokens, without gradients.

        Returns:
            The scores of all of them, (K,) float32, those included that are not kept; without ``score`` nothing, (0,).
        """
        step, chunks = self.chunk, list[tuple[slice | Tensor, Tensor]]()
        other_J = token_K[:0]
        if self.row_N is None:
            logits_KV = head(normed_KD)
            self._keep(logits_KV, token_K)
            rows = (slice(start, start + step) for start in range(0, len(token_K), step))
            chunks += ((some, logits_KV[some]) for some in rows)
        else:
            row_K = self.row_N[token_K]
            kept_J = (row_K >= 0).nonzero().squeeze(1)
            other_J = torch.nonzero_static(row_K < 0, size=len(row_K) - len(kept_J)).squeeze(1)  # waits for no device
            if len(kept_J):
                logits_JV = head(normed_KD[kept_J])
                self._keep(logits_JV, row_K[kept_J])
                chunks += zip(kept_J.split(step), logits_JV.split(step), strict=True)
        if score is None:
            return normed_KD.new_empty(0)
        score_K = torch.empty(len(token_K), dtype=torch.float32, device=normed_KD.device)
        with torch.no_grad():
            for some, logits_CV in chunks:
                score_K[some] = score(some, logits_CV)
            for start in range(0, len(other_J), step):
                some_C = other_J[start : start + step]
                score_K[some_C] = score(some_C, head(normed_KD[some_C]))
        return score_K

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
