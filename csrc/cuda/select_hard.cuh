// select_hard: the k smallest scores of each row, exact, their indices in ascending order. One launch.
//
// A score becomes a 32-bit key of the same order (-0.0 and 0.0 one key, every NaN the largest). A radix select finds
// the k-th smallest key T from its highest bits down: three histograms of 11, 11 and 10 bits. A last pass writes the
// indices of all keys < T and of the first keys == T, up to k.
//
// A *team* of blocks serves one row; each block owns one contiguous chunk of it. The team meets at four barriers: one
// after each histogram, one after each block's counts, from which every block knows where its output starts. Blocks
// wait for each other, so a team of several blocks must be launched cooperatively (all blocks resident, or the launch
// fails); nothing else is assumed about forward progress. A team of one block needs no barrier and no workspace.
// Every sum is of integers: the result depends neither on the order of blocks nor on the size of the team.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kSelectItems = 4;                             // scores a thread handles between two barriers
constexpr int kTile = kSelectThreads * kSelectItems;        // scores a block writes out at a time
constexpr int kPasses = 3;
constexpr int kBins = 2048;                                 // 11 bits; the last pass uses half of them
constexpr int kBinsPerThread = kBins / kSelectThreads;
constexpr uint32_t kLargestKey = 0xffffffffu;

// Workspace of one row, zeroed before the launch: barrier counter, ~(smallest key above the last prefix), the three
// histograms, then two counts a block. The first two words have a 128-byte line each.
constexpr int kWorkAbove = 32;
constexpr int kWorkBins = 64;
constexpr int kWorkCounts = kWorkBins + kPasses * kBins;

__host__ __device__ constexpr int64_t select_work_words(int team_blocks) { return kWorkCounts + 2 * team_blocks; }

__device__ inline uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score);
  if (score != score) return kLargestKey;
  if (score == 0.f) return 0x80000000u;  // -0.0 too
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);  // the largest key gives back a NaN
}

struct SelectShared {
  uint32_t own[kBins];   // histogram of this block's chunk
  uint32_t team[kBins];  // histogram of the whole row
  uint32_t warp[2][kSelectWarps];
  uint32_t digit, below;
};

// Reduction over the block, in every thread. `slot` picks one of two scratch rows: use them in turn.
template <class Op>
__device__ inline uint32_t block_reduce(SelectShared& shared, int slot, uint32_t x) {
  x = warp_reduce<Op>(x);
  if (threadIdx.x % kWarp == 0) shared.warp[slot][threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared.warp[slot][0];
  for (int w = 1; w < kSelectWarps; ++w) x = Op()(x, shared.warp[slot][w]);
  return x;
}

// Waits until `arrivals` blocks have come here. What they wrote before is visible after (read it past the L1 cache).
__device__ inline void team_barrier(uint32_t* arrived, uint32_t arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*reinterpret_cast<volatile uint32_t*>(arrived) < arrivals) {
    }
    __threadfence();
  }
  __syncthreads();
}

// The bin of shared.team that holds the rank-th key (counted from 1) and the number of keys in the bins below it.
__device__ inline void find_digit(SelectShared& shared, uint32_t rank) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t bins[kBinsPerThread], total = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) total += bins[i] = shared.team[threadIdx.x * kBinsPerThread + i];
  uint32_t through = total;  // inclusive scan over the warp, then over the warps
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, through, step);
    if (lane >= step) through += left;
  }
  if (lane == kWarp - 1) shared.warp[0][warp] = through;
  __syncthreads();
  for (int w = 0; w < warp; ++w) through += shared.warp[0][w];
  uint32_t below = through - total;
  if (below < rank && rank <= through) {  // true in one thread
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (below < rank && rank <= below + bins[i]) {
        shared.digit = threadIdx.x * kBinsPerThread + i;
        shared.below = below;
        rank = 0;  // found: no later bin matches
      }
      below += bins[i];
    }
  }
  __syncthreads();
}

// Writes the indices of the chunk [lo, hi) with key < threshold, and with key == threshold for the first `ties` of
// the row, at their places in index_K; before_* count such keys of the row ahead of the chunk.
__device__ inline void write_selected(
    SelectShared& shared, const float* __restrict__ scores_N, uint32_t lo, uint32_t hi, uint32_t threshold,
    uint32_t ties, uint32_t before_less, uint32_t before_equal, int64_t* __restrict__ index_K) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t earlier_lanes = (1u << lane) - 1u;
  for (uint32_t tile = lo; tile < hi; tile += kTile) {
    uint32_t less[kSelectItems], equal[kSelectItems], counts = 0;  // ballots; counts: less + (equal << 16)
    const uint32_t first = tile + warp * (kWarp * kSelectItems) + lane;
#pragma unroll
    for (int j = 0; j < kSelectItems; ++j) {
      const uint32_t at = first + j * kWarp;
      const bool inside = at < hi;
      const uint32_t key = inside ? key_of(scores_N[at]) : kLargestKey;
      less[j] = __ballot_sync(kAllLanes, inside && key < threshold);
      equal[j] = __ballot_sync(kAllLanes, inside && key == threshold);
      counts += __popc(less[j]) + (__popc(equal[j]) << 16);
    }
    __syncthreads();  // everyone has read the previous tile's counts
    if (lane == 0) shared.warp[0][warp] = counts;
    __syncthreads();
    uint32_t earlier = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
      if (w < warp) earlier += shared.warp[0][w];
      total += shared.warp[0][w];
    }
    uint32_t less_now = before_less + (earlier & 0xffffu), equal_now = before_equal + (earlier >> 16);
#pragma unroll
    for (int j = 0; j < kSelectItems; ++j) {
      const uint32_t less_before = less_now + __popc(less[j] & earlier_lanes);
      const uint32_t equal_before = equal_now + __popc(equal[j] & earlier_lanes);
      const bool tie = (equal[j] >> lane & 1u) && equal_before < ties;
      if (tie || (less[j] >> lane & 1u)) index_K[less_before + min(equal_before, ties)] = first + j * kWarp;
      less_now += __popc(less[j]);
      equal_now += __popc(equal[j]);
    }
    before_less += total & 0xffffu;
    before_equal += total >> 16;
  }
}

// scores_BN: `rows` rows of n scores, `stride` apart. index_BK and bounds_B2 are contiguous. Blocks of a team are
// neighbours in the grid; with team_blocks > 1 there is one team a row (a team's workspace serves once).
__global__ void __launch_bounds__(kSelectThreads, 2) select_hard_kernel(
    const float* __restrict__ scores_BN, int64_t stride, int64_t rows, uint32_t n, uint32_t k, uint32_t team_blocks,
    uint32_t* __restrict__ work_BW, int64_t* __restrict__ index_BK, float* __restrict__ bounds_B2) {
  __shared__ SelectShared shared;
  const uint32_t thread = threadIdx.x, member = blockIdx.x % team_blocks;
  const bool alone = team_blocks == 1;
  // Chunks are whole 128-byte lines of scores; the last ones may be short or empty.
  const uint32_t share = (n + team_blocks - 1) / team_blocks;
  const uint32_t chunk = (share + kWarp - 1) / kWarp * kWarp;
  const uint32_t lo = min(n, member * chunk), hi = min(n, lo + chunk);

  for (int64_t row = blockIdx.x / team_blocks; row < rows; row += gridDim.x / team_blocks) {
    const float inf = __uint_as_float(0x7f800000u);
    if (n == 0) {
      if (thread == 0) bounds_B2[2 * row] = -inf, bounds_B2[2 * row + 1] = inf;
      continue;
    }
    const float* scores_N = scores_BN + row * stride;
    uint32_t* work = work_BW + (alone ? 0 : row * select_work_words(team_blocks));
    uint32_t rank = max(k, 1u);           // of the key looked for, among the keys that begin with `prefix`
    uint32_t prefix = 0;                  // the bits of it found so far
    uint32_t above = kLargestKey;         // smallest key whose first 22 bits are larger than the prefix
    uint32_t own_less = 0, own_equal = 0; // keys of the chunk below and at the threshold

#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool last = pass == kPasses - 1;
      const int bits = last ? 10 : 11, shift = pass == 0 ? 21 : last ? 0 : 10;
      for (uint32_t i = thread; i < kBins; i += kSelectThreads) shared.own[i] = 0;
      __syncthreads();
#pragma unroll 4
      for (uint32_t at = lo + thread; at < hi; at += kSelectThreads) {
        const uint32_t key = key_of(scores_N[at]);
        const uint32_t begin = pass == 0 ? 0 : key >> (shift + bits);
        if (begin == prefix) atomicAdd(&shared.own[key >> shift & ((1u << bits) - 1u)], 1u);
        if (last && begin > prefix) above = min(above, key);
      }
      __syncthreads();
      if (alone) {
        for (uint32_t i = thread; i < kBins; i += kSelectThreads) shared.team[i] = shared.own[i];
      } else {
        uint32_t* team_bins = work + kWorkBins + pass * kBins;
        for (uint32_t i = thread; i < kBins; i += kSelectThreads) {
          if (shared.own[i] != 0) atomicAdd(&team_bins[i], shared.own[i]);
        }
        if (last) {
          const uint32_t warp_above = warp_reduce<Min>(above);
          // Stored inverted, so that zeroed memory means "none".
          if (thread % kWarp == 0 && warp_above != kLargestKey) atomicMax(&work[kWorkAbove], ~warp_above);
        }
        team_barrier(&work[0], team_blocks * (pass + 1));
        for (uint32_t i = thread; i < kBins; i += kSelectThreads) shared.team[i] = __ldcg(&team_bins[i]);
        if (last) above = ~__ldcg(&work[kWorkAbove]);
      }
      __syncthreads();
      find_digit(shared, rank);
      const uint32_t digit = shared.digit;
      for (uint32_t i = thread; i < kBins; i += kSelectThreads) {
        if (i < digit) own_less += shared.own[i];
        if (last && i > digit && shared.team[i] != 0) above = min(above, prefix << bits | i);
      }
      if (last) own_equal = shared.own[digit];
      rank -= shared.below;
      prefix = prefix << bits | digit;
      __syncthreads();  // shared is free again
    }

    const uint32_t threshold = prefix, all_equal = shared.team[threshold & 1023u];
    const uint32_t ties = k == 0 ? 0 : rank;  // how many keys == threshold are selected
    if (member == 0) {
      const uint32_t smallest_above = block_reduce<Min>(shared, 0, above);
      if (thread == 0) {
        const float next = k == n ? inf : all_equal > ties ? score_of(threshold) : score_of(smallest_above);
        bounds_B2[2 * row] = k == 0 ? -inf : score_of(threshold);
        bounds_B2[2 * row + 1] = next;
      }
    }
    uint32_t before_less = 0, before_equal = 0;
    if (!alone) {
      uint32_t* counts = work + kWorkCounts;
      own_less = block_reduce<Sum>(shared, 1, own_less);
      if (thread == 0) {
        counts[2 * member] = own_less;
        counts[2 * member + 1] = own_equal;
      }
      team_barrier(&work[0], team_blocks * (kPasses + 1));
      for (uint32_t other = thread; other < member; other += kSelectThreads) {
        before_less += __ldcg(&counts[2 * other]);
        before_equal += __ldcg(&counts[2 * other + 1]);
      }
      before_less = block_reduce<Sum>(shared, 0, before_less);
      before_equal = block_reduce<Sum>(shared, 1, before_equal);
    }
    if (k > 0) {
      write_selected(shared, scores_N, lo, hi, threshold, ties, before_less, before_equal, index_BK + row * k);
    }
    __syncthreads();
  }
}

}  // namespace cascade
