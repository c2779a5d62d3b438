"""How long a base pass and an epoch should take, and what limits them: a roofline.

A time is the largest of three: floating-point operations over the rate of matrix products, bytes over the bandwidth,
and kernel launches times what one costs. These are estimates for choosing settings, not measurements.
"""

import math
from dataclasses import dataclass
from typing import Any

from cascade_fast.losses import chunk_tokens
from cascade_fast.planning.counts import Shape, base_weight_bytes, saved_activation_bytes
from cascade_fast.planning.devices import Device
from cascade_fast.planning.memory import base_tokens_at_once
from cascade_fast.selection import hard_count
from cascade_fast.settings import RunSettings
from cascade_fast.stages.second_look_sizes import SecondLookSizes

# Kernels of a layer in eager mode, counted with TorchDispatchMode: a stage's forward 35 and backward 75; of a base
# layer's forward about 30 (queries, keys and rotary embedding more); of a chunk of logits about 10.
STAGE_LAYER_LAUNCHES, BASE_LAYER_LAUNCHES, CHUNK_LAUNCHES = 110, 30, 10
ATTENTION_LAUNCHES = 70  # of a second look's layer, forward and backward, beside: estimate


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
    """The base over every block of every split; logits where the loss or the criterion needs them."""
    shape, width = Shape.of(settings, base_config), device.dtype.itemsize
    s, layers, seq = shape.stage, base_config.num_hidden_layers, settings.seq_len
    test = settings.val_blocks if settings.test_blocks is None else settings.test_blocks
    tokens = (settings.train_blocks + settings.val_blocks + test) * seq
    with_logits = tokens_with_logits(settings, tokens, settings.train_blocks * seq)
    at_once = base_tokens_at_once(settings, device.on_cpu)
    passes = math.ceil(tokens / at_once)
    flops = tokens * base_flops(shape, seq, with_logits=False) + with_logits * 2 * shape.head
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
    attention = 4 * shape.base.num_hidden_layers * seq_len * shape.attention_inner
    return 2 * shape.base_quantized() + attention + (2 * shape.head if with_logits else 0)


def tokens_with_logits(settings: RunSettings, tokens: int, train_tokens: int) -> int:
    """Of the ``tokens`` of a base pass: the training tokens' logits are made where their scores come from them."""
    return tokens - train_tokens if settings.criterion == "cosine" else tokens


def training_flops(shape: Shape, seq_len: int) -> int:
    """Of a hard token in a step, forward and backward."""
    s = shape.stage
    head_factor = 6 if s.head == "own" else 4  # a frozen head has no gradient of its own
    # Scores and weighted values, each twice as much in the backward pass; masked ones are computed too.
    attention = 3 * 4 * s.layers * seq_len * shape.attention_inner if shape.attends else 0
    return 6 * shape.stage_matrices() + head_factor * shape.head + attention


def epoch_time(settings: RunSettings, base_config: Any, device: Device, micro: int) -> Time:
    """An epoch of stage 1 over its hard tokens, ``micro`` of them at once, without validation."""
    shape, width = Shape.of(settings, base_config), device.dtype.itemsize
    s, trained = shape.stage, shape.stage_trained()
    tokens = hard_count(settings.hard_ratio, settings.train_blocks * settings.seq_len)
    steps = math.ceil(tokens / settings.batch_tokens)
    parts = steps * math.ceil(settings.batch_tokens / micro)
    matrices = shape.stage_matrices()
    flops: float = tokens * training_flops(shape, settings.seq_len)
    step_bytes = trained * (28 if settings.optimizer == "adamw" else 16)  # weights, gradient, state: read and written
    if settings.grad_clip > 0:
        step_bytes += 12 * trained
    casts = (4 + width) * matrices if width < 4 else 0
    part_bytes = casts + matrices * (2 * width + 4 + (2 * width if width < 4 else 0)) + 2 * shape.head * width
    activations = s.layers * 4 * saved_activation_bytes(shape, width)  # each written and read, there and back
    token_bytes = activations + s.vocab_size * (3 * width + 6 * 4)
    moved: float = steps * step_bytes + parts * part_bytes + tokens * token_bytes
    chunks = max(parts, tokens / chunk_tokens(s.vocab_size, device.dtype))
    look = SecondLookSizes.of(settings, shape, width)
    if look is not None:
        moved += steps * 4 * look.training_bytes(settings.batch_tokens, device.on_cpu)
        if settings.kv == "recompute":
            flops += look.recompute_flops()
    layer_launches = STAGE_LAYER_LAUNCHES + (ATTENTION_LAUNCHES if shape.attends else 0)
    launches = parts * (s.layers * layer_launches + 50) + chunks * CHUNK_LAUNCHES + steps * 30
    return _time(flops, moved, launches, device)


def _time(flops: float, moved: float, launches: float, device: Device) -> Time:
    return Time(flops / device.rate, moved / device.bandwidth, launches * device.launch_seconds)
