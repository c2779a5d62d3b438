// Tiles of AMX (Intel processors since Sapphire Rapids): products of 16 x 32 by 32 x 16 bfloat16, summed in float32.
// Every tile is used whole, 16 rows of 64 bytes:
//
//   C (16, 16) float32 += A (16, 32) x B (32, 16), where B is kept as 16 rows of 16 pairs: B[2i][j], B[2i + 1][j].
#pragma once

#include "scalars.h"
#include "vectors.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define CASCADE_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says both of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define CASCADE_AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16")))

namespace cascade_fast {
namespace {

constexpr int64_t kTile = 16;              // rows of a tile, and columns of a sum
constexpr int64_t kTileColumns = 32;       // bfloat16 values in a row of a tile
constexpr int64_t kWords = kTile * kTile;  // pairs of bfloat16 in a tile

// Whether this process may use the tiles: the processor has them, and the kernel lets it.
inline bool cpu_has_amx() {
  static const bool has = [] {
    constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return cpu_has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

// Sets the tiles up, and at the end as they were: oneDNN, in the same thread, takes its own setting to be still there.
class Tiles {
 public:
  CASCADE_AMX_TARGET Tiles() {
    __asm__ volatile("sttilecfg %0" : "=m"(before_));  // GCC's intrinsics name 8 of the 64 bytes
    Config all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) {
      all.rows[i] = 16;
      all.row_bytes[i] = 64;
    }
    load(all);
  }

  CASCADE_AMX_TARGET ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      load(before_);
    }
  }

  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  CASCADE_AMX_TARGET static void load(const Config& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }

  Config before_;
};

// Starts a product in tiles 0 and 1. GCC's _tile_loadd does not say that it reads memory: here the compiler is told that
// all that has been written must be there.
CASCADE_AMX_TARGET inline void clear_sums() {
  __asm__ volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
}

// sum (16, 32) = rows (16, 32 * chunks), `stride` bytes apart, times right-hand tiles [chunk][half of the columns].
CASCADE_AMX_TARGET inline void multiply(
    const void* rows, int64_t stride, const uint32_t* words, int64_t chunks, float (&sum)[2][kWords]) {
  const auto* row = static_cast<const char*>(rows);
  clear_sums();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, row += kTileColumns * sizeof(BFloat16), words += 2 * kWords) {
    _tile_loadd(2, row, stride);
    _tile_loadd(3, words, kTile * sizeof(uint32_t));
    _tile_loadd(4, words + kWords, kTile * sizeof(uint32_t));
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, sum[0], kTile * sizeof(float));
  _tile_stored(1, sum[1], kTile * sizeof(float));
}

// 16 rows of 16 words, turned.
CASCADE_AMX_TARGET inline void transpose(__m512i (&row)[kTile]) {
  __m512i t[kTile];
  for (int i = 0; i < kTile; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {  // row[i + c]: of four rows, column c of each quarter
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {  // quarters 0 and 2 of eight rows, then 1 and 3
    t[c] = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    row[c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);
    row[4 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
    row[8 + c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);
    row[12 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
  }
}

// 32 columns of n rows as right-hand tiles: [chunk of 32 rows][half of the columns]; rows beyond n are zero.
CASCADE_AMX_TARGET inline void pack_columns(const BFloat16* rows, int64_t stride, int64_t n, uint32_t* words) {
  alignas(64) uint16_t places[kTileColumns];
  for (uint16_t i = 0; i < kTile; ++i) {  // a value of the row, then the one below it
    places[2 * i] = i;
    places[2 * i + 1] = i + kTileColumns;
  }
  const __m512i lower = _mm512_load_si512(places), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(kTile));
  for (int64_t start = 0; start < n; start += kTileColumns, words += 2 * kWords) {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t row = start + 2 * i;
      const __m512i a = row < n ? _mm512_loadu_si512(rows + row * stride) : _mm512_setzero_si512();
      const __m512i b = row + 1 < n ? _mm512_loadu_si512(rows + (row + 1) * stride) : _mm512_setzero_si512();
      _mm512_storeu_si512(words + i * kTile, _mm512_permutex2var_epi16(a, lower, b));
      _mm512_storeu_si512(words + kWords + i * kTile, _mm512_permutex2var_epi16(a, upper, b));
    }
  }
}

// Rows as the columns of right-hand tiles: [group of 16 rows][chunk of 32 values]; rows beyond n are zero. `values` is a
// multiple of 32.
CASCADE_AMX_TARGET inline void pack_rows(
    const BFloat16* rows, int64_t stride, int64_t n, int64_t values, uint32_t* words) {
  for (int64_t first = 0; first < n; first += kTile) {
    for (int64_t j = 0; j < values; j += kTileColumns, words += kWords) {
      __m512i pairs[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        pairs[i] = first + i < n ? _mm512_loadu_si512(rows + (first + i) * stride + j) : _mm512_setzero_si512();
      }
      transpose(pairs);
      for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(words + i * kTile, pairs[i]);
    }
  }
}

// The first r of 16 columns of n rows, turned: 16 rows of `words_per_row` words, n values padded with zeros to whole
// chunks of 32; rows from r on are zero.
CASCADE_AMX_TARGET inline void turn_columns(
    const BFloat16* rows, int64_t stride, int64_t n, int64_t r, uint32_t* turned, int64_t words_per_row) {
  const auto mask = static_cast<__mmask16>((1u << r) - 1);
  const auto values = [&](int64_t row) CASCADE_AMX_TARGET {
    if (row >= n) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows + row * stride));
  };
  for (int64_t start = 0; start < n; start += kTileColumns, turned += kTile) {
    __m512i pairs[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      pairs[i] = _mm512_or_si512(values(start + 2 * i), _mm512_slli_epi32(values(start + 2 * i + 1), 16));
    }
    transpose(pairs);
    for (int64_t j = 0; j < kTile; ++j) _mm512_storeu_si512(turned + j * words_per_row, pairs[j]);
  }
}

// 16 float32 rounded to bfloat16.
CASCADE_AMX_TARGET inline void store_rounded(BFloat16* to, const Vectors<16>::Floats& x) {
  Vectors<16>::Bits upper;
  round_to_bfloat16<Vectors<16>>(x, upper);
  const __m512i words = _mm512_srli_epi32((__m512i)upper, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}

}  // namespace
}  // namespace cascade_fast
#endif
