// One step of each metric, on vectors and on single values, at a SIMD level. All keys are "greater is better":
// a distance's key is its negative.
#pragma once
#include "common/simd.h"
#include "common/types.h"

#include <math.h>

namespace lutra {
namespace LUTRA_NS {

template <Metric M>
LUTRA_INLINE vf accumulate(vf sum, vf q, vf x) {
  if (M == Metric::l2) {
    const vf difference = q - x;
    return sum + difference * difference;
  }
  return sum + q * x;
}

LUTRA_INLINE float sign_of(Metric m) { return m == Metric::ip || m == Metric::cosine ? 1.0f : -1.0f; }

// The largest of |x|.
static inline float most_of(const float* x, int64_t n) {
  vf most = {};
  int64_t i = 0;
  for (; i < n; i += W) {
    const vf v = i + W <= n ? load(x + i) : load_first(x + i, static_cast<int>(n - i));
    const vf size = (vf)((vi)v & 0x7fffffff);
    most = size > most ? size : most;
  }
  float top = 0;
  for (int l = 0; l < W; ++l) top = most[l] > top ? most[l] : top;
  return top;
}

// |x|^2.
LUTRA_INLINE float square_norm(const float* x, int64_t d) {
  vf sum = {};
  int64_t j = 0;
  for (; j + W <= d; j += W) sum += load(x + j) * load(x + j);
  if (j < d) {
    const vf tail = load_first(x + j, static_cast<int>(d - j));
    sum += tail * tail;
  }
  return reduce_add(sum);
}

// 1 / |x|, 0 for a zero vector; in double where fp32 sums could overflow or lose small values.
LUTRA_INLINE float inverse_norm(const float* x, int64_t d) {
  const float s = square_norm(x, d);
  if (s > 1e-24f && s < 1e37f) return 1.0f / sqrtf(s);
  double wide = 0;
  for (int64_t j = 0; j < d; ++j) wide += static_cast<double>(x[j]) * x[j];
  return wide == 0 ? 0.0f : static_cast<float>(1.0 / sqrt(wide));
}

}  // namespace LUTRA_NS
}  // namespace lutra
