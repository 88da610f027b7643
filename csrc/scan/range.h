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
#else
// On CUDA the caller asks how much there is (offsets (nq + 1), on the device), and then for it, sorted.
namespace lutra {
namespace cuda {
int64_t range_workspace(const RangeArgs&, int64_t total, const Launch&);  // total 0: for range_count
void range_count(const RangeArgs&, int64_t* offsets, const Launch&);
void range_write(const RangeArgs&, int64_t total, const int64_t* offsets, float* scores, int64_t* ids, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
