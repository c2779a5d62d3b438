// The products of low_rank.cpp in bfloat16 by tiles (amx.h). D and all F are multiples of kColumns.
#pragma once

#include "amx.h"
#include "low_rank.h"
#include "scalars.h"

#include <cstring>
#include <memory>

#if CASCADE_AMX
namespace cascade_fast {
namespace {

static_assert(kColumns == kTileColumns);

struct TiledLowRank {
  const BFloat16* x_KD;
  int64_t x_stride;
  const uint32_t* a;  // as pack_rows leaves it
  BFloat16* both_KC;
  int64_t d, r;

  CASCADE_AMX_TARGET void run(int64_t begin, int64_t end) const {
    const Tiles tiles;
    const int64_t c = d + r;
    alignas(64) float sum[kWords];
    std::vector<BFloat16> few;
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t rows = std::min(kTile, end - first);
      const BFloat16* x = x_KD + first * x_stride;
      int64_t stride = x_stride;
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(static_cast<void*>(both_KC + (first + i) * c), x + i * stride, d * sizeof(BFloat16));
      }
      if (rows < kTile) {
        few.assign(kTile * d, BFloat16());
        for (int64_t i = 0; i < rows; ++i) {
          std::memcpy(static_cast<void*>(few.data() + i * d), x + i * stride, d * sizeof(BFloat16));
        }
        x = few.data();
        stride = d;
      }
      const uint32_t* words = a;
      for (int64_t rank = 0; rank < r; rank += kTile) {
        clear_sums();
        for (int64_t j = 0; j < d; j += kColumns, words += kWords) {
          _tile_loadd(2, x + j, stride * sizeof(BFloat16));
          _tile_loadd(3, words, kTile * sizeof(uint32_t));
          _tile_dpbf16ps(0, 2, 3);
        }
        _tile_stored(0, sum, kTile * sizeof(float));
        const int64_t ranks = std::min(kTile, r - rank);
        for (int64_t i = 0; i < rows; ++i) {
          BFloat16* low = both_KC + (first + i) * c + d + rank;
          for (int64_t j = 0; j < ranks; ++j) narrow(sum[i * kTile + j], low + j);
        }
      }
    }
  }
};

struct TiledBackward {
  const LowRankGrads* of;
  std::vector<uint16_t> low_grad_KP;          // K padded to whole tiles, P to kColumns
  std::vector<uint32_t> a;                    // as pack_columns leaves it: [D / 32][P / 32][half]
  std::vector<std::vector<uint32_t>> low_PK;  // of each gradient of weights: turned, K padded to kColumns
  int64_t k, d, p;

  explicit TiledBackward(const LowRankGrads& of)
      : of(&of), k(of.k), d(of.d), p(ceil_div(of.r, kColumns) * kColumns) {
    const auto* low_grad_KR = static_cast<const uint16_t*>(of.low_grad_KR);
    low_grad_KP.resize(ceil_div(k, kTile) * kTile * p);
    for (int64_t i = 0; i < k; ++i) std::copy_n(low_grad_KR + i * of.c(), of.r, low_grad_KP.data() + i * p);
    a.resize(d * p / 2);
    for (int64_t j = 0; j < d; j += kColumns) {
      pack_columns(static_cast<const BFloat16*>(of.a_RD) + j, d, of.r, a.data() + j * p / 2);
    }
    for (const WeightGrad& grad : of.weights) {
      const int64_t words_per_row = ceil_div(k, kColumns) * kTile;
      std::vector<uint32_t>& to = low_PK.emplace_back(ceil_div(grad.r, kTile) * kTile * words_per_row);
      for (int64_t rank = 0; rank < grad.r; rank += kTile) {
        turn_columns(static_cast<const BFloat16*>(grad.low_KR) + rank, of.c(), k, std::min(kTile, grad.r - rank),
                     to.data() + rank * words_per_row, words_per_row);
      }
    }
  }

  int64_t token_tasks() const { return ceil_div(k, kTile); }

  CASCADE_AMX_TARGET void tokens(int64_t first) const {
    alignas(64) float sum[2][kWords];
    const int64_t c = of->c(), rows = std::min(kTile, k - first);
    for (int64_t j = 0; j < d; j += kColumns) {
      multiply(low_grad_KP.data() + first * p, p * sizeof(BFloat16), a.data() + j * p / 2, p / kColumns, sum);
      for (int64_t i = 0; i < rows; ++i) {
        const BFloat16* grad = static_cast<const BFloat16*>(of->grad_KC) + (first + i) * c + j;
        BFloat16* out = static_cast<BFloat16*>(of->grad_x_KD) + (first + i) * d + j;
        for (int64_t half = 0; half < 2; ++half) {
          Vectors<16>::Floats x, update;
          load<Vectors<16>>(grad + half * kTile, x);
          load<Vectors<16>>(sum[half] + i * kTile, update);
          store_rounded(out + half * kTile, x + update);
        }
      }
    }
  }

  CASCADE_AMX_TARGET void columns(size_t m, int64_t first, uint32_t* words) const {
    const WeightGrad& grad = of->weights[m];
    alignas(64) float sum[2][kWords];
    const int64_t words_per_row = ceil_div(k, kColumns) * kTile;
    pack_columns(static_cast<const BFloat16*>(grad.values_KF) + first, grad.stride, k, words);
    for (int64_t rank = 0; rank < grad.r; rank += kTile) {
      multiply(low_PK[m].data() + rank * words_per_row, words_per_row * sizeof(uint32_t), words, ceil_div(k, kColumns),
               sum);
      const int64_t ranks = std::min(kTile, grad.r - rank);
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t j = 0; j < kTile; ++j) {
          const int64_t column = first + half * kTile + j;
          for (int64_t i = 0; i < ranks; ++i) {
            grad.at(rank + i, column) = grad.scale * sum[half][i * kTile + j];
          }
        }
      }
    }
  }

  CASCADE_AMX_TARGET void run(int64_t begin, int64_t end) const {
    const Tiles tiles;
    const std::unique_ptr<uint32_t[]> words(new uint32_t[ceil_div(k, kColumns) * 2 * kWords]);  // not cleared
    for (int64_t task = begin; task < end; ++task) {
      if (task < token_tasks()) {
        tokens(task * kTile);
        continue;
      }
      const auto [m, first] = column_task(of->weights, task - token_tasks());
      columns(m, first, words.get());
    }
  }
};

}  // namespace
}  // namespace cascade_fast
#endif

namespace cascade_fast {
namespace {

bool fits_tiles([[maybe_unused]] ScalarType dtype, [[maybe_unused]] int64_t columns) {
#if CASCADE_AMX
  return dtype == ScalarType::BFloat16 && columns % kColumns == 0 && cpu_has_amx();
#else
  return false;
#endif
}

bool fits_tiles(const LowRankGrads& of, ScalarType dtype) {
  return std::all_of(of.weights.begin(), of.weights.end(), [&](auto& one) { return fits_tiles(dtype, one.f); });
}

void low_rank_by_tiles(
    [[maybe_unused]] const Tensor& x_KD, [[maybe_unused]] const Tensor& a_RD, [[maybe_unused]] const Tensor& both_KC) {
#if CASCADE_AMX
  const int64_t k = x_KD.size(0), d = x_KD.size(1), r = a_RD.size(0);
  std::vector<uint32_t> a(ceil_div(r, kTile) * kTile * d / 2);
  pack_rows(static_cast<const BFloat16*>(a_RD.const_data_ptr()), d, r, d, a.data());
  const TiledLowRank body{static_cast<const BFloat16*>(x_KD.const_data_ptr()), x_KD.stride(0), a.data(),
                          static_cast<BFloat16*>(both_KC.mutable_data_ptr()), d, r};
  parallel_blocks(k, 4 * kTile, [&](int64_t begin, int64_t end) { body.run(begin, end); });
#endif
}

void run_by_tiles([[maybe_unused]] const LowRankGrads& of) {
#if CASCADE_AMX
  const TiledBackward body(of);
  const int64_t tasks = body.token_tasks() + column_tasks(of.weights);
  parallel_blocks(tasks, 4, [&](int64_t begin, int64_t end) { body.run(begin, end); });
#endif
}

}  // namespace
}  // namespace cascade_fast
