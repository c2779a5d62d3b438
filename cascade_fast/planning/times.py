"""How long a base pass and an epoch should take, and what limits them: a roofline.

A time is the largest of three: floating-point operations over the rate of matrix products, bytes over the bandwidth,
and kernel launches times what one costs. These are estimates for choosing settings, not measurements.
"""

import math
from dataclasses import dataclass
from typing import Any

from cascade_fast.criteria import get_criterion
from cascade_fast.losses import chunk_tokens
from cascade_fast.planning.counts import Shape, base_weight_bytes, saved_activation_bytes
from cascade_fast.planning.devices import Device
from cascade_fast.planning.kv import recompute_flops
from cascade_fast.planning.memory import base_tokens_at_once
from cascade_fast.selection import hard_count
from cascade_fast.settings import READ, RunSettings

# Kernels in eager mode, counted with TorchDispatchMode: of a base layer's forward about 30 (queries, keys and rotary
# embedding more than a stage's); of a chunk of logits about 10.
BASE_LAYER_LAUNCHES, CHUNK_LAUNCHES = 30, 10


@dataclass(frozen=True)
class Time:
    """Seconds by each limit; the largest counts."""

    flops: float
    bytes: float
    launches: float

    @property
    def seconds(self) -> float:
        return max(self.flops, self.bytes, self.launches)

    @property
    def limit(self) -> str:
        limits = {"FLOPs": self.flops, "bytes": self.bytes, "launches": self.launches}
        return max(limits, key=lambda name: limits[name])


def base_pass_time(settings: RunSettings, base_config: Any, device: Device) -> Time:
    """The base over every sequence; logits where the loss or the criterion needs them."""
    shape, width = Shape.from_settings(settings, base_config), device.dtype.itemsize
    s, layers, seq = shape.stage, base_config.num_hidden_layers, settings.seq_len
    tokens = sum(settings.expected_tokens(split) for split in READ)
    with_logits = tokens_with_logits(settings, tokens, settings.expected_tokens("train"))
    at_once = base_tokens_at_once(settings, device.on_cpu)
    passes = math.ceil(tokens / at_once)
    flops = tokens * base_flops(shape, seq, with_logits=False) + with_logits * 2 * shape.counts.head
    weights = base_weight_bytes(shape, settings.base_quantization, width)
    if settings.base_quantization == "nf4":  # every product writes and reads the weights it unpacks
        weights += 2 * width * shape.base_quantized()
    per_token = layers * width * (14 * s.hidden_size + 7 * s.intermediate_size)
    moved = passes * weights + tokens * per_token + with_logits * s.vocab_size * (2 * width + 7 * 4)
    chunks = with_logits / chunk_tokens(s.vocab_size, device.dtype)
    launches = passes * layers * BASE_LAYER_LAUNCHES + chunks * CHUNK_LAUNCHES
    return _time(flops, moved, launches, device)


def base_flops(shape: Shape, seq_len: int, *, with_logits: bool) -> int:
    """Of a token in the base; masked scores are computed too."""
    attention = 4 * shape.base.num_hidden_layers * seq_len * shape.counts.attention_inner
    return 2 * shape.base_quantized() + attention + (2 * shape.counts.head if with_logits else 0)


def tokens_with_logits(settings: RunSettings, tokens: int, train_tokens: int) -> int:
    """Of the ``tokens`` of a base pass: the training tokens' logits are made where their scores come from them."""
    return tokens if get_criterion(settings.criterion).in_base_pass.needs_logits else tokens - train_tokens


def epoch_time(
    settings: RunSettings, base_config: Any, device: Device, micro: int, labelled_share: float = 1.0
) -> Time:
    """An epoch of stage 1 over its hard tokens, ``micro`` of them at once, without validation.

    ``labelled_share``: of the training tokens, among which it takes them.
    """
    shape, width = Shape.from_settings(settings, base_config), device.dtype.itemsize
    s, trained = shape.stage, shape.counts.trained()
    tokens = hard_count(settings.hard_ratio, round(settings.expected_tokens("train") * labelled_share))
    steps = math.ceil(tokens / settings.batch_tokens)
    parts = steps * math.ceil(settings.batch_tokens / micro)
    matrices = shape.counts.matrices()
    flops: float = tokens * shape.counts.training_flops(settings.seq_len)
    step_bytes = trained * (28 if settings.optimizer == "adamw" else 16)  # weights, gradient, state: read and written
    if settings.grad_clip > 0:
        step_bytes += 12 * trained
    casts = (4 + width) * matrices if width < 4 else 0
    part_bytes = casts + matrices * (2 * width + 4 + (2 * width if width < 4 else 0)) + 2 * shape.counts.head * width
    activations = s.layers * 4 * saved_activation_bytes(shape, width)  # each written and read, there and back
    token_bytes = activations + s.vocab_size * (3 * width + 6 * 4)
    moved: float = steps * step_bytes + parts * part_bytes + tokens * token_bytes
    chunks = max(parts, tokens / chunk_tokens(s.vocab_size, device.dtype))
    memory = shape.kind.memory(settings, shape.stage, width)
    moved += steps * 4 * memory.training_bytes(settings.batch_tokens, device.on_cpu)
    if settings.kv == "recompute":
        flops += recompute_flops(memory)
    launches = parts * (s.layers * shape.counts.layer_launches + 50) + chunks * CHUNK_LAUNCHES + steps * 30
    return _time(flops, moved, launches, device)


def _time(flops: float, moved: float, launches: float, device: Device) -> Time:
    return Time(flops / device.rate, moved / device.bandwidth, launches * device.launch_seconds)
