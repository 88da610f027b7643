// The nearest centroid of each vector, exactly, behind a screen of 8-bit products.
//
//   x (n, d), c (k, d) fp32, row strides ldx, ldc; rows (n,): which rows of x, null: 0, 1, 2, ...
//   l2: score = sum (x - c)^2, smaller is better; ip: score = <x, c>, larger is better
//   scores, ids: the best of each vector, equal scores to the lowest id, at the vector's own row number
// Results do not depend on n nor on the threads: a score is summed as score_row (assign.cc) does, and the centroid is
// the one that this score is best for, among all.
//
// Vectors and centroids (less the centroids' mean) become 8-bit codes as the contract of scan/int8.h says, and so every
// A = <x', c'> - |c'|^2 / 2 is known to within E(x). Centroids with A + E >= max A - E are scored exactly: one or two.
// *bad: a centroid with a NaN score, or -1; the results are then unspecified.
// Limit: 64 products an instruction with VNNI, four times as many as fp32 multiply-adds.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct AssignArgs {
  const float* x;
  const float* c;
  int64_t n, k, d, ldx, ldc;
  Metric metric;  // l2 or ip
  const int64_t* rows;
  bool vnni;  // may be used
  float* scores;
  int64_t* ids;
  int64_t* exact;  // how many scores were computed exactly
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(assign, ::lutra::AssignArgs)
