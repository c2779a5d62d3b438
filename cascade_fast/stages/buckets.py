"""Packs in few sizes, for steps that are recorded once for each size: they are filled up with tokens.

These stand in rows of their own, after those of the sequences: no other token sees them. Their losses are left out.

Shape legend: K hard tokens, B rows of a pack, S places of a row, Q queries of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

QUERIES, WIDTH, TOKENS = 16, 8, 16  # sizes are multiples of them: of attention's kernels, and of products


class Bucket(NamedTuple):
    """The size that a pack of ``first_row`` rows and ``tokens - added`` tokens is filled up to: K, Q, B and S."""

    tokens: int
    queries: int
    rows: int
    width: int
    added: int
    first_row: int

    @classmethod
    def around(cls, tokens: int, queries: int, rows: int, width: int) -> "Bucket":
        """Rows are so many that any number of tokens that is filled up to this K has room for those added."""
        to, step = rounded(tokens, TOKENS)
        to_queries, to_width = rounded(queries, QUERIES)[0], rounded(width, WIDTH)[0]
        in_a_row = min(to_queries, to_width)
        more = -(-(step - 1) // in_a_row)
        return cls(to, to_queries, rounded(rows, 1)[0] + more, to_width, to - tokens, rows)

    def fill(self, listed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Lists of a pack's tokens, in places of this width and slots of these queries, with those of the added tokens:
        each the first token of its row's text, any row of the store, any label."""
        in_a_row = min(self.queries, self.width)
        number_A = torch.arange(self.added)
        row_A, column_A = self.first_row + number_A // in_a_row, number_A % in_a_row
        added = {
            "row_K": listed["row_K"][:1].expand(self.added),
            "place_K": row_A * self.width + column_A,
            "slot_K": row_A * self.queries + column_A,
        }
        zeros_A = torch.zeros_like(number_A)
        return {
            name: torch.cat((of, added.get(name, zeros_A).to(of.dtype))) if name.endswith("_K") else of
            for name, of in listed.items()
        }


def rounded(number: int, least: int) -> tuple[int, int]:
    """``number`` rounded up to one of eight sizes between two powers of two, and the distance between them; both are
    multiples of ``least``, a power of two."""
    step = max(least, 1 << number.bit_length() >> 4)
    return -(-number // step) * step, step
