// The exact score of one row, the same bits wherever it is computed (one query, a batch, candidates, a radius): sums
// run over the columns in increasing order in one thread, in fp32 with fused multiply-adds.
#pragma once
#include "common/device.cuh"

namespace lutra {
namespace cuda {

// Metrics that are summed alike: ip and cosine (with the row's squares), l2, l1, linf, poincare (as l2, and the row's
// squares in fp64).
enum Sum : int { kSumProduct = 0, kSumSquares = 1, kSumAbsolute = 2, kSumLargest = 3, kSumPoincare = 4 };
template <int SUM>
using SquaresOf = std::conditional_t<SUM == kSumPoincare, double, float>;

template <int SUM>
__device__ __forceinline__ void add_column(float q, float x, float* sum) {
  if constexpr (SUM == kSumProduct) {
    *sum = fmaf(q, x, *sum);
  } else {
    const float difference = q - x;
    if constexpr (SUM == kSumSquares || SUM == kSumPoincare) *sum = fmaf(difference, difference, *sum);
    if constexpr (SUM == kSumAbsolute) *sum += fabsf(difference);
    if constexpr (SUM == kSumLargest) {
      const float size = fabsf(difference);
      *sum = size > *sum || size != size ? size : *sum;  // a NaN stays
    }
  }
}

// What a row's value adds to its squares, where the metric needs them.
template <int SUM>
__device__ __forceinline__ void add_square(float x, SquaresOf<SUM>* squares) {
  if constexpr (SUM == kSumProduct) *squares = fmaf(x, x, *squares);
  if constexpr (SUM == kSumPoincare) *squares = fma(static_cast<double>(x), static_cast<double>(x), *squares);
}

// 1 / (1 - |v|^2): NaN outside the open unit ball.
__device__ __forceinline__ double ball_factor(double squares) {
  return squares < 1 ? 1 / (1 - squares) : static_cast<double>(quiet_nan());
}

// 1 / |v| from the fp32 sum of squares; where that could have overflowed or lost small values, again in double.
template <class T>
__device__ __forceinline__ float inverse_norm(float squares, const T* v, int64_t d) {
  if (squares > 1e-24f && squares < 1e37f) return 1.0f / sqrtf(squares);
  double wide = 0;
  for (int64_t k = 0; k < d; ++k) wide += static_cast<double>(to_float(v[k])) * to_float(v[k]);
  return wide == 0 ? 0.0f : static_cast<float>(1.0 / sqrt(wide));
}

// The score that is ranked, larger first, from a row's sums. `room`: the query's ball_factor(), poincare only.
template <class T>
__device__ __forceinline__ float ranked_score(Metric, float sum, double squares, const T*, int64_t, const float*,
                                              int64_t, double room) {
  const double y = 2 * room * ball_factor(squares) * static_cast<double>(sum);
  return -static_cast<float>(log1p(y + sqrt(y * (y + 2))));
}
template <class T>
__device__ __forceinline__ float ranked_score(Metric metric, float sum, float squares, const T* row, int64_t d,
                                              const float* bias, int64_t id, double) {
  if (metric == Metric::cosine) return sum * inverse_norm(squares, row, d);
  if (metric != Metric::ip) return -sum;
  return bias ? sum + bias[id] : sum;
}

// The 16 / sizeof(T) values of a 16-byte piece.
template <class T>
__device__ __forceinline__ float unpacked(const uint4& p, int i) {
  const uint32_t w[4] = {p.x, p.y, p.z, p.w};
  return value_of_word<T>(w[i * static_cast<int>(sizeof(T)) / 4], i);
}

}  // namespace cuda
}  // namespace lutra
