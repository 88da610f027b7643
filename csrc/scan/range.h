// All rows within a radius of each query, exactly.
//
//   Scores as in knn.h. ip, cosine: score >= radius; the distances: score <= radius.
//   `take` is called on the caller's thread, possibly several times, with what was found, in no order.
// *bad: as knn.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct RangeHit {
  int64_t row, query;
  float score;
};

struct RangeArgs {
  const float* q;
  const void* x;
  int64_t nq, n, d, ldq, ldx;
  Metric metric;
  DType storage;
  const uint8_t* keep;
  float radius;
  void (*take)(void* context, const RangeHit* hits, int64_t count);
  void* context;
  int64_t* bad;
};

}  // namespace lutra

#ifndef LUTRA_CUDA_ENTRIES
LUTRA_KERNEL(range, ::lutra::RangeArgs)
#endif
