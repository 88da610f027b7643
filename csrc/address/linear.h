// Products of rows with a matrix, each row by itself.
//
//   y[i][j] = sum_k x[i][k] matrix[k][j],   x (n, a), matrix (a, b), y (n, b), all fp32 and contiguous.
//
// Every sum runs over k in increasing order, with one rounding a term where the level has fused multiply-adds: a
// row's result depends neither on the rows beside it nor on the number of threads, which a library's product does
// not promise. Rotations of quantizers are made of it: a query must get the same table in any batch.
// Limit: multiply-adds; for few rows, reading the matrix.
#pragma once
#include "common/levels.h"

#include <cstdint>

namespace lutra {

struct LinearArgs {
  const float* x;
  const float* matrix;
  int64_t n, a, b;
  float* y;
};

}  // namespace lutra

LUTRA_KERNEL(linear, ::lutra::LinearArgs)
