// Shared by the CPU bodies: names, dtypes, threads, and memory that is written once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cascade_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// run.template operator()<T>() with the element type of `dtype`, which is float32, float16 or bfloat16.
template <class Run>
auto for_dtype(ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::BFloat16) return run.template operator()<BFloat16>();
  if (dtype == ScalarType::Half) return run.template operator()<Half>();
  return run.template operator()<float>();
}

// Runs body(begin, end) over [0, n) in blocks that threads take as they become free: a thread that is held up (by
// another program on its core) does not hold up the others. body must not throw: torch would lose the message.
template <class Body>
void parallel_blocks(int64_t n, int64_t block, const Body& body) {
  const int64_t blocks = ceil_div(n, block);
  const int64_t threads = std::min<int64_t>(blocks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      body(i * block, std::min(n, (i + 1) * block));
    }
  };
  if (threads <= 1) {
    drain(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, drain);
  }
}

// How many of n rows of row_bytes make a block: some blocks for each thread, none too small to be worth handing out.
inline int64_t rows_per_block(int64_t n, int64_t row_bytes) {
  constexpr int64_t kLeast = 64 * 1024, kMost = 1024 * 1024;  // bytes
  const int64_t share = n * row_bytes / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  return std::max<int64_t>(1, std::clamp(share, kLeast, kMost) / row_bytes);
}

// Asks for 2 MB pages for a large, freshly allocated output. Filling it otherwise costs one page fault per 4 KB, which
// takes longer than the copy itself. Advice only: where the system has none to give, nothing changes.
inline void advise_huge_pages(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 * 1024 * 1024;
  const auto address = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + fresh.numel() * fresh.element_size()) / kHuge * kHuge;
  if (address != 0 && end >= begin + 2 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cascade_fast
