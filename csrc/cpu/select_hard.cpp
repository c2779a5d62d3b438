// select_hard: the k smallest scores of each row, exact, in ascending order of index.
//
// A float's bits, rearranged, sort as unsigned integers. Three histograms of 11, 11 and 10 bits of that key find the
// key T of the k-th smallest; one more pass writes the indices whose key is below T, and the first of those equal to
// it. Four passes whatever the scores are, and no result depends on how a row is cut among threads.
//
// Shape legend: B rows selected each for itself, N scores a row, K selected.
#include "common.h"

#include <cstring>
#include <limits>

namespace cascade_fast {
namespace {

constexpr uint32_t kNanKey = 0xffffffffu;
constexpr int kLevels = 3;
constexpr int kShift[kLevels] = {21, 10, 0};
constexpr int kBins[kLevels] = {2048, 2048, 1024};
constexpr int64_t kBlock = 1024;       // keys made at once: stays in the first-level cache
constexpr int64_t kMinPart = 128 * 1024;  // scores that make a thread worth waking (and waiting for) four times
constexpr float kInf = std::numeric_limits<float>::infinity();

// Order-preserving: -inf < ... < -0.0 == 0.0 < ... < inf < NaN.
inline uint32_t key_of(uint32_t bits) {
  const uint32_t negative = 0u - (bits >> 31);
  uint32_t key = bits ^ (negative | 0x80000000u);
  key += key == 0x7fffffffu ? 1u : 0u;  // -0.0
  return (bits & 0x7fffffffu) > 0x7f800000u ? kNanKey : key;
}

inline float score_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key ^ 0x80000000u : ~key;
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

void make_keys(const float* scores, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scores + i, sizeof(bits));
    keys[i] = key_of(bits);
  }
}

// A share [begin, end) of one row, and what is known about it.
struct Part {
  int64_t begin = 0, end = 0;
  int64_t less = 0;   // keys below T
  int64_t equal = 0;  // keys equal to T
  uint32_t above = kNanKey;  // the smallest key above T
  // Two interleaved histograms: a run of scores in one bin would otherwise wait for its own last store.
  uint32_t counts[2][2048];
};

// Counts the keys whose bits above this level are those of `prefix`.
void count(const float* scores_N, int level, uint32_t prefix, Part& part) {
  std::memset(part.counts, 0, sizeof(part.counts));
  const uint32_t bin_mask = kBins[level] - 1;
  const int shift = kShift[level];
  uint32_t keys[kBlock];
  for (int64_t start = part.begin; start < part.end; start += kBlock) {
    const int64_t n = std::min(kBlock, part.end - start);
    make_keys(scores_N + start, n, keys);
    if (level == 0) {
      for (int64_t i = 0; i < n; ++i) ++part.counts[i & 1][keys[i] >> shift];
      continue;
    }
    const int above = kShift[level - 1];
    for (int64_t i = 0; i < n; ++i) {
      part.counts[i & 1][(keys[i] >> shift) & bin_mask] += (keys[i] ^ prefix) >> above == 0;
    }
  }
  for (int bin = 0; bin < kBins[level]; ++bin) part.counts[0][bin] += part.counts[1][bin];
}

// Writes the part's selected indices in order, and finds the smallest key above T. `ties` of the keys equal to T
// are taken, the first ones.
void write(const float* scores_N, uint32_t threshold, int64_t ties, int64_t* index, Part& part) {
  uint32_t keys[kBlock];
  uint32_t taken[kBlock];
  uint32_t above = kNanKey;
  for (int64_t start = part.begin; start < part.end; start += kBlock) {
    const int64_t n = std::min(kBlock, part.end - start);
    make_keys(scores_N + start, n, keys);
    for (int64_t i = 0; i < n; ++i) above = std::min(above, keys[i] > threshold ? keys[i] : kNanKey);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {  // no branch: the next step of the data decides nothing but an address
      const bool tie = keys[i] == threshold && ties > 0;
      ties -= tie;
      taken[count] = static_cast<uint32_t>(i);
      count += keys[i] < threshold || tie;
    }
    for (int64_t i = 0; i < count; ++i) index[i] = start + taken[i];
    index += count;
  }
  part.above = above;
}

// One row. `parts` has room for as many shares as may work on it at once.
void select_row(
    const float* scores_N, int64_t n, int64_t k, std::vector<Part>& parts, int64_t* index_K, float* bounds) {
  if (n == 0) {
    bounds[0] = -kInf;
    bounds[1] = kInf;
    return;
  }
  const int64_t size = ceil_div(n, static_cast<int64_t>(parts.size()));
  for (size_t p = 0; p < parts.size(); ++p) {
    parts[p].begin = std::min<int64_t>(n, p * size);
    parts[p].end = std::min<int64_t>(n, (p + 1) * size);
    parts[p].less = 0;
  }
  const auto each_part = [&](const auto& body) {
    parallel_blocks(parts.size(), 1, [&](int64_t p, int64_t) { body(parts[p]); });
  };

  const int64_t rank = std::max<int64_t>(k, 1);  // for k = 0 the smallest score is still wanted, as the next one
  uint32_t threshold = 0;
  int64_t less = 0;  // keys of the whole row below the bins looked at
  int64_t equal = 0;
  for (int level = 0; level < kLevels; ++level) {
    each_part([&](Part& part) { count(scores_N, level, threshold, part); });
    int bin = 0;
    for (;; ++bin) {
      equal = 0;
      for (const Part& part : parts) equal += part.counts[0][bin];
      if (less + equal >= rank) break;
      less += equal;
      for (Part& part : parts) part.less += part.counts[0][bin];
    }
    for (Part& part : parts) part.equal = part.counts[0][bin];
    threshold |= static_cast<uint32_t>(bin) << kShift[level];
  }

  // Where each part writes, and how many ties it takes: the row's first ones.
  std::vector<int64_t> offset(parts.size()), ties(parts.size());
  int64_t ties_left = k > 0 ? k - less : 0, written = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    offset[p] = written;
    ties[p] = std::min(ties_left, parts[p].equal);
    ties_left -= ties[p];
    written += parts[p].less + ties[p];
  }
  each_part([&](Part& part) {
    const size_t p = &part - parts.data();
    write(scores_N, threshold, ties[p], index_K + offset[p], part);
  });

  uint32_t above = kNanKey;
  for (const Part& part : parts) above = std::min(above, part.above);
  bounds[0] = k == 0 ? -kInf : score_of(threshold);
  bounds[1] = k == n ? kInf : score_of(k < less + equal ? threshold : above);
}

std::tuple<Tensor, Tensor> select_hard(const Tensor& scores, int64_t k) {
  const int64_t batch = scores.size(0), n = scores.size(1);
  const Tensor scores_BN = n <= 1 || scores.stride(1) == 1 ? scores : torch::stable::contiguous(scores);
  const Tensor index_BK = torch::stable::new_empty(scores, {batch, k}, ScalarType::Long);
  const Tensor bounds_B2 = torch::stable::new_empty(scores, {batch, 2}, ScalarType::Float);
  const auto* data = scores_BN.const_data_ptr<float>();
  const int64_t stride = scores_BN.stride(0);
  auto* index = index_BK.mutable_data_ptr<int64_t>();
  auto* bounds = bounds_B2.mutable_data_ptr<float>();

  const int64_t threads = torch::stable::get_num_threads();
  const auto rows = [&](int64_t begin, int64_t end, int64_t shares) {
    std::vector<Part> parts(shares);
    for (int64_t b = begin; b < end; ++b) select_row(data + b * stride, n, k, parts, index + b * k, bounds + b * 2);
  };
  if (batch >= threads) {  // a thread a row
    parallel_blocks(batch, std::max<int64_t>(1, kMinPart / std::max<int64_t>(1, n)),
                    [&](int64_t begin, int64_t end) { rows(begin, end, 1); });
  } else {  // all threads on each row
    rows(0, batch, std::clamp<int64_t>(n / kMinPart, 1, threads));
  }
  return {index_BK, bounds_B2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("select_hard", TORCH_BOX(&select_hard)); }

}  // namespace cascade_fast
