"""How long a base pass and an epoch should take, and what limits them: a roofline.

A time is the largest of three: floating-point operations over the rate of matrix products, bytes over the bandwidth,
and kernel launches times what one costs; and, with several GPUs, of the all-reduces of gradients (see several.py).
These are estimates for choosing settings, not measurements.
"""

import math
from dataclasses import dataclass
from typing import Any

from cascade_fast.base.base_pass import scored_by
from cascade_fast.losses import chunk_tokens
from cascade_fast.planning.counts import (
    NF4_BYTES,
    Shape,
    base_weight_bytes,
    has_half_weights,
    saved_activation_bytes,
)
from cascade_fast.planning.devices import Device
from cascade_fast.planning.kv import recompute_flops
from cascade_fast.planning.memory import base_tokens_at_once
from cascade_fast.selection import hard_count
from cascade_fast.settings import READ, RunSettings

# Kernels of a layer of the base's forward pass, counted as LAUNCHES are; of a chunk of logits beyond a batch's first.
BASE_LAYER_LAUNCHES, CHUNK_LAUNCHES = 18, 6


@dataclass(frozen=True)
class Time:
    """Seconds by each limit; the largest counts."""

    flops: float
    bytes: float
    launches: float
    all_reduces: float = 0.0  # of gradients, by several GPUs

    @property
    def seconds(self) -> float:
        return max(self.flops, self.bytes, self.launches, self.all_reduces)

    @property
    def limit(self) -> str:
        limits = {
            "FLOPs": self.flops,
            "bytes": self.bytes,
            "launches": self.launches,
            "all-reduces": self.all_reduces,
        }
        return max(limits, key=lambda name: limits[name])


def base_pass_time(settings: RunSettings, base_config: Any, device: Device, labelled_share: float = 1.0) -> Time:
    """The base over every sequence; logits where the loss or the criterion needs them.

    ``labelled_share``: of the tokens.
    """
    shape, width = Shape.from_settings(settings, base_config, labelled_share), device.dtype.itemsize
    s = shape.stage
    tokens, train = sum(settings.expected_tokens(split) for split in READ), settings.expected_tokens("train")
    with_logits, layer_tokens = (
        tokens_with_logits(settings, shape, tokens, train),
        shape.base_layer_tokens(tokens, train),
    )
    at_once = base_tokens_at_once(settings, device.on_cpu)
    passes = math.ceil(tokens / at_once)
    flops = layer_tokens * base_layer_flops(shape, settings.seq_len) + with_logits * 2 * shape.counts.head
    weights = base_weight_bytes(shape, settings.base_quantization, width)
    if settings.base_quantization == "nf4":  # every product writes and reads the weights it unpacks
        weights += 2 * width * shape.base_quantized()
    per_layer_token = width * (14 * s.hidden_size + 7 * s.intermediate_size)
    moved = passes * weights + layer_tokens * per_layer_token + with_logits * s.vocab_size * (2 * width + 7 * 4)
    chunks = with_logits / chunk_tokens(s.vocab_size, device.dtype)
    launches = layer_tokens / at_once * BASE_LAYER_LAUNCHES + chunks * CHUNK_LAUNCHES
    return _time(flops, moved, launches, device)


def base_layer_flops(shape: Shape, seq_len: int) -> int:
    """Of a token in a layer of the base; masked scores are computed too."""
    counts = shape.counts
    matrices = counts.query_key_matrices() + counts.value_output_mlp()
    return 2 * matrices + 4 * seq_len * counts.attention_inner


def base_flops(shape: Shape, seq_len: int, *, with_logits: bool) -> int:
    """Of a token in the base."""
    head = 2 * shape.counts.head if with_logits else 0
    return shape.base.num_hidden_layers * base_layer_flops(shape, seq_len) + head


def tokens_with_logits(settings: RunSettings, shape: Shape, tokens: int, train_tokens: int) -> int:
    """Of the ``tokens`` of a base pass: the training tokens' logits are made where their scores come from them, unless
    all enter the first stage whatever their scores."""
    scored = any(criterion.needs_logits for criterion in scored_by(settings)) and not shape.needs.all_enter
    return tokens if scored else tokens - train_tokens


def epoch_time(
    settings: RunSettings, base_config: Any, device: Device, micro: int, labelled_share: float = 1.0, gpus: int = 1
) -> Time:
    """An epoch of stage 1 over its hard tokens, ``micro`` of them at once, without validation.

    ``labelled_share``: of the training tokens, among which it takes them. ``gpus``: that train together; ``settings``
    have one's share.
    """
    shape, width = Shape.from_settings(settings, base_config, labelled_share), device.dtype.itemsize
    s, trained = shape.stage, shape.counts.trained()
    tokens = hard_count(settings.hard_ratio, round(settings.expected_tokens("train") * labelled_share))
    steps = math.ceil(tokens / settings.batch_tokens)
    parts = steps * math.ceil(settings.batch_tokens / micro)
    learning = shape.counts.trained_matrices()
    frozen = shape.counts.matrices() - learning
    flops: float = tokens * shape.step_flops(settings)
    step_bytes = trained * (28 if settings.optimizer == "adamw" else 16)  # weights, gradient, state: read and written
    halves = has_half_weights(settings, shape, width, micro, on_cpu=device.on_cpu, gpus=gpus)
    if settings.grad_clip > 0:  # a norm; on the CPU a pass that clips as well
        step_bytes += trained * (12 if device.on_cpu else width if halves else 4)
    part_bytes: float = learning * 3 * width + 2 * shape.counts.head * width  # weights twice, a gradient
    if width < 4 and not halves:
        part_bytes += learning * (4 + width + width + 4)  # casts of both
    # Read there and back; in 4 bit each of them also writes what it unpacks.
    part_bytes += 2 * frozen * (NF4_BYTES + 2 * width if settings.base_quantization == "nf4" else width)
    activations = s.layers * 4 * saved_activation_bytes(shape, width)  # each written and read, there and back
    token_bytes = activations + s.vocab_size * (3 * width + 6 * 4)
    moved: float = steps * step_bytes + parts * part_bytes + tokens * token_bytes
    chunks = max(parts, tokens / chunk_tokens(s.vocab_size, device.dtype))
    memory = shape.memory(settings, width)
    moved += steps * 4 * memory.training_bytes(settings.batch_tokens, device.on_cpu)
    if memory.recomputes:
        flops += recompute_flops(memory)
    of = shape.counts.launches
    launches: float = parts * (s.layers * of["layer"] + of["once"] + of["loss"]) + steps * of["optimizer"]
    if settings.easy_tokens == "forward":
        launches += parts * (s.layers * of["easy_layer"] + of["easy_once"])
    launches += (chunks - parts) * CHUNK_LAUNCHES
    return _time(flops, moved, launches, device)


def _time(flops: float, moved: float, launches: float, device: Device) -> Time:
    return Time(flops / device.rate, moved / device.bandwidth, launches * device.launch_seconds)
