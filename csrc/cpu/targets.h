// The instruction sets that a body is compiled for, and whether this CPU has them.
#pragma once

#if defined(__x86_64__)
#define CASCADE_X86 1
#else
#define CASCADE_X86 0
#endif
#define CASCADE_INLINE __attribute__((always_inline)) inline

#if CASCADE_X86
#define CASCADE_AVX2 __attribute__((target("avx2,fma")))
#define CASCADE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

namespace cascade_fast {

inline bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace cascade_fast
#endif
