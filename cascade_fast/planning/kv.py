"""Whether the base's keys and values are stored by the base pass or recomputed for every batch."""

from cascade_fast.settings import SPLITS
from cascade_fast.stages.counts import StageMemory

DISK_BYTES_PER_SECOND = 500e6  # assumed: a cloud host's solid-state disk


def kv_disk_bytes(memory: StageMemory) -> float:
    """Of the base's keys and values on disk, all splits. Not of other text, which decides nothing about a run."""
    tokens = sum(memory.settings.expected_tokens(split) for split in SPLITS)
    return float(tokens * memory.kv_numbers * memory.stored)


def recompute_flops(memory: StageMemory) -> float:
    """Of the base's keys and values of all training tokens, once: the layers' forward pass."""
    s, counts = memory.settings, memory.counts
    return float(
        s.expected_tokens("train")
        * (2 * counts.config.layers * counts.layer_matrices() + counts.attention_flops(s.seq_len))
    )


def kv_seconds(
    memory: StageMemory, flops_per_second: float, bytes_per_second: float, ram_bytes: float
) -> dict[str, float]:
    """Seconds that the base's keys and values cost in a run of one stage: written once and read in every epoch, or
    recomputed in every epoch. Files that fit in half the memory are read from there."""
    epochs, size = memory.settings.epochs, kv_disk_bytes(memory)
    read = bytes_per_second if size < ram_bytes / 2 else DISK_BYTES_PER_SECOND
    return {
        "store": size / DISK_BYTES_PER_SECOND + epochs * size / read,
        "recompute": epochs * recompute_flops(memory) / flops_per_second,
    }


def choose_kv(seconds: dict[str, float], size: float, disk_bytes: float) -> tuple[str, str]:
    """``store`` or ``recompute``, and why: what is cheaper of what fits on a disk with ``disk_bytes`` free."""
    costs = (
        f"storing {seconds['store']:.1f} s and {size / 2**30:.2f} GiB of disk, recomputing {seconds['recompute']:.1f} s"
    )
    if size > 0.9 * disk_bytes:
        return "recompute", f"{costs}; {disk_bytes / 2**30:.2f} GiB are free"
    return min(("store", "recompute"), key=lambda how: seconds[how]), costs
