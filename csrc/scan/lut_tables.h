// Look-up tables of a product quantizer for queries, the entries in lanes.
//
//   q (nq, m * dsub) fp32, row stride ldq; books (m, dsub, ksub) fp32, transposed: the entries lie side by side.
//   out[i][j][c] = scale * sum_s q[i][j][s] * books[j][s][c], or with `distances` sum_s (q[i][j][s] -
//   books[j][s][c])^2; in fp32, s in increasing order, so that a query's tables never depend on its batch.
// Limit: 2 m dsub ksub flops a query, from the L1 or L2.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct LutTablesArgs {
  const float* q;
  int64_t nq, ldq;
  const float* books;
  int64_t m, dsub, ksub;
  bool distances;
  float scale;
  float* out;
};

}  // namespace lutra

LUTRA_KERNEL(lut_tables, ::lutra::LutTablesArgs)
