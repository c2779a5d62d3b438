"""What a second look takes beyond an appended stage: keys and values, attention, and whether to store or recompute.

Shape legend: B sequences of a pack, S sequence length, Q most hard tokens of one sequence, L layers, H heads,
G key/value heads, E head size.
"""

import math
from dataclasses import dataclass

from cascade_fast.planning.counts import Shape
from cascade_fast.settings import RunSettings
from cascade_fast.stages.attention import queries_at_once

# Of the sequences of a pack the one with most hard tokens has so many times the mean (Alpaca, r = 0.6): queries are
# padded to it.
UNEVEN = 1.3
DISK_BYTES_PER_SECOND = 500e6  # assumed: a cloud host's solid-state disk


@dataclass(frozen=True)
class SecondLookSizes:
    """Bytes of a second look's packs. ``width``: bytes of the compute dtype; ``stored`` of a number in the stores."""

    settings: RunSettings
    shape: Shape
    width: int
    stored: int

    @classmethod
    def of(cls, settings: RunSettings, shape: Shape, width: int) -> "SecondLookSizes | None":
        """None for stages of another kind."""
        stored = 4 if settings.store_dtype == "float32" else 2
        return cls(settings, shape, width, stored) if shape.attends else None

    @property
    def kv_numbers(self) -> int:
        """Numbers in the keys and values that a token has: 2 L G E."""
        s = self.shape.stage
        return 2 * s.layers * s.kv_heads * s.head_dim

    def pack(self, tokens: int) -> tuple[int, int]:
        """(B, Q) of a pack of about ``tokens`` hard tokens."""
        mean = self.settings.hard_ratio * self.settings.seq_len
        return max(1, round(tokens / mean)), min(self.settings.seq_len, math.ceil(UNEVEN * mean))

    def training_bytes(self, tokens: int, on_cpu: bool) -> float:
        """What a pack of ``tokens`` hard tokens holds through a step, beside what an appended stage's tokens would."""
        s, seq = self.shape.stage, self.settings.seq_len
        sequences, queries = self.pack(tokens)
        rows = sequences * s.heads * queries
        attention = self.width * (rows * s.head_dim + 2 * sequences * s.kv_heads * seq * s.head_dim)
        if on_cpu:
            attention += self.width * rows * min(seq, 2 * seq * self._block(sequences, queries) // queries)
        else:
            times = s.heads // s.kv_heads  # keys and values are expanded
            attention += self.width * (2 * (times - 1) * sequences * s.kv_heads * seq * s.head_dim + rows * s.head_dim)
        if s.query_key_norm:
            attention += 4 * tokens * (self.shape.attention_inner + s.kv_heads * s.head_dim)
        return s.layers * attention + self._passing(sequences, queries, on_cpu)

    def evaluation_bytes(self, tokens: int, on_cpu: bool) -> float:
        """The same of a pack without gradients: one layer's attention, and what all tokens leave."""
        s, seq = self.shape.stage, self.settings.seq_len
        sequences, queries = self.pack(tokens)
        rows = sequences * s.heads * queries
        attention = self.width * (2 * rows * s.head_dim + 2 * sequences * s.kv_heads * seq * s.head_dim)
        return attention + self._passing(sequences, queries, on_cpu) + 2 * tokens * self.kv_numbers * self.width

    def _passing(self, sequences: int, queries: int, on_cpu: bool) -> float:
        """The pack's keys and values as stored and as attention takes them, one layer's scores, and recomputing."""
        s, seq = self.shape.stage, self.settings.seq_len
        rows = sequences * s.heads * (self._block(sequences, queries) if on_cpu else 0)
        size = sequences * seq * self.kv_numbers * (self.stored + self.width) + 2.0 * rows * seq * self.width
        if self.settings.kv == "recompute":
            layer = 6 * s.hidden_size * 4 + 3 * s.intermediate_size * self.width
            size += sequences * seq * (layer + 2 * self.kv_numbers * self.width)
        return size

    def _block(self, sequences: int, queries: int) -> int:
        return min(queries, queries_at_once((sequences, self.shape.stage.heads), self.settings.seq_len, self.width))

    def base_pass_bytes(self, tokens: int, base_layers: int) -> float:
        """transformers' cache of all the base's layers, and the copy of those that are kept."""
        s = self.shape.stage
        return float(tokens * self.width * (2 * base_layers * s.kv_heads * s.head_dim + 2 * self.kv_numbers))

    # --- store or recompute -------------------------------------------------------------------------------------------

    def kv_disk_bytes(self) -> float:
        """Of the base's keys and values on disk, all splits."""
        c = self.settings
        test = c.val_blocks if c.test_blocks is None else c.test_blocks
        return float((c.train_blocks + c.val_blocks + test) * c.seq_len * self.kv_numbers * self.stored)

    def recompute_flops(self) -> float:
        """Of the base's keys and values of all training tokens, once: the layers' forward pass."""
        s, c = self.shape.stage, self.settings
        attention = 4 * s.layers * c.seq_len * self.shape.attention_inner
        return float(c.train_blocks * c.seq_len * (2 * self.shape.stage_matrices() + attention))

    def kv_seconds(self, flops_per_second: float, bytes_per_second: float, ram_bytes: float) -> dict[str, float]:
        """Seconds that the base's keys and values cost in a run of one stage: written once and read in every epoch, or
        recomputed in every epoch. Files that fit in half the memory are read from there."""
        epochs = self.settings.epochs
        size = self.kv_disk_bytes()
        read = bytes_per_second if size < ram_bytes / 2 else DISK_BYTES_PER_SECOND
        return {
            "store": size / DISK_BYTES_PER_SECOND + epochs * size / read,
            "recompute": epochs * self.recompute_flops() / flops_per_second,
        }


def choose_kv(seconds: dict[str, float], size: float, disk_bytes: float) -> tuple[str, str]:
    """``store`` or ``recompute``, and why: what is cheaper of what fits on a disk with ``disk_bytes`` free."""
    costs = (
        f"storing {seconds['store']:.1f} s and {size / 2**30:.2f} GiB of disk, recomputing {seconds['recompute']:.1f} s"
    )
    if size > 0.9 * disk_bytes:
        return "recompute", f"{costs}; {disk_bytes / 2**30:.2f} GiB are free"
    return min(("store", "recompute"), key=lambda how: seconds[how]), costs
