"""The k smallest of N scores, as ascending indices: exact, deterministic, three launches, no atomics.

    index[b]  = ascending indices of the k smallest scores[b]; of equal scores the lowest index first
    bounds[b] = (k-th smallest, (k+1)-th smallest); -inf and +inf where there is none

scores: (B, N) float32, any row stride. index: (B, k) int64. bounds: (B, 2) float32. -0.0 equals 0.0; NaN is last.

Scores become uint32 keys in the same order. Each row is cut into G chunks of consecutive scores, one program each:

1. histogram: a stratified sample of the row brackets the k-th key, [low, high]; each chunk counts its keys in
   BINS bins, one below the bracket, one above, the rest of equal width 2^shift within.
2. narrow: the counts say which bin holds the k-th key, and where in the row each chunk's part of that bin starts;
   the keys of the bin, the candidates, are packed densely in the order of their index.
3. compact: a radix select over the candidates (a few dozen, as a rule) gives the k-th key and how many of its ties to
   take; each chunk then writes its indices at a place known from the counts.

A sample that misses costs time, not exactness: the candidates are then the whole outer bin. Every program repeats the
little work that all need, so programs wait for each other only at kernel boundaries. After the radix select of
Alabi et al., "Fast k-selection algorithms for graphics processing units" (2012), and sample-based splitters.

Shape legend: N scores of a row, B rows, K selected, G chunks of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, unit_stride

BLOCK = 2048  # scores a program looks at in one step
MAX_CHUNKS = 128  # G at most: step 2 reads G * BINS counts in each program
BINS = 256
SAMPLE = 1024
MARGIN = 64  # of SAMPLE, on either side of the k-th: 4 standard deviations at worst
STATE = 7  # int32 a row: low, high, shift | base, bits, candidates, rank among them
GROUP = 16  # chunks whose counts are summed in one step
NUM_WARPS = 8
NO_SPECIAL = ["N", "G", "k", "chunk"]


@triton.jit
def _sort_key(x):
    """uint32 keys in the order of the floats; -0.0 as 0.0, every NaN as the largest."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where(bits > 0x7FFFFFFF, ~bits, bits | 0x80000000)
    key = tl.where(size == 0, 0x80000000, key)
    return tl.where(size > 0x7F800000, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def _key_value(key):
    """The float of a key; the inverse of _sort_key."""
    bits = tl.where(key > 0x7FFFFFFF, key ^ 0x80000000, ~key).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bin_of(key, low, high, shift, BINS: tl.constexpr):
    """0 below the bracket, BINS - 1 above it, 1 to BINS - 2 inside."""
    inner = ((key - low) >> shift).to(tl.int32) + 1
    return tl.where(key < low, 0, tl.where(key > high, BINS - 1, inner))


@triton.jit
def _bracket(scores_ptr, N, rank, SAMPLE: tl.constexpr, MARGIN: tl.constexpr, BINS: tl.constexpr):
    """(low, high, shift): two keys of a sample around the rank-th of the row, and the log2 width of a bin."""
    j = tl.arange(0, SAMPLE)
    # One score of each SAMPLE-th of the row, at the place the golden ratio picks: no period of the data can match it.
    spot = ((j.to(tl.int64) * 65536 + ((j * 40503) & 65535)) * N) // (65536 * SAMPLE)
    at = tl.where(N > SAMPLE, spot, j.to(tl.int64))
    size = tl.minimum(N, SAMPLE)
    valid = j < size
    key = _sort_key(tl.load(scores_ptr + at, mask=valid, other=0.0))  # [SAMPLE]
    centre = (rank.to(tl.int64) * size // N).to(tl.int32)
    low_rank = tl.maximum(centre - MARGIN, 1)
    high_rank = tl.minimum(centre + MARGIN, size)
    low = tl.full([], 0, tl.uint32)
    high = tl.full([], 0, tl.uint32)
    # The largest x with fewer than r keys below it is the r-th key: find it bit by bit.
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        below_low = (valid & (key < (low | bit))).to(tl.int32)
        below_high = (valid & (key < (high | bit))).to(tl.int32)
        below = tl.sum(below_low * 65536 + below_high, axis=0)
        low = tl.where((below >> 16) < low_rank, low | bit, low)
        high = tl.where((below & 65535) < high_rank, high | bit, high)
        bit = bit >> 1
    shifts = tl.arange(0, 32).to(tl.uint32)
    shift = tl.sum((((high - low) >> shifts) > BINS - 3).to(tl.int32), axis=0).to(tl.uint32)
    return low, high, shift


@triton.jit(do_not_specialize=NO_SPECIAL)
def _select_hard_histogram_kernel(
    scores_ptr, hist_ptr, state_ptr, N, G, k, chunk, stride,
    BLOCK: tl.constexpr, BINS: tl.constexpr, SAMPLE: tl.constexpr, MARGIN: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, g = pid // G, pid % G
    scores_ptr += row * stride
    low, high, shift = _bracket(scores_ptr, N, tl.maximum(k, 1), SAMPLE, MARGIN, BINS)
    count = tl.zeros([BINS], tl.int32)
    for start in range(0, chunk, BLOCK):
        at = g * chunk + start + tl.arange(0, BLOCK)  # [BLOCK]
        valid = at < N
        key = _sort_key(tl.load(scores_ptr + at, mask=valid, other=0.0))
        count += tl.histogram(_bin_of(key, low, high, shift, BINS), BINS, mask=valid)
    tl.store(hist_ptr + pid * BINS + tl.arange(0, BINS), count)
    if g == 0:
        tl.store(state_ptr + row * STATE, low.to(tl.int32))
        tl.store(state_ptr + row * STATE + 1, high.to(tl.int32))
        tl.store(state_ptr + row * STATE + 2, shift.to(tl.int32))


@triton.jit(do_not_specialize=NO_SPECIAL)
def _select_hard_narrow_kernel(
    scores_ptr, hist_ptr, state_ptr, chunks_ptr, candidates_ptr, N, G, k, chunk, stride,
    BLOCK: tl.constexpr, BINS: tl.constexpr, GROUP: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, g = pid // G, pid % G
    low = tl.load(state_ptr + row * STATE).to(tl.uint32)
    high = tl.load(state_ptr + row * STATE + 1).to(tl.uint32)
    shift = tl.load(state_ptr + row * STATE + 2).to(tl.uint32)

    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)  # in the chunks before this one
    for start in range(0, G, GROUP):
        other = start + tl.arange(0, GROUP)  # [GROUP]
        count = tl.load(
            hist_ptr + (row * G + other)[:, None] * BINS + bins[None, :], mask=(other < G)[:, None], other=0
        )  # [GROUP, BINS]
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((other < g)[:, None], count, 0), axis=0)
    rank = tl.maximum(k, 1)
    lower = tl.cumsum(total, axis=0) < rank  # bins whose keys are all taken
    bucket = tl.sum(lower.to(tl.int32), axis=0)
    taken_before = tl.sum(tl.where(lower, before, 0), axis=0)
    place = tl.sum(tl.where(bins == bucket, before, 0), axis=0)
    inside = (bucket > 0) & (bucket < BINS - 1)
    bits = tl.where(inside, shift, 32).to(tl.int32)  # of a candidate not known yet
    packed_bin = tl.where(bits > 0, bucket, -1)  # candidates that are all equal need no second look

    scores_ptr += row * stride
    candidates_ptr += row * N
    above = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
    to = place
    for start in range(0, chunk, BLOCK):
        at = g * chunk + start + tl.arange(0, BLOCK)  # [BLOCK]
        valid = at < N
        key = _sort_key(tl.load(scores_ptr + at, mask=valid, other=0.0))
        key_bin = _bin_of(key, low, high, shift, BINS)
        above = tl.minimum(above, tl.where(valid & (key_bin > bucket), key, 0xFFFFFFFF).to(tl.uint32))
        hit = valid & (key_bin == bucket)
        nth = tl.cumsum(hit.to(tl.int32), axis=0)
        tl.store(candidates_ptr + to + nth - 1, key.to(tl.int32), mask=valid & (key_bin == packed_bin))
        to += tl.sum(hit.to(tl.int32), axis=0)
    tl.store(chunks_ptr + pid * 3, taken_before)
    tl.store(chunks_ptr + pid * 3 + 1, place)
    tl.store(chunks_ptr + pid * 3 + 2, tl.min(above, axis=0).to(tl.int32))
    if g == 0:
        base = tl.where(inside, low + ((bucket - 1).to(tl.uint32) << shift), 0).to(tl.uint32)
        tl.store(state_ptr + row * STATE + 3, base.to(tl.int32))
        tl.store(state_ptr + row * STATE + 4, bits)
        tl.store(state_ptr + row * STATE + 5, tl.sum(tl.where(bins == bucket, total, 0), axis=0))
        tl.store(state_ptr + row * STATE + 6, rank - tl.sum(tl.where(lower, total, 0), axis=0))


@triton.jit(do_not_specialize=NO_SPECIAL)
def _select_hard_compact_kernel(
    scores_ptr, state_ptr, chunks_ptr, candidates_ptr, index_ptr, bounds_ptr, N, G, k, chunk, stride,
    BLOCK: tl.constexpr, BINS: tl.constexpr, CHUNKS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, g = pid // G, pid % G
    kth = tl.load(state_ptr + row * STATE + 3).to(tl.uint32)
    bits = tl.load(state_ptr + row * STATE + 4)
    count = tl.load(state_ptr + row * STATE + 5).to(tl.int64)  # int64: the loops below step past it
    ties = tl.load(state_ptr + row * STATE + 6)  # the rank among the candidates; in the end, how many ties to take
    less_before = tl.load(chunks_ptr + pid * 3)
    place = tl.load(chunks_ptr + pid * 3 + 1)

    candidates_ptr += row * N
    lane = tl.arange(0, BLOCK)
    equal_before, equal_total = place, count.to(tl.int32)  # of candidates that are all equal
    above = tl.full([], 0xFFFFFFFF, tl.uint32)
    if bits > 0:
        while bits > 0:
            step = tl.minimum(bits, 8)
            bits -= step
            digits = tl.zeros([BINS], tl.int32)
            for start in range(0, count, BLOCK):
                valid = start + lane < count
                key = tl.load(candidates_ptr + start + lane, mask=valid, other=0).to(tl.uint32)  # [BLOCK]
                digit = (key - kth) >> bits.to(tl.uint32)
                hit = valid & (key >= kth) & (digit < (1 << step).to(tl.uint32))
                digits += tl.histogram(tl.where(hit, digit, 0).to(tl.int32), BINS, mask=hit)
            sums = tl.cumsum(digits, axis=0)
            lower = sums < ties
            kth += tl.sum(lower.to(tl.int32), axis=0).to(tl.uint32) << bits.to(tl.uint32)
            ties -= tl.sum(tl.where(lower, digits, 0), axis=0)
        less = tl.zeros([BLOCK], tl.int32)
        equal = tl.zeros([BLOCK], tl.int32)
        equal_all = tl.zeros([BLOCK], tl.int32)
        larger = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
        for start in range(0, count, BLOCK):
            valid = start + lane < count
            earlier = start + lane < place
            key = tl.load(candidates_ptr + start + lane, mask=valid, other=0).to(tl.uint32)
            less += (earlier & (key < kth)).to(tl.int32)
            equal += (earlier & (key == kth)).to(tl.int32)
            equal_all += (valid & (key == kth)).to(tl.int32)
            larger = tl.minimum(larger, tl.where(valid & (key > kth), key, 0xFFFFFFFF).to(tl.uint32))
        less_before += tl.sum(less, axis=0)
        equal_before = tl.sum(equal, axis=0)
        equal_total = tl.sum(equal_all, axis=0)
        above = tl.min(larger, axis=0)

    if g == 0:
        others = tl.arange(0, CHUNKS)  # [CHUNKS]
        above_bin = tl.load(chunks_ptr + (row * G + others) * 3 + 2, mask=others < G, other=-1).to(tl.uint32)
        after = tl.where((equal_total > ties) | (k == 0), kth, tl.minimum(above, tl.min(above_bin, axis=0)))
        tl.store(bounds_ptr + row * 2, tl.where(k == 0, float("-inf"), _key_value(kth)))
        tl.store(bounds_ptr + row * 2 + 1, tl.where(k == N, float("inf"), _key_value(after.to(tl.uint32))))

    scores_ptr += row * stride
    index_ptr += row * k
    for start in range(0, chunk, BLOCK):
        at = g * chunk + start + lane  # [BLOCK]
        valid = at < N
        key = _sort_key(tl.load(scores_ptr + at, mask=valid, other=0.0))
        is_less = valid & (key < kth)
        is_equal = valid & (key == kth)
        both = is_less.to(tl.int32) * 65536 + is_equal.to(tl.int32)  # two counts in one scan
        earlier_both = tl.cumsum(both, axis=0) - both
        equal_rank = equal_before + (earlier_both & 65535)
        to = less_before + (earlier_both >> 16) + tl.minimum(equal_rank, ties)
        tl.store(index_ptr + to, at, mask=(is_less | (is_equal & (equal_rank < ties))) & (to < k))
        sum_both = tl.sum(both, axis=0)
        less_before += sum_both >> 16
        equal_before += sum_both & 65535


def select_hard(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``index`` ``(B, k)`` int64 and ``bounds`` ``(B, 2)`` float32. Three launches; nothing waits for the device."""
    rows, n = scores_BN.shape
    device = scores_BN.device
    index_BK = torch.empty(rows, k, dtype=torch.int64, device=device)
    if rows == 0 or n == 0:
        bounds_B2 = torch.full((rows, 2), torch.inf, dtype=torch.float32, device=device)
        bounds_B2[:, 0] = -torch.inf
        return index_BK, bounds_B2
    scores_BN = unit_stride(scores_BN)
    chunk = triton.cdiv(triton.cdiv(n, MAX_CHUNKS), BLOCK) * BLOCK
    chunks = triton.cdiv(n, chunk)
    bounds_B2 = torch.empty(rows, 2, dtype=torch.float32, device=device)
    hist = torch.empty(rows, chunks, BINS, dtype=torch.int32, device=device)
    state = torch.empty(rows, STATE, dtype=torch.int32, device=device)
    per_chunk = torch.empty(rows, chunks, 3, dtype=torch.int32, device=device)
    candidates = torch.empty(rows, n, dtype=torch.int32, device=device)
    sizes = (n, chunks, k, chunk, scores_BN.stride(0))
    grid = (rows * chunks,)
    common = {"BLOCK": BLOCK, "BINS": BINS, "STATE": STATE, "num_warps": NUM_WARPS}
    with on_device_of(scores_BN):
        _select_hard_histogram_kernel[grid](scores_BN, hist, state, *sizes, SAMPLE=SAMPLE, MARGIN=MARGIN, **common)
        _select_hard_narrow_kernel[grid](scores_BN, hist, state, per_chunk, candidates, *sizes, GROUP=GROUP, **common)
        _select_hard_compact_kernel[grid](
            scores_BN, state, per_chunk, candidates, index_BK, bounds_B2, *sizes, CHUNKS=MAX_CHUNKS, **common
        )
    return index_BK, bounds_B2
