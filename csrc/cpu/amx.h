// Tiles of AMX (Intel processors since Sapphire Rapids): products of 16 x 32 by 32 x 16 bfloat16, summed in float32.
// Every tile is used whole, 16 rows of 64 bytes:
//
//   C (16, 16) float32 += A (16, 32) x B (32, 16), where B is kept as 16 rows of 16 pairs: B[2i][j], B[2i + 1][j].
#pragma once

#include "targets.h"

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define CASCADE_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CASCADE_AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16")))

namespace cascade_fast {
namespace {

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
    _tile_storeconfig(&before_);
    Config all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) {
      all.rows[i] = 16;
      all.row_bytes[i] = 64;
    }
    _tile_loadconfig(&all);
  }

  CASCADE_AMX_TARGET ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
  Config before_;
};

}  // namespace
}  // namespace cascade_fast
#endif
