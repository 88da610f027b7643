// Exact score of one stored row with a query in fp32, for rescoring inside a scan of codes, at a SIMD level.
// Summed along d in the order of scan/rescore.cc. Greater keys are better: an l2 key is the negated distance.
#pragma once
#include "common/simd.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {

template <Metric M, class T>
LUTRA_INLINE float exact_key(const float* q, const typename T::type* x, int64_t d, float scale) {
  vf sum = {}, square = {};
  int64_t j = 0;
  for (; j + W <= d; j += W) {
    const vf v = T::load(x + j) * scale;
    sum = accumulate<M>(sum, load(q + j), v);
    if (M == Metric::cosine) square += v * v;
  }
  if (j < d) {
    float rest[W] = {};
    for (int i = 0; i < d - j; ++i) rest[i] = T::get(x + j + i) * scale;
    const vf v = load(rest);
    sum = accumulate<M>(sum, load_first(q + j, static_cast<int>(d - j)), v);
    if (M == Metric::cosine) square += v * v;
  }
  float key = reduce_add(sum);
  if (M == Metric::l2) return -key;
  if (M == Metric::cosine) {  // q has unit norm
    const float norm = reduce_add(square);
    key = norm > 0 ? key / sqrtf(norm) : 0.0f;
  }
  return key;
}

}  // namespace LUTRA_NS
}  // namespace lutra
