// cosine_score: <a, b> / (|a| |b| + 1e-8) per row in one pass over both arrays, accumulated in float32.
//
// One body written with the compiler's portable vectors, compiled three times on x86-64 (AVX-512, AVX2 and the SSE2
// baseline), each with vectors of that set's own width, and picked at run time. One body with vectors of 16 floats for
// all is shorter, but GCC 12 splits them through the stack: AVX2 then reached 0.4 to 0.6 of the memory's bandwidth.
//
// Shape legend: N rows, D hidden size.
#include "../common.h"

#include <cmath>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#define CASCADE_X86 1
#else
#define CASCADE_X86 0
#endif
#define CASCADE_INLINE __attribute__((always_inline)) inline

namespace cascade_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr float kEps = 1e-8f;
template <int Lanes>
struct Vectors {  // of one instruction set
  static constexpr int kLanes = Lanes;      // floats in a vector
  static constexpr int kStep = 2 * Lanes;   // values of a row taken at once
  // typedef, not using: GCC ignores the attribute of an alias that depends on a template parameter.
  typedef float Floats __attribute__((vector_size(4 * Lanes)));
  typedef uint32_t Bits __attribute__((vector_size(4 * Lanes)));
  typedef int32_t SignedBits __attribute__((vector_size(4 * Lanes)));
  static_assert(sizeof(Floats) == 4 * Lanes && sizeof(Bits) == 4 * Lanes && sizeof(SignedBits) == 4 * Lanes);
};

// The next 2 * Lanes values as two vectors of float32, written through references: a vector returned by value would tie
// the function to one instruction set's calling convention. 16-bit values are read as 32-bit words and split into lower
// and upper halves, so even and odd columns part: the order within a row is the same for both arrays, which is all
// that sums of products ask for.
template <class V>
CASCADE_INLINE void load(const float* p, typename V::Floats& x, typename V::Floats& y) {
  std::memcpy(&x, p, sizeof(x));
  std::memcpy(&y, p + V::kLanes, sizeof(y));
}

template <class V>  // a bfloat16 is the upper half of a float32
CASCADE_INLINE void load(const BFloat16* p, typename V::Floats& x, typename V::Floats& y) {
  typename V::Bits words;
  std::memcpy(&words, p, sizeof(words));
  x = (typename V::Floats)(words << 16);
  y = (typename V::Floats)(words & 0xffff0000u);
}

// From a float16 in the upper half of a word: its exponent and mantissa move to a float32's place (the arithmetic
// shift keeps the sign), 2^112 is the difference of the exponents' biases and normalises subnormals too, and
// exponent 31, which means inf or NaN, becomes 255.
template <class V>
CASCADE_INLINE void from_half(const typename V::SignedBits& upper, typename V::Floats& x) {
  using Floats = typename V::Floats;
  using SignedBits = typename V::SignedBits;
  const SignedBits moved = (upper >> 3) & static_cast<int32_t>(0x8fffe000u);
  const Floats scaled = (Floats)moved * 0x1p112f;
  const SignedBits special = (moved & 0x0f800000) == 0x0f800000;
  x = (Floats)((SignedBits)scaled | (special & 0x7f800000));
}

template <class V>
CASCADE_INLINE void load(const Half* p, typename V::Floats& x, typename V::Floats& y) {
  typename V::SignedBits words;
  std::memcpy(&words, p, sizeof(words));
  const auto lower = (typename V::SignedBits)((typename V::Bits)words << 16);
  from_half<V>(lower, x);
  from_half<V>(words, y);
}

template <class V>
CASCADE_INLINE float sum(const typename V::Floats& v) {
  float lane[V::kLanes];
  std::memcpy(lane, &v, sizeof(lane));
  for (int width = V::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <class V>
struct Sums {
  typename V::Floats ab[2] = {}, aa[2] = {}, bb[2] = {};  // two of each: additions overlap
};

template <class V, class T>
CASCADE_INLINE void accumulate(const T* a_step, const T* b_step, Sums<V>& sums) {
  typename V::Floats a[2], b[2];
  load<V>(a_step, a[0], a[1]);
  load<V>(b_step, b[0], b[1]);
  for (int i = 0; i < 2; ++i) {
    sums.ab[i] += a[i] * b[i];
    sums.aa[i] += a[i] * a[i];
    sums.bb[i] += b[i] * b[i];
  }
}

template <class V, class T>
CASCADE_INLINE float score_row(const T* a_D, const T* b_D, int64_t d) {
  constexpr int kStep = V::kStep;
  Sums<V> sums;
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) accumulate<V>(a_D + i, b_D + i, sums);
  if (i < d) {  // the tail, filled up with zeros
    T tail_a[kStep] = {}, tail_b[kStep] = {};
    std::memcpy(static_cast<void*>(tail_a), a_D + i, (d - i) * sizeof(T));
    std::memcpy(static_cast<void*>(tail_b), b_D + i, (d - i) * sizeof(T));
    accumulate<V>(tail_a, tail_b, sums);
  }
  const typename V::Floats ab = sums.ab[0] + sums.ab[1], aa = sums.aa[0] + sums.aa[1], bb = sums.bb[0] + sums.bb[1];
  return sum<V>(ab) / (std::sqrt(sum<V>(aa)) * std::sqrt(sum<V>(bb)) + kEps);
}

struct Rows {  // the rows [begin, end) of two arrays whose rows are contiguous
  const void *a, *b;
  int64_t stride_a, stride_b, d;
  float* score_N;
};

template <class V, class T>
CASCADE_INLINE void score_rows(const Rows& rows, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    rows.score_N[n] = score_row<V>(
        static_cast<const T*>(rows.a) + n * rows.stride_a, static_cast<const T*>(rows.b) + n * rows.stride_b, rows.d);
  }
}

using ScoreRows = void (*)(const Rows&, int64_t, int64_t);

template <class T>
void score_rows_baseline(const Rows& rows, int64_t begin, int64_t end) {
  score_rows<Vectors<4>, T>(rows, begin, end);
}

#if CASCADE_X86
template <class T>
__attribute__((target("avx2,fma"))) void score_rows_avx2(const Rows& rows, int64_t begin, int64_t end) {
  score_rows<Vectors<8>, T>(rows, begin, end);
}

template <class T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void score_rows_avx512(
    const Rows& rows, int64_t begin, int64_t end) {
  score_rows<Vectors<16>, T>(rows, begin, end);
}
#endif

template <class T>
ScoreRows best_for_this_cpu() {
#if CASCADE_X86
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return score_rows_avx512<T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return score_rows_avx2<T>;
#endif
  return score_rows_baseline<T>;
}

Tensor with_contiguous_rows(const Tensor& t_ND) {
  return t_ND.size(1) <= 1 || t_ND.stride(1) == 1 ? t_ND : torch::stable::contiguous(t_ND);
}

Tensor cosine_score(const Tensor& h_in_ND, const Tensor& h_out_ND) {
  const Tensor a_ND = with_contiguous_rows(h_in_ND), b_ND = with_contiguous_rows(h_out_ND);
  const int64_t n = a_ND.size(0), d = a_ND.size(1);
  const Tensor score_N = torch::stable::new_empty(a_ND, {n}, ScalarType::Float);
  const Rows rows{a_ND.const_data_ptr(), b_ND.const_data_ptr(), a_ND.stride(0), b_ND.stride(0), d,
                  score_N.mutable_data_ptr<float>()};
  ScoreRows score = best_for_this_cpu<float>();
  if (a_ND.scalar_type() == ScalarType::BFloat16) score = best_for_this_cpu<BFloat16>();
  if (a_ND.scalar_type() == ScalarType::Half) score = best_for_this_cpu<Half>();
  const int64_t row_bytes = 2 * d * static_cast<int64_t>(a_ND.element_size());
  parallel_blocks(n, rows_per_block(n, row_bytes + 4),
                  [&](int64_t begin, int64_t end) { score(rows, begin, end); });
  return score_N;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("cosine_score", TORCH_BOX(&cosine_score)); }

}  // namespace cascade_fast
