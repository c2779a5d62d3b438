// The instruction sets of x86-64 that a body is compiled for (AVX-512, AVX2 and the SSE2 baseline), each with vectors
// of its own width, and the choice among them at run time. One body with vectors of 16 floats for all is shorter, but
// GCC 12 splits them through the stack: AVX2 then reached 0.4 to 0.6 of the memory's bandwidth. Other processors get
// the baseline.
//
// A body is a struct of its arguments with one member, which works on the items [begin, end):
//
//   template <class V, class T>
//   CASCADE_INLINE void run(int64_t begin, int64_t end) const;
//
// V are the instruction set's Vectors; T is the element type, if the body wants to be compiled for each by itself. The
// member and all it calls are always inlined: that is what has them compiled for the instruction set of the function
// below that they end up in.
#pragma once

#include "common.h"

#define CASCADE_INLINE __attribute__((always_inline)) inline

namespace cascade_fast {
namespace {  // compiled for several instruction sets in every file that includes it: nothing here may be shared

template <int Lanes>
struct Vectors {  // of one instruction set
  static constexpr int kLanes = Lanes;     // floats in a vector
  static constexpr int kStep = 2 * Lanes;  // values of a row that load_pair and store_pair take at once
  // typedef, not using: GCC ignores the attribute of an alias that depends on a template parameter.
  typedef float Floats __attribute__((vector_size(4 * Lanes)));
  typedef uint32_t Bits __attribute__((vector_size(4 * Lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * Lanes)));
  typedef uint8_t Bytes __attribute__((vector_size(Lanes)));
  static_assert(sizeof(Floats) == 4 * Lanes && sizeof(Bits) == 4 * Lanes && sizeof(Ints) == 4 * Lanes);
};

template <class Body, class... T>
void run_baseline(const Body& body, int64_t begin, int64_t end) {
  body.template run<Vectors<4>, T...>(begin, end);
}

#if defined(__x86_64__)
template <class Body, class... T>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body.template run<Vectors<8>, T...>(begin, end);
}

template <class Body, class... T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void run_avx512(
    const Body& body, int64_t begin, int64_t end) {
  body.template run<Vectors<16>, T...>(begin, end);
}

inline bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// The function (body, begin, end) that is Body's `run` for the best instruction set of this CPU.
template <class Body, class... T>
auto run_for_this_cpu() {
#if defined(__x86_64__)
  if (cpu_has_avx512()) return &run_avx512<Body, T...>;
  if (cpu_has_avx2()) return &run_avx2<Body, T...>;
#endif
  return &run_baseline<Body, T...>;
}

template <class Body>
auto run_for_this_cpu(ScalarType dtype) {
  return for_dtype(dtype, []<class T>() { return run_for_this_cpu<Body, T>(); });
}

}  // namespace
}  // namespace cascade_fast
