// What scans that can write their scores out or select among them share: the last step for some rows of a query.
#pragma once
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {

struct Emit {
  const float* bias;  // of each row, or null
  void* out;          // (queries, ldo) of `dtype`, unless selected
  DType dtype;
  int64_t ldo;
};

template <class T>
LUTRA_INLINE void put_row(void* out, int64_t at, const float* scores, int64_t rows) {
  auto* to = static_cast<typename T::type*>(out) + at;
  int64_t i = 0;
  for (; i + W <= rows; i += W) T::store(to + i, load(scores + i));
  for (; i < rows; ++i) T::put(to + i, scores[i]);
}

// Scores of rows [i0, i0 + rows) of query first + t: biased, then written, or offered to `s` as those of its query t.
// `scores` has room for whole vectors.
static inline void emit(const Emit& e, Selection* s, int64_t first, int64_t t, int64_t i0, int64_t rows,
                        float* scores) {
  if (e.bias) {
    int64_t i = 0;
    for (; i + W <= rows; i += W) store(scores + i, load(scores + i) + load(e.bias + i0 + i));
    for (; i < rows; ++i) scores[i] += e.bias[i0 + i];
  }
  if (!s) {
    const int64_t at = (first + t) * e.ldo + i0;
    if (e.dtype == DType::f32)
      put_row<F32>(e.out, at, scores, rows);
    else if (e.dtype == DType::bf16)
      put_row<BF16>(e.out, at, scores, rows);
    else
      put_row<F16>(e.out, at, scores, rows);
    return;
  }
  for (int64_t i = 0; i < rows; i += W)
    for (uint32_t m = passes<Metric::ip>(load(scores + i), splat(s->threshold[t])); m; m &= m - 1) {
      const int64_t at = i + __builtin_ctz(m);
      if (at < rows) offer(s, t, scores[at], i0 + at, Metric::ip);
    }
}

}  // namespace LUTRA_NS
}  // namespace lutra
