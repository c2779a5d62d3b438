"""What a second look takes beyond an appended stage: queries and keys, attention, keys and values.

Shape legend: B sequences of a pack, S sequence length, Q most hard tokens of one sequence, L layers, H heads,
G key/value heads, E head size, R rank.
"""

import math
from dataclasses import dataclass

from cascade_fast.stages.attention import queries_at_once
from cascade_fast.stages.counts import LAUNCHES, StageCounts, StageMemory
from cascade_fast.stages.gpu_attention import padded_queries, queries_of_mask
from cascade_fast.stages.lora import LoraShape

# Of the sequences of a pack the one with most hard tokens has so many times the mean (Alpaca, r = 0.6): queries are
# padded to it.
UNEVEN = 1.3


class SecondLookCounts(StageCounts):
    """Queries and keys do something."""

    launches = LAUNCHES["second look"]

    def layer_matrices(self) -> int:
        return self.value_output_mlp() + self.query_key_matrices()

    def layer_trained(self) -> int:
        return self.value_output_mlp() + self.small() + self.query_key()

    def attention_flops(self, seq_len: int) -> int:
        return 4 * self.config.layers * seq_len * self.attention_inner


@dataclass(frozen=True)
class AdapterCounts(SecondLookCounts):
    """The layers are the base's, frozen: what the stage has of its own are low-rank updates."""

    lora: LoraShape

    launches = LAUNCHES["adapters"]

    def updates(self) -> list[int]:
        """Elements of each A and B of a layer."""
        sizes = self.linear_sizes()
        return [self.lora.rank * size for name in self.lora.targets for size in sizes[name]]

    def frozen(self) -> int:
        return super().trained()

    def trained(self) -> int:
        return self.config.layers * sum(self.updates())

    def parameters(self) -> int:
        return self.trained()

    def trained_matrices(self) -> int:
        return self.trained()

    def matrices(self) -> int:
        return super().matrices() + self.trained()

    def trained_below(self, elements: int) -> int:
        return self.config.layers * sum(size for size in self.updates() if size < elements)

    def largest_trained(self) -> int:
        return max(self.updates())


class SecondLookMemory(StageMemory):
    """Bytes of a second look's packs."""

    @property
    def kv_numbers(self) -> int:
        """2 L G E."""
        c = self.counts.config
        return 2 * c.layers * c.kv_heads * c.head_dim

    @property
    def recomputes(self) -> bool:
        return self.settings.kv == "recompute" and self.reads_kv

    @property
    def reads_kv(self) -> bool:
        """Whether hard tokens see the base's keys and values."""
        return not self.all_enter and self.settings.easy_tokens == "skip"

    def pack(self, tokens: int) -> tuple[int, int]:
        """(B, Q) of a pack of about ``tokens`` hard tokens."""
        mean = self.settings.hard_ratio * self.settings.seq_len
        return max(1, round(tokens / mean)), min(self.settings.seq_len, math.ceil(UNEVEN * mean))

    def training_bytes(self, tokens: int, on_cpu: bool) -> float:
        """What a pack of ``tokens`` hard tokens holds through a step, beside what an appended stage's tokens would."""
        s, seq = self.counts.config, self.settings.seq_len
        sequences, queries = self.pack(tokens)
        if not on_cpu:
            queries = padded_queries(queries)
        rows = sequences * s.heads * queries
        attention = self.width * (rows * s.head_dim + 2 * sequences * s.kv_heads * seq * s.head_dim)
        if on_cpu:
            attention += self.width * rows * min(seq, 2 * seq * self._block(sequences, queries) // queries)
        else:  # what comes out is kept, too, and a sum of every row's weights
            attention += rows * (self.width * s.head_dim + 4)
        if s.query_key_norm:
            attention += 4 * tokens * (self.counts.attention_inner + s.kv_heads * s.head_dim)
        return s.layers * attention + self._passing(sequences, queries, on_cpu)

    def evaluation_bytes(self, tokens: int, on_cpu: bool) -> float:
        """The same of a pack without gradients: one layer's attention, and what all tokens leave."""
        s, seq = self.counts.config, self.settings.seq_len
        sequences, queries = self.pack(tokens)
        rows = sequences * s.heads * queries
        attention = self.width * (2 * rows * s.head_dim + 2 * sequences * s.kv_heads * seq * s.head_dim)
        return attention + self._passing(sequences, queries, on_cpu) + 2 * tokens * self.kv_numbers * self.width

    def _passing(self, sequences: int, queries: int, on_cpu: bool) -> float:
        """The pack's keys and values as stored and as attention takes them, one layer's scores or the masks, and
        recomputing."""
        s, seq = self.counts.config, self.settings.seq_len
        if on_cpu:
            size = 2.0 * sequences * s.heads * self._block(sequences, queries) * seq * self.width
        else:
            times = s.heads // s.kv_heads
            block = min(padded_queries(queries), queries_of_mask((sequences, seq), times, self.width))
            size = 1.0 * sequences * times * block * seq * self.width
        if self.reads_kv:
            size += sequences * seq * self.kv_numbers * (self.stored + self.width)
        if self.settings.easy_tokens == "forward":  # one layer of the easy tokens, and what they leave for the others
            easy = sequences * max(seq - queries / UNEVEN, 0)
            size += easy * (6 * s.hidden_size * 4 + 3 * s.intermediate_size * self.width)
            size += 4 * sequences * seq * s.kv_heads * s.head_dim * self.width
        if self.recomputes:
            layer = 6 * s.hidden_size * 4 + 3 * s.intermediate_size * self.width
            size += sequences * seq * (layer + 2 * self.kv_numbers * self.width)
        return size

    def _block(self, sequences: int, queries: int) -> int:
        return min(queries, queries_at_once((sequences, self.counts.config.heads), self.settings.seq_len, self.width))

    def base_pass_bytes(self, tokens: int, base_layers: int) -> float:
        """transformers' cache of all the base's layers, and the copy of those that are kept."""
        s = self.counts.config
        return float(tokens * self.width * (2 * base_layers * s.kv_heads * s.head_dim + 2 * self.kv_numbers))


@dataclass(frozen=True)
class AdapterMemory(SecondLookMemory):
    """The same of a second look with low-rank updates."""

    counts: AdapterCounts

    def training_bytes(self, tokens: int, on_cpu: bool) -> float:
        updates = self.counts.config.layers * tokens * self.saved_of_updates()
        return super().training_bytes(tokens, on_cpu) + updates + self._unpacked()

    def evaluation_bytes(self, tokens: int, on_cpu: bool) -> float:
        return super().evaluation_bytes(tokens, on_cpu) + self._unpacked()

    def saved_of_updates(self) -> int:
        """What autograd keeps of one token in one layer beyond what it does without updates: R numbers of each."""
        return self.width * self.counts.lora.rank * len(self.counts.lora.targets)

    def _unpacked(self) -> float:
        """One layer's weight, as it is multiplied with."""
        return float(self.width * self.counts.largest_matrix()) if self.settings.base_quantization == "nf4" else 0.0
