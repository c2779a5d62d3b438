// adamw8bit: one AdamW step over many tensors, whose two moments are kept as 8-bit codes with one scale for each 256
// values. Codes, scales and rounding are those of bitsandbytes' CPU optimizer; docs/operators-cpu.md has the formulas.
//
// A block of 256 values is read once, its moments live in the first-level cache until their scales are known, and is
// written once: 16 bytes a parameter with a float32 gradient.
//
// A table lookup for each value would cost more than the memory does, so codes are computed: see dynamic_map.h.
#include "../dynamic_map.h"
#include "vectors.h"

#include <limits>
#include <optional>

namespace cascade_fast {
namespace {

constexpr int64_t kBlock = 256;        // values that share a scale
constexpr int64_t kBlocksAtOnce = 64;  // that a thread takes

// --- the dynamic map: values, and the code nearest to a value --------------------------------------------------------

template <class V>
CASCADE_INLINE void least(typename V::Floats& x, const typename V::Floats& y) {
  x = x < y ? x : y;
}

// y = offset + slope * x, of the line table[index modulo 8]
template <class V>
CASCADE_INLINE void on_line(const Line (&table)[8], const typename V::Ints& index, const typename V::Floats& x,
                            typename V::Floats& y) {
  typename V::Floats offset = {}, slope = {};
  if constexpr (V::kLanes >= 8) {
    for (int i = 0; i < V::kLanes; ++i) offset[i] = table[i % 8].offset, slope[i] = table[i % 8].slope;
    y = __builtin_shuffle(offset, index) + __builtin_shuffle(slope, index) * x;
  } else {
    for (int i = 0; i < V::kLanes; ++i) {
      offset[i] = table[index[i] % 8].offset;
      slope[i] = table[index[i] % 8].slope;
    }
    y = offset + slope * x;
  }
}

template <class V, bool Signed>
CASCADE_INLINE void decode(const uint8_t* codes, typename V::Floats& x) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  Ints integers;
  widen<V>(codes, integers);
  const auto code = __builtin_convertvector(integers, Floats);
  constexpr const Map& map = Signed ? kSigned : kUnsigned;
  // The map's last value, 1, is where the line of the last decade ends, half a step after the value before it.
  const Floats end = Floats{} + map.position_scale * (map.last - 0.5f);
  if constexpr (Signed) {
    const Floats position = code * 4.0f - 4.0f * 127.0f;
    const auto sign = (Ints)position & static_cast<int32_t>(0x80000000u);
    x = (Floats)((Ints)position & 0x7fffffff);
    least<V>(x, end);
    on_line<V>(map.value, (Ints)x >> 23, x, x);
    x = (Floats)((Ints)x | sign);
  } else {
    x = code + 1.0f;
    least<V>(x, end);
    on_line<V>(map.value, (Ints)x >> 23, x, x);
  }
}

// The codes nearest to x / absmax after that has been rounded to the grid. NaN, which is also 0 / 0, gets code 0.
template <class V, bool Signed>
CASCADE_INLINE void encode(const typename V::Floats& x, float inverse, uint8_t* codes) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  constexpr const Map& map = Signed ? kSigned : kUnsigned;
  // Points are numbered 2, 6, 10, ... 131070 and likewise below 0; rounded as bitsandbytes rounds. NaN comes out as a
  // number far below.
  const auto floor = __builtin_convertvector((x * inverse + 1.0f) * 32767.5f + 0.5f, Ints);
  const Floats point = __builtin_convertvector(floor, Floats) * 4.0f - 131070.0f;
  Floats distance = point;
  if constexpr (Signed) distance = (Floats)((Ints)point & 0x7fffffff);
  least<V>(distance, Floats{} + 131070.0f);
  const auto power = (Ints)distance >> 24;
  Floats position, line;
  on_line<V>(map.position[0], power, distance, position);
  for (int i = 1; i < 3; ++i) {
    on_line<V>(map.position[i], power, distance, line);
    least<V>(position, line);
  }
  position = point > map.top ? Floats{} + map.last : position;
  Ints code;
  if constexpr (Signed) {
    position = (Floats)((Ints)position | ((Ints)point & static_cast<int32_t>(0x80000000u)));
    code = __builtin_convertvector(position, Ints) + 127;
  } else {
    position = position > 1.0f ? position : Floats{} + 1.0f;
    code = __builtin_convertvector(position, Ints) - 1;
  }
  const auto bytes = __builtin_convertvector(code, typename V::Bytes);
  std::memcpy(codes, &bytes, sizeof(bytes));
}

// --- a block ---------------------------------------------------------------------------------------------------------

struct Rates {  // of one step of one tensor
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta, over the gradient's scale or its square
  float root_correction;             // 1 / sqrt(1 - beta2^step)
  float eps, step_size, keep;        // step_size = -lr / (1 - beta1^step), keep = 1 - lr * weight_decay
};

// One vector's moments and parameters; m and v come in decoded, times scale1 and scale2 they are the old moments.
template <class V, class G>
CASCADE_INLINE void update(const Rates& rates, float* param, const G* grad, typename V::Floats& m,
                           typename V::Floats& v, float scale1, float scale2) {
  typename V::Floats p, g, root;
  load<V>(param, p);
  load<V>(grad, g);
  m = m * (scale1 * rates.beta1) + rates.rest1 * g;
  v = v * (scale2 * rates.beta2) + (rates.rest2 * g) * g;
  alignas(64) float square[V::kLanes];  // there is no portable root of a vector, but such a loop becomes one
  std::memcpy(square, &v, sizeof(v));
  for (int i = 0; i < V::kLanes; ++i) square[i] = std::sqrt(square[i]);
  std::memcpy(&root, square, sizeof(root));
  p = p * rates.keep + rates.step_size * m / (root * rates.root_correction + rates.eps);
  store<V>(param, p);
}

// One moment at a time: the constants of one map's lines fill the registers.
template <class V, bool Signed>
CASCADE_INLINE void encode_block(const float* moments, float absmax, uint8_t* codes) {
  // Finite for a subnormal scale; NaN for 0, so that every code of such a block becomes 0.
  const float inverse = absmax == 0.0f ? std::numeric_limits<float>::quiet_NaN()
                                       : std::min(1.0f / absmax, std::numeric_limits<float>::max());
  for (int i = 0; i < kBlock; i += V::kLanes) {
    typename V::Floats x;
    load<V>(moments + i, x);
    encode<V, Signed>(x, inverse, codes + i);
  }
}

template <class V, class G>
CASCADE_INLINE void step_block(const Rates rates, float* param, const G* grad, uint8_t* code1, uint8_t* code2,
                               float& absmax1, float& absmax2) {
  using Floats = typename V::Floats;
  alignas(64) float moment1[kBlock], moment2[kBlock];
  Floats most1 = {}, most2 = {};
  for (int i = 0; i < kBlock; i += V::kLanes) {
    Floats m, v;
    decode<V, true>(code1 + i, m);
    decode<V, false>(code2 + i, v);
    update<V>(rates, param + i, grad + i, m, v, absmax1, absmax2);
    store<V>(moment1 + i, m);
    store<V>(moment2 + i, v);
    const auto magnitude = (Floats)((typename V::Ints)m & 0x7fffffff);
    most1 = magnitude > most1 ? magnitude : most1;  // NaN is passed over
    most2 = v > most2 ? v : most2;
  }
  absmax1 = max<V>(most1);
  absmax2 = max<V>(most2);
  encode_block<V, true>(moment1, absmax1, code1);
  encode_block<V, false>(moment2, absmax2, code2);
}

template <class V, class G>
CASCADE_INLINE void step_block(const Rates rates, float* param, const G* grad, float* moment1, float* moment2,
                               float&, float&) {
  for (int i = 0; i < kBlock; i += V::kLanes) {
    typename V::Floats m, v;
    load<V>(moment1 + i, m);
    load<V>(moment2 + i, v);
    update<V>(rates, param + i, grad + i, m, v, 1.0f, 1.0f);
    store<V>(moment1 + i, m);
    store<V>(moment2 + i, v);
  }
}

// --- a tensor --------------------------------------------------------------------------------------------------------

struct Job {
  float* param;
  const void* grad;
  ScalarType grad_dtype;
  void *state1, *state2;  // uint8, or float32 when there are no scales
  float *absmax1, *absmax2;
  int64_t n;
  Rates rates;

  template <class V>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

// The blocks [begin, end) of a tensor. The last one may be short; it is filled up with zeros, which no scale notices.
template <class V, class G, class S>
CASCADE_INLINE void step_blocks(const Job& job, int64_t begin, int64_t end) {
  const G* grads = static_cast<const G*>(job.grad);
  S *state1 = static_cast<S*>(job.state1), *state2 = static_cast<S*>(job.state2);
  for (int64_t b = begin; b < end; ++b) {
    float none = 0.0f;
    float& absmax1 = sizeof(S) == 1 ? job.absmax1[b] : none;
    float& absmax2 = sizeof(S) == 1 ? job.absmax2[b] : none;
    const int64_t at = b * kBlock, left = job.n - at;
    if (left >= kBlock) {
      step_block<V>(job.rates, job.param + at, grads + at, state1 + at, state2 + at, absmax1, absmax2);
      continue;
    }
    alignas(64) float param[kBlock] = {};
    alignas(64) G grad[kBlock] = {};
    alignas(64) S first[kBlock], second[kBlock];
    std::fill_n(first, kBlock, static_cast<S>(sizeof(S) == 1 ? 127 : 0));  // the code of 0
    std::fill_n(second, kBlock, static_cast<S>(0));
    std::memcpy(param, job.param + at, left * sizeof(float));
    std::memcpy(static_cast<void*>(grad), grads + at, left * sizeof(G));
    std::memcpy(first, state1 + at, left * sizeof(S));
    std::memcpy(second, state2 + at, left * sizeof(S));
    step_block<V>(job.rates, param, grad, first, second, absmax1, absmax2);
    std::memcpy(job.param + at, param, left * sizeof(float));
    std::memcpy(state1 + at, first, left * sizeof(S));
    std::memcpy(state2 + at, second, left * sizeof(S));
  }
}

template <class V, class G>
CASCADE_INLINE void step_blocks(const Job& job, int64_t begin, int64_t end) {
  if (job.absmax1 == nullptr) return step_blocks<V, G, float>(job, begin, end);
  step_blocks<V, G, uint8_t>(job, begin, end);
}

// All dtypes of a gradient in one function. In functions of their own GCC 12 makes the constants of the AVX2 loops anew
// in every turn: 5 % slower with bfloat16, 13 % with float16.
template <class V>
void Job::run(int64_t begin, int64_t end) const {
  if (grad_dtype == ScalarType::BFloat16) return step_blocks<V, BFloat16>(*this, begin, end);
  if (grad_dtype == ScalarType::Half) return step_blocks<V, Half>(*this, begin, end);
  step_blocks<V, float>(*this, begin, end);
}

void adamw8bit(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& state1,
               const std::vector<Tensor>& state2, const std::vector<Tensor>& absmax1,
               const std::vector<Tensor>& absmax2, const std::vector<int64_t>& steps, double lr, double beta1,
               double beta2, double eps, double weight_decay, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const auto number = [](const std::optional<Tensor>& given, double otherwise) {
    return given ? static_cast<double>(*given->const_data_ptr<float>()) : otherwise;
  };
  if (number(found_inf, 0.0) != 0.0) return;
  const double unscale = 1.0 / number(grad_scale, 1.0), left_out = number(skipped, 0.0);
  std::vector<Tensor> contiguous_grads;  // keeps copies alive
  std::vector<Job> jobs;
  std::vector<int64_t> ends;  // blocks of the tensors up to and with this one
  int64_t blocks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    contiguous_grads.push_back(grads[i].is_contiguous() ? grads[i] : torch::stable::contiguous(grads[i]));
    const Tensor& grad = contiguous_grads.back();
    const bool coded = state1[i].scalar_type() == ScalarType::Byte;
    const double step = static_cast<double>(steps[i]) - left_out;
    const double left1 = 1.0 - std::pow(beta1, step), left2 = 1.0 - std::pow(beta2, step);
    jobs.push_back({params[i].mutable_data_ptr<float>(), grad.const_data_ptr(), grad.scalar_type(),
                    state1[i].mutable_data_ptr(), state2[i].mutable_data_ptr(),
                    coded ? absmax1[i].mutable_data_ptr<float>() : nullptr,
                    coded ? absmax2[i].mutable_data_ptr<float>() : nullptr, params[i].numel(),
                    {static_cast<float>(beta1), static_cast<float>((1.0 - beta1) * unscale), static_cast<float>(beta2),
                     static_cast<float>((1.0 - beta2) * unscale * unscale), static_cast<float>(1.0 / std::sqrt(left2)),
                     static_cast<float>(eps), static_cast<float>(-lr / left1),
                     static_cast<float>(1.0 - lr * weight_decay)}});
    blocks += ceil_div(params[i].numel(), kBlock);
    ends.push_back(blocks);
  }
  const auto run = run_for_this_cpu<Job>();
  // Over the blocks of all tensors in a row, so that threads share them evenly whatever the tensors' sizes.
  parallel_blocks(blocks, kBlocksAtOnce, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
      const int64_t first = i == 0 ? 0 : ends[i - 1], stop = std::min(end, ends[i]);
      run(jobs[i], begin - first, stop - first);
      begin = stop;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("adamw8bit", TORCH_BOX(&adamw8bit)); }

}  // namespace cascade_fast
