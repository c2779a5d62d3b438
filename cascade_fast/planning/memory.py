"""How much memory a run takes and how long an epoch should, from the base's configuration alone: no weights, no GPU.

Every number is arithmetic on shapes. A *phase* is a stretch of the run with a peak of its own; what lives through it
("weights") and what comes and goes ("activations") are lines of its table.

- On the GPU what comes and goes at different moments shares memory: the peak of a training step is the larger of its
  end of the forward pass (activations) and its end of the backward pass (gradients). Compare with
  ``torch.cuda.max_memory_allocated``.
- On the CPU it adds up: glibc keeps freed blocks below 32 MiB, so the resident set holds both. Compare with the
  process's peak resident set, which also counts the *mapped* files (hidden stores, the shared head): the system can
  drop those pages, so they count for the peak but not for whether the run fits.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from cascade_fast.base.base_pass import scored_by
from cascade_fast.base.fill_store import TOKENS_AT_ONCE as BASE_TOKENS
from cascade_fast.losses import SPARE, chunk_tokens
from cascade_fast.planning.counts import (
    Shape,
    base_weight_bytes,
    gradient_bytes,
    has_half_weights,
    kept_layer_bytes,
    optimizer_bytes,
    saved_activation_bytes,
)
from cascade_fast.runtime.snapshots import snapshot_fits
from cascade_fast.selection import hard_count
from cascade_fast.settings import READ, RunSettings
from cascade_fast.stages.exits import TOKENS_AT_ONCE as EVAL_TOKENS

GIB = 2**30
# Resident set of the trainer before it loads a base: Python, torch (CPU build), transformers, datasets. Measured.
PROCESS_BYTES = 455 * 2**20
# CUDA context, cuBLAS and kernels' code; counts for what fits, not for max_memory_allocated. Estimate for a T4.
CONTEXT_BYTES = GIB // 2
HOST_BYTES = 2.5 * GIB  # of the process beside a GPU: torch's CUDA build, the driver. Estimate
LIST_BYTES = 5 * 8  # of a hard token in an epoch's lists of what each batch takes: see stages/tokens.py
TOKEN_BYTES = 8 + 4 + 4 + 4 + 4  # of a hidden store, beside the hidden state: see hidden_store.py


# --- phases -----------------------------------------------------------------------------------------------------------


STORES_ON_GPU = "hidden stores (on the GPU)"
BASE_PASS_DISK = "base pass (hidden stores, head)"  # in the cache folder; all else on disk is the run folder's


@dataclass
class Phase:
    """One phase's bytes. ``lasting`` live all through it, ``passing`` come and go, ``mapped`` are pages of files."""

    name: str
    on_cpu: bool
    lasting: dict[str, float] = field(default_factory=dict)
    passing: dict[str, float] = field(default_factory=dict)
    mapped: dict[str, float] = field(default_factory=dict)

    @property
    def needed(self) -> float:
        """Bytes that must be there: on a GPU only the larger of ``passing`` counts; see the module's docstring."""
        passing = self.passing.values()
        return sum(self.lasting.values()) + (sum(passing) if self.on_cpu else max(passing, default=0))

    @property
    def peak(self) -> float:
        """With the pages of mapped files, as the process's resident set counts them."""
        return self.needed + sum(self.mapped.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Phases, and what else a run takes. All in bytes."""

    phases: list[Phase]
    ram: dict[str, float]  # of the host during training, beside a GPU; empty on the CPU: the phases are the host's
    ram_loading: float  # of the host while the base, or a new stage, passes through it on its way to the GPU
    ram_mapped: float  # pages of hidden stores, which the system may drop
    disk: dict[str, float]
    micro_batch_tokens: int
    store_on_gpu: float  # of the hidden states that training reads there; 0: they stay in the host's memory

    @property
    def worst(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def needed(self) -> float:
        return max(phase.needed for phase in self.phases)

    @property
    def ram_needed(self) -> float:
        """Of the host, beside a GPU; 0 on the CPU."""
        return max(self.ram_loading, sum(self.ram.values()))

    def fits(self, memory_bytes: float, ram_bytes: float = math.inf) -> bool:
        """Whether the device has room for what is needed, mapped pages left out, and the host beside it too."""
        context = 0 if self.worst.on_cpu else CONTEXT_BYTES
        return self.needed + context <= memory_bytes and self.ram_needed <= ram_bytes

    def to_dict(self) -> dict[str, Any]:
        """Bytes as integers, for ``results.json``."""
        return {
            "peak_bytes": round(self.worst.peak),
            "needed_bytes": round(self.needed),
            "phase": self.worst.name,
            "phases": {phase.name: round(phase.peak) for phase in self.phases},
            "micro_batch_tokens": self.micro_batch_tokens,
        }


def memory_plan(
    settings: RunSettings,
    base_config: Any,
    *,
    dtype: torch.dtype,
    on_cpu: bool,
    memory_bytes: float | None = None,
    fused_attention: bool = True,
    process_bytes: int = PROCESS_BYTES,
    labelled_share: float = 1.0,
    gpus: int = 1,
) -> MemoryPlan:
    """The plan of a run with ``settings`` on a base with transformers' configuration ``base_config``.

    Args:
        dtype: compute dtype.
        on_cpu: whether the run computes on the CPU.
        memory_bytes: of the device; sets the micro batch where ``settings.micro_batch_tokens`` is None. None: the whole
            batch at once.
        fused_attention: False where SDPA holds all attention scores in float32 (grouped queries below sm_80).
        process_bytes: resident set before a base is loaded (CPU).
        labelled_share: of the tokens.
        gpus: that train together; ``settings.batch_tokens`` are one's.
    """
    micro = settings.micro_batch_tokens or settings.batch_tokens
    micro = min(micro, settings.batch_tokens)
    if memory_bytes is not None and settings.micro_batch_tokens is None:
        micro = micro_batch_tokens(
            settings, base_config, memory_bytes, dtype=dtype, on_cpu=on_cpu, labelled_share=labelled_share, gpus=gpus
        )
    shape, width = Shape.from_settings(settings, base_config, labelled_share), dtype.itemsize
    process = {"process": float(process_bytes)} if on_cpu else {}
    stores, store_disk = _store_bytes(settings, shape, width)
    # What the base pass leaves of the base, all at once.
    kept = shape.counts.head * width + kept_layer_bytes(shape, settings.base_quantization, width)
    base = _base_phase(settings, shape, width, fused_attention, on_cpu)
    step = _training_phase(settings, shape, width, micro, on_cpu, gpus)
    phases = [base, step]
    if on_cpu:
        phases.append(_keeping_phase(step, shape))
    phases.append(_evaluation_phase(settings, shape, width, on_cpu))
    ram: dict[str, float] = {}
    loading = 0.0
    if on_cpu:
        for phase in phases:
            phase.lasting = {**process, **phase.lasting}
            phase.mapped["hidden stores"] = stores if phase is not base else store_disk
        # With a single epoch there is none, unless it takes longer than checkpoint_minutes.
        snapshot = 4.0 * shape.counts.parameters() + optimizer_bytes(shape, settings.optimizer)
        free = math.inf if memory_bytes is None else memory_bytes - step.needed
        if settings.epochs > 1 and snapshot_fits(snapshot, free):
            step.lasting["snapshot for a checkpoint"] = snapshot
    else:
        ram["process with CUDA (estimate)"] = HOST_BYTES
        if settings.num_stages > 1:
            ram["earlier stages (float32)"] = _earlier_stage_bytes(settings, shape)
        state = optimizer_bytes(shape, settings.optimizer)
        if settings.optimizer.startswith("paged"):  # managed memory: the GPU's where there is room, else the host's
            ram[f"optimizer state ({settings.optimizer})"] = state
            state = 0.0
        # A snapshot, or what is written at once. A snapshot has paged state, too, where the host has room for that.
        ram["a checkpoint on its way to disk"] = 4.0 * shape.counts.parameters() + state
        # In 4 bit the base goes to the GPU tensor by tensor.
        whole = 0.0 if settings.base_quantization == "nf4" else float(shape.base_parameters() * width)
        loading = HOST_BYTES + max(whole, kept, 4.0 * shape.counts.parameters())
    saved = 4.0 * shape.counts.parameters()
    disk = {
        BASE_PASS_DISK: store_disk + kept,
        "hidden stores of later stages": stores - store_disk,
        # Two of each are kept, and a third is there while it is written.
        "checkpoints, best weights": 3 * (2 * saved + optimizer_bytes(shape, settings.optimizer)),
        "stages": settings.num_stages * saved,
    }
    on_gpu = step.lasting.get(STORES_ON_GPU, 0.0)
    return MemoryPlan(phases, ram, loading, 0.0 if on_cpu else stores, disk, micro, on_gpu)


def _base_phase(settings: RunSettings, shape: Shape, width: int, fused_attention: bool, on_cpu: bool) -> Phase:
    s = shape.stage
    n = base_tokens_at_once(settings, on_cpu)
    attention = 0 if fused_attention else 3 * n * settings.seq_len * s.heads * 4
    mlp = 3 * s.intermediate_size * width
    layer = n * (4 * s.hidden_size * width + 2 * s.hidden_size * 4 + mlp) + attention
    if settings.base_quantization == "nf4":
        layer += shape.counts.largest_matrix() * width  # one at a time is unpacked
    passing = {"activations": layer, "logits (a chunk)": _logit_bytes(shape, width, on_cpu=on_cpu)}
    if shape.needs.keys_and_values:
        extra = shape.memory(settings, width)
        passing["keys and values"] = extra.base_pass_bytes(n, shape.base.num_hidden_layers)
    weights = base_weight_bytes(shape, settings.base_quantization, width)
    return Phase("base pass", on_cpu, {"base weights": weights, "states kept": 3 * n * s.hidden_size * width}, passing)


def _training_phase(settings: RunSettings, shape: Shape, width: int, micro: int, on_cpu: bool, gpus: int) -> Phase:
    s, spread = shape.stage, gpus if settings.shard == "fsdp" else 1
    phase = Phase("training", on_cpu, {"stage weights (float32)": 4.0 * shape.counts.parameters() / spread})
    if spread > 1:  # one is used while the next one comes
        phase.lasting["layers gathered (float32)"] = 2 * 4.0 * shape.counts.parameters() / s.layers
    if on_cpu and settings.num_stages > 1:  # beside a GPU they wait in the host's memory
        phase.lasting["earlier stages (float32)"] = _earlier_stage_bytes(settings, shape)
    if on_cpu or not settings.optimizer.startswith("paged"):
        phase.lasting[f"optimizer state ({settings.optimizer})"] = optimizer_bytes(shape, settings.optimizer) / spread
    if not on_cpu:
        phase.lasting |= _read_by_gpu(settings, shape, width, micro)
    halves = has_half_weights(settings, shape, width, micro, on_cpu=on_cpu, gpus=gpus)
    gradients = gradient_bytes(shape, width, halves=halves) / spread
    own_head = 4.0 * shape.counts.head if s.head == "own" else 0.0
    activations: float = micro * (
        s.layers * saved_activation_bytes(shape, width, on_cpu=on_cpu) + 4 * 4 * s.hidden_size
    )
    casts = _cast_bytes(shape, width)  # kept for the backward pass
    if halves:
        phase.lasting["weights in the compute dtype"] = casts
        casts = 0.0
    logits = _logit_bytes(shape, width, on_cpu=on_cpu)
    activations += shape.memory(settings, width).training_bytes(micro, on_cpu)
    casts += _add_recomputing(phase, settings, shape, width)
    if s.head == "own":  # its gradient is made a chunk at a time and added to the sum
        logits += shape.counts.head * (2 * width if width < 4 else 0) + shape.counts.head * 4
    parts = {"activations": activations, "weights in the compute dtype": casts, "logits (a chunk)": logits}
    if on_cpu:
        phase.lasting["gradients"] = gradients
        phase.passing = {name: size for name, size in parts.items() if size}
    elif micro < settings.batch_tokens:  # the gradients of the parts before live on
        phase.lasting["gradients"] = gradients
        phase.passing = {"activations, casts, logits (a chunk)": sum(parts.values())}
    else:
        phase.passing = {
            "activations, casts, logits (a chunk)": sum(parts.values()) + own_head,
            "gradients": gradients,
        }
    _add_shared(phase, settings, shape, width)
    return phase


def _add_recomputing(phase: Phase, settings: RunSettings, shape: Shape, width: int) -> float:
    """Where the base's keys and values are recomputed, by the base's own layers or a copy; returns the bytes of its
    weights' casts."""
    if shape.counts.frozen() or not shape.memory(settings, width).recomputes:
        return 0.0
    phase.lasting["frozen copy of the layers (float32)"] = 4.0 * shape.counts.parameters()
    return _cast_bytes(shape, width)


def _earlier_stage_bytes(settings: RunSettings, shape: Shape) -> float:
    return (settings.num_stages - 1) * 4.0 * shape.counts.parameters()


def _keeping_phase(step: Phase, shape: Shape) -> Phase:
    """The end of training: the best weights are read back from their file. The step's freed blocks are still there but
    for those of 32 MiB and more (logits, large gradients), which glibc hands back at once."""
    s, at_once = shape.stage, 32 * 2**20
    lasting, passing = dict(step.lasting), dict(step.passing)
    del passing["logits (a chunk)"]
    head = 4.0 * shape.counts.head if s.head == "own" else 0.0
    if 4 * shape.counts.largest_trained() >= at_once:
        lasting["gradients"] = head
    if head >= at_once:
        lasting["gradients"] -= head
    best = {"best weights read back": 4.0 * shape.counts.parameters()}
    return Phase("best epoch kept", True, lasting, passing, {**step.mapped, **best})


def _evaluation_phase(settings: RunSettings, shape: Shape, width: int, on_cpu: bool) -> Phase:
    s = shape.stage
    phase = Phase("evaluation", on_cpu, {"stages (float32)": 4.0 * settings.num_stages * shape.counts.parameters()})
    casts = _cast_bytes(shape, width)
    layer: float = EVAL_TOKENS * (6 * s.hidden_size * 4 + 3 * s.intermediate_size * width)
    head_cast = shape.counts.head * width if s.head == "own" and width < 4 else 0
    logits = _logit_bytes(shape, width, on_cpu=on_cpu) + head_cast
    layer += shape.memory(settings, width).evaluation_bytes(EVAL_TOKENS, on_cpu)
    casts += _add_recomputing(phase, settings, shape, width)
    if on_cpu:
        phase.passing = {"weights in the compute dtype": casts, "activations": layer, "logits (a chunk)": logits}
    else:
        phase.lasting |= _read_by_gpu(settings, shape, width, EVAL_TOKENS)
        phase.passing = {"activations, casts, logits (a chunk)": casts + layer + logits}
    _add_shared(phase, settings, shape, width)
    return phase


def _cast_bytes(shape: Shape, width: int) -> float:
    """Autocast's copies of a stage's matrices in the compute dtype."""
    return float(width * shape.counts.trained_matrices()) if width < 4 else 0.0


def _add_shared(phase: Phase, settings: RunSettings, shape: Shape, width: int) -> None:
    """What is the base's, once for all stages: its head, and the layers that they copy or use. Pages of a file on the
    CPU; on a GPU only what they use as it is."""
    where = phase.mapped if phase.on_cpu else phase.lasting
    if shape.stage.head == "shared":
        where["shared head"] = float(shape.counts.head * width)
    layers = kept_layer_bytes(shape, settings.base_quantization, width)
    if layers and (phase.on_cpu or shape.counts.frozen()):
        where["the base's layers"] = layers
    if shape.counts.frozen() and settings.base_quantization == "none":
        # The copy that updates stand beside takes the place of the layers, on a GPU; see stages/lora.py. Beside an
        # update of one layer are zeros for those of others with the same inputs: about as much again.
        room = 2.0 * width * shape.counts.trained()
        if phase.on_cpu:
            phase.lasting["a copy of them, with the updates"] = layers + room
        else:
            where["the base's layers"] = layers + room


def _logit_bytes(shape: Shape, width: int, *, on_cpu: bool) -> float:
    """A chunk's logits, and on a GPU plain torch's float32 copies of them: see losses.py. Never a whole batch's."""
    tokens = chunk_tokens(shape.stage.vocab_size, torch.float32 if width == 4 else torch.bfloat16)
    wide = (1.0 + SPARE) * width if on_cpu else width + 16.0
    return wide * tokens * shape.stage.vocab_size


def _store_bytes(settings: RunSettings, shape: Shape, width: int) -> tuple[float, float]:
    """(mapped at most, of the base pass alone): 16 bit where the values fit; hard tokens of a stage or two."""
    train_val = settings.expected_tokens("train") + settings.expected_tokens("val")
    size = shape.stage.hidden_size
    stored = _number_bytes(settings)
    handed_on = 2 if width == 2 and stored == 2 else 4
    numbers = shape.memory(settings, width).kv_numbers  # keys and values of a token
    kept = numbers if shape.needs.keys_and_values else 0
    base = sum(map(settings.expected_tokens, READ)) * ((size + kept) * stored + TOKEN_BYTES)
    base += 4 * settings.expected_tokens("train") * (len(scored_by(settings)) - 1)  # a second score
    later, tokens = 0.0, train_val
    # Those of two stages back are removed, unless tokens attend to what they left.
    for _ in range(settings.num_stages - 1 if shape.kind.attends else min(settings.num_stages - 1, 2)):
        tokens = hard_count(settings.hard_ratio, tokens)
        later += tokens * ((size + numbers) * handed_on + TOKEN_BYTES)
    return base + later, base


def _read_by_gpu(settings: RunSettings, shape: Shape, width: int, micro: int) -> dict[str, float]:
    """Where ``settings.store`` is ``device``: the hidden states, keys and values that training reads, and an epoch's
    lists. Else the batch that is sent ahead."""
    stored, handed_on = _number_bytes(settings), 4  # in bfloat16 2: a bound
    numbers = shape.memory(settings, width).kv_numbers
    kept = numbers if shape.needs.keys_and_values else 0
    size, attends = shape.stage.hidden_size, shape.kind.attends
    if settings.store != "device":
        context = micro / settings.hard_ratio * kept * stored
        return {"the next batch": micro * (size * handed_on + LIST_BYTES) + context}
    train, val = settings.expected_tokens("train"), settings.expected_tokens("val")
    live, later = (train + val) * (size + kept) * stored, 0.0
    most, tokens = float(live), train + val
    for _ in range(settings.num_stages - 1):
        tokens = hard_count(settings.hard_ratio, tokens)
        after = tokens * (size + numbers) * handed_on
        later = later + after if attends else after
        # Tokens that stand for themselves need the base's no more, but for validation.
        most = max(most, later + (live if attends else val * size * stored))
    lists = train * (settings.hard_ratio * LIST_BYTES + (8 if attends else 0))
    return {STORES_ON_GPU: most + lists}


def read_bytes(settings: RunSettings, shape: Shape, width: int) -> float:
    """Of the base's stores that an epoch of stage 1 reads: its hard tokens; where they attend, the keys and values of
    all tokens, too."""
    tokens, stored = settings.expected_tokens("train"), _number_bytes(settings)
    kept = shape.memory(settings, width).kv_numbers if shape.needs.keys_and_values else 0
    hard = hard_count(settings.hard_ratio, tokens) * (shape.stage.hidden_size * stored + TOKEN_BYTES)
    return hard + tokens * kept * stored


def _number_bytes(settings: RunSettings) -> int:
    """Of a number in the base's stores: 16 bit where the values fit, float16 of a float32 base."""
    return 4 if settings.store_dtype == "float32" else 2


def base_tokens_at_once(settings: RunSettings, on_cpu: bool) -> int:
    """Tokens of a forward pass of the base."""
    blocks = max(1, BASE_TOKENS["cpu" if on_cpu else "cuda"] // settings.seq_len)
    return min(blocks * settings.seq_len, settings.expected_tokens("train"))


def micro_batch_tokens(
    settings: RunSettings,
    base_config: Any,
    memory_bytes: float,
    *,
    dtype: torch.dtype,
    on_cpu: bool = False,
    labelled_share: float = 1.0,
    gpus: int = 1,
) -> int:
    """Tokens to run through a stage at once so that training fits in ``memory_bytes``.

    The batch itself, or the largest of its equal parts ``ceil(batch_tokens / n)`` that fits; the batch itself too
    where not even one token does: smaller parts cannot help then, and the plan says that the run does not fit.
    ``settings.micro_batch_tokens``, if set, is a bound.
    """
    shape = Shape.from_settings(settings, base_config, labelled_share)
    batch = settings.batch_tokens
    bound = min(batch, settings.micro_batch_tokens or batch)
    reserved = PROCESS_BYTES if on_cpu else CONTEXT_BYTES

    def fits(micro: int) -> bool:
        return _training_phase(settings, shape, dtype.itemsize, micro, on_cpu, gpus).needed + reserved <= memory_bytes

    parts = math.ceil(batch / bound)
    if fits(math.ceil(batch / parts)):
        return math.ceil(batch / parts)
    low, high = parts + 1, batch  # the smallest number of parts that fits, by bisection
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(math.ceil(batch / middle)) else (middle + 1, high)
    return math.ceil(batch / low) if fits(math.ceil(batch / low)) else bound


def largest_batch_tokens(
    settings: RunSettings, base_config: Any, memory_bytes: float, dtype: torch.dtype, on_cpu: bool
) -> int:
    """The largest batch that fits without accumulation, up to 2^20 tokens; 0 if none does."""
    shape = Shape.from_settings(settings, base_config)
    reserved = PROCESS_BYTES if on_cpu else CONTEXT_BYTES
    low, high = 0, 2**20
    while low < high:
        middle = (low + high + 1) // 2
        whole = dataclasses.replace(settings, batch_tokens=middle, micro_batch_tokens=None)
        phase = _training_phase(whole, shape, dtype.itemsize, middle, on_cpu, gpus=1)
        low, high = (middle, high) if phase.needed + reserved <= memory_bytes else (low, middle - 1)
    return low
