// attention and its gradients in bfloat16 by tiles (amx.h): scores, softmax and weighted sums of some queries at a time,
// none of them for keys that these queries do not see.
//
// Shape legend: B sequences, N = B * G key heads, R queries of one (H / G heads times Q), S keys, W = S rounded up to
// whole tiles, E head size.
#pragma once

#include "amx.h"
#include "exponential.h"

#include <limits>
#include <memory>

#if CASCADE_AMX
namespace cascade_fast {
namespace {

using Wide = Vectors<16>;  // of AVX-512, which comes with AMX
constexpr float kUnseen = -std::numeric_limits<float>::infinity();
constexpr auto kUnseenBits = static_cast<int16_t>(0xff80);  // the same in bfloat16

inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Sums (16, 16) of 32 columns, rounded; the first `rows` of them.
CASCADE_AMX_TARGET inline void store_sums(const float (&sum)[2][kWords], int64_t rows, BFloat16* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t half = 0; half < 2; ++half) {
      Wide::Floats x;
      load<Wide>(sum[half] + i * kTile, x);
      store_rounded(to + i * stride + half * kTile, x);
    }
  }
}

struct TiledAttention {
  const BFloat16 *query_NRE, *key_NSE, *value_NSE;
  const BFloat16* mask_BQS;
  BFloat16 *attended_NRE, *weights_NRW;
  int64_t groups, r, queries, s, e;  // groups: key heads of a sequence

  int64_t w() const { return round_up(s, kTileColumns); }

  // How many keys, in whole chunks of 32, each query of a sequence sees the last of.
  CASCADE_AMX_TARGET std::vector<int64_t> seen(int64_t sequence) const {
    std::vector<int64_t> seen_Q(queries);
    for (int64_t q = 0; q < queries; ++q) {
      const BFloat16* mask = mask_BQS + (sequence * queries + q) * s;
      for (int64_t j = 0; j < s; j += kTileColumns) {
        const auto there = static_cast<__mmask32>(s - j >= kTileColumns ? ~0u : (1u << (s - j)) - 1);
        const __m512i values = _mm512_maskz_loadu_epi16(there, mask + j);
        if (_mm512_mask_cmpneq_epi16_mask(there, values, _mm512_set1_epi16(kUnseenBits))) seen_Q[q] = j + kTileColumns;
      }
    }
    return seen_Q;
  }

  // The most of these, of `rows` queries from `first` of R on.
  int64_t seen_by(const std::vector<int64_t>& seen_Q, int64_t first, int64_t rows) const {
    int64_t keys = 0;
    for (int64_t i = 0; i < rows; ++i) keys = std::max(keys, seen_Q[(first + i) % queries]);
    return keys;
  }

  // Of 16 rows (16, E) and the first `keys` rows that pack_rows has packed: (16, W).
  CASCADE_AMX_TARGET void products(const BFloat16* rows_16E, const uint32_t* packed, int64_t keys, float* to) const {
    for (int64_t j = 0; j < keys; j += kTile) {
      clear_sums();
      for (int64_t chunk = 0; chunk < e; chunk += kTileColumns, packed += kWords) {
        _tile_loadd(2, rows_16E + chunk, e * sizeof(BFloat16));
        _tile_loadd(3, packed, kTile * sizeof(uint32_t));
        _tile_dpbf16ps(0, 2, 3);
      }
      _tile_stored(0, to + j, w() * sizeof(float));
    }
  }

  CASCADE_AMX_TARGET void softmax(float* scores, const BFloat16* mask, int64_t keys, BFloat16* weights) const {
    Wide::Floats most = Wide::Floats{} + kUnseen, total = {}, x, m;
    for (int64_t j = 0; j < keys; j += kTile) {
      load<Wide>(scores + j, x);
      if (j + kTile <= s) {
        load<Wide>(mask + j, m);
      } else {
        alignas(64) float tail[kTile];
        for (int64_t i = 0; i < kTile; ++i) tail[i] = j + i < s ? widen(mask[j + i]) : kUnseen;
        load<Wide>(tail, m);
      }
      x += m;
      store<Wide>(scores + j, x);
      most = x > most ? x : most;
    }
    const float largest = _mm512_reduce_max_ps((__m512)most);
    for (int64_t j = 0; j < keys; j += kTile) {
      load<Wide>(scores + j, x);
      Wide::Floats power;
      exp_of_negative<Wide>(x - largest, power);
      total += power;
      store<Wide>(scores + j, power);
    }
    const float inverse = 1.0f / _mm512_reduce_add_ps((__m512)total);
    for (int64_t j = 0; j < keys; j += kTile) {
      load<Wide>(scores + j, x);
      store_rounded(weights + j, x * inverse);
    }
    const int64_t end = std::min(keys, s);  // beyond S zeros in a row of NaN, too
    std::fill(weights + end, weights + w(), BFloat16());
  }

  CASCADE_AMX_TARGET void run(int64_t begin, int64_t end) const {
    const Tiles tiles;
    const int64_t width = w(), value_words = width * kTile;  // of 32 columns of the values
    std::vector<uint32_t> key(width * e / 2), value(e / kTileColumns * value_words);  // zeros where no keys are
    std::vector<float> scores(kTile * width);
    std::vector<BFloat16> few(kTile * e), weights_16W(kTile * width);
    alignas(64) float sum[2][kWords];
    for (int64_t n = begin; n < end; ++n) {
      const int64_t sequence = n / groups;
      const std::vector<int64_t> seen_Q = seen(sequence);
      pack_rows(key_NSE + n * s * e, e, s, e, key.data());
      for (int64_t j = 0; j < e; j += kTileColumns) {
        pack_columns(value_NSE + n * s * e + j, e, s, value.data() + j / kTileColumns * value_words);
      }
      for (int64_t first = 0; first < r; first += kTile) {
        const int64_t rows = std::min(kTile, r - first);
        const BFloat16* query = query_NRE + (n * r + first) * e;
        if (rows < kTile) {
          std::copy_n(query, rows * e, few.data());
          query = few.data();
        }
        const int64_t keys = seen_by(seen_Q, first, rows);
        products(query, key.data(), keys, scores.data());
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t q = (first + i) % queries;
          const BFloat16* mask = mask_BQS + (sequence * queries + q) * s;
          softmax(scores.data() + i * width, mask, keys, weights_16W.data() + i * width);
        }
        std::copy_n(weights_16W.data(), rows * width, weights_NRW + (n * r + first) * width);
        for (int64_t j = 0; j < e; j += kTileColumns) {
          const uint32_t* of_value = value.data() + j / kTileColumns * value_words;
          multiply(weights_16W.data(), width * sizeof(BFloat16), of_value, keys / kTileColumns, sum);
          store_sums(sum, rows, attended_NRE + (n * r + first) * e + j, e);
        }
      }
    }
  }
};

struct TiledAttentionBackward {
  TiledAttention of;  // its outputs are inputs here; attended is not read
  const BFloat16* grad_NRE;
  BFloat16 *grad_query_NRE, *grad_key_NSE, *grad_value_NSE;

  // weights * (grad - sum(grad * weights)), for keys that are seen; zeros after them.
  CASCADE_AMX_TARGET void softmax_grad(float* grad, const BFloat16* weights, int64_t keys, BFloat16* to) const {
    Wide::Floats total = {}, g, w;
    for (int64_t j = 0; j < keys; j += kTile) {
      load<Wide>(grad + j, g);
      load<Wide>(weights + j, w);
      total += g * w;
    }
    const float mean = _mm512_reduce_add_ps((__m512)total);
    for (int64_t j = 0; j < keys; j += kTile) {
      load<Wide>(grad + j, g);
      load<Wide>(weights + j, w);
      store_rounded(to + j, w * (g - mean));
    }
    std::fill(to + keys, to + of.w(), BFloat16());
  }

  // to (S, E) = from^T turned^T, where `turned` (E, R) comes from turn_columns: sums over the queries.
  CASCADE_AMX_TARGET void sum_over_queries(
      const BFloat16* from_RW, const std::vector<uint32_t>& turned, const std::vector<int64_t>& seen_C, BFloat16* to,
      std::vector<uint32_t>& words) const {
    alignas(64) float sum[2][kWords];
    const int64_t width = of.w(), words_per_row = static_cast<int64_t>(seen_C.size()) * kTile;
    for (int64_t first = 0; first < of.s; first += kTileColumns) {
      pack_columns(from_RW + first, width, of.r, words.data());
      for (int64_t j = 0; j < of.e; j += kTile) {
        clear_sums();
        for (size_t chunk = 0; chunk < seen_C.size(); ++chunk) {
          if (seen_C[chunk] <= first) continue;  // none of these queries sees any of these keys
          _tile_loadd(2, turned.data() + j * words_per_row + chunk * kTile, words_per_row * sizeof(uint32_t));
          _tile_loadd(3, words.data() + 2 * chunk * kWords, kTile * sizeof(uint32_t));
          _tile_loadd(4, words.data() + (2 * chunk + 1) * kWords, kTile * sizeof(uint32_t));
          _tile_dpbf16ps(0, 2, 3);
          _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, sum[0], kTile * sizeof(float));
        _tile_stored(1, sum[1], kTile * sizeof(float));
        for (int64_t half = 0; half < 2; ++half) {
          __m512i row[kTile];
          for (int64_t i = 0; i < kTile; ++i) row[i] = _mm512_load_si512(sum[half] + i * kTile);
          transpose(row);
          const int64_t key = first + half * kTile;
          for (int64_t i = 0; i < std::min(kTile, of.s - key); ++i) {
            store_rounded(to + (key + i) * of.e + j, (Wide::Floats)row[i]);
          }
        }
      }
    }
  }

  CASCADE_AMX_TARGET void run(int64_t begin, int64_t end) const {
    const Tiles tiles;
    const int64_t r = of.r, s = of.s, e = of.e, width = of.w(), key_words = width * kTile;
    const int64_t chunks = ceil_div(r, kTileColumns);
    std::vector<uint32_t> key(e / kTileColumns * key_words), value(width * e / 2);
    std::vector<uint32_t> query_ER(e * chunks * kTile), grad_ER(e * chunks * kTile), words(chunks * 2 * kWords);
    std::vector<float> scores(kTile * width);
    std::vector<BFloat16> few(kTile * e), grad_scores_RW(round_up(r, kTile) * width);
    alignas(64) float sum[2][kWords];
    for (int64_t n = begin; n < end; ++n) {
      const std::vector<int64_t> seen_Q = of.seen(n / of.groups);
      std::vector<int64_t> seen_C(chunks, 0);  // by any of 32 queries
      for (int64_t i = 0; i < r; ++i) {
        seen_C[i / kTileColumns] = std::max(seen_C[i / kTileColumns], seen_Q[i % of.queries]);
      }
      const BFloat16 *query = of.query_NRE + n * r * e, *grad = grad_NRE + n * r * e;
      const BFloat16* weights_RW = of.weights_NRW + n * r * width;
      pack_rows(of.value_NSE + n * s * e, e, s, e, value.data());
      for (int64_t j = 0; j < e; j += kTileColumns) {
        pack_columns(of.key_NSE + n * s * e + j, e, s, key.data() + j / kTileColumns * key_words);
      }
      for (int64_t j = 0; j < e; j += kTile) {
        turn_columns(query + j, e, r, kTile, query_ER.data() + j * chunks * kTile, chunks * kTile);
        turn_columns(grad + j, e, r, kTile, grad_ER.data() + j * chunks * kTile, chunks * kTile);
      }
      for (int64_t first = 0; first < r; first += kTile) {
        const int64_t rows = std::min(kTile, r - first);
        const BFloat16* grad_rows = grad + first * e;
        if (rows < kTile) {
          std::copy_n(grad_rows, rows * e, few.data());
          grad_rows = few.data();
        }
        const int64_t keys = of.seen_by(seen_Q, first, rows);
        of.products(grad_rows, value.data(), keys, scores.data());
        BFloat16* grad_scores = grad_scores_RW.data() + first * width;
        for (int64_t i = 0; i < rows; ++i) {
          softmax_grad(scores.data() + i * width, weights_RW + (first + i) * width, keys, grad_scores + i * width);
        }
        for (int64_t j = 0; j < e; j += kTileColumns) {
          const uint32_t* of_key = key.data() + j / kTileColumns * key_words;
          multiply(grad_scores, width * sizeof(BFloat16), of_key, keys / kTileColumns, sum);
          store_sums(sum, rows, grad_query_NRE + (n * r + first) * e + j, e);
        }
      }
      sum_over_queries(grad_scores_RW.data(), query_ER, seen_C, grad_key_NSE + n * s * e, words);
      sum_over_queries(weights_RW, grad_ER, seen_C, grad_value_NSE + n * s * e, words);
    }
  }
};

}  // namespace
}  // namespace cascade_fast
#endif
