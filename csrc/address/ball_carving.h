// Ball carving of the vectors of queries (MUVERA, Dhulipala et al. 2024, arXiv 2405.19504).
//
//   tokens (n, d); query i has the rows ptr[i] .. ptr[i + 1]
//   balls:     in their order, a row joins the first ball whose centre, the ball's first row, it has an inner product
//              with of `threshold` or more; otherwise it opens one. balls[t] = its number in the query, counts[i] how
//              many the query has.
//   ball_sums: out row out_ptr[i] + b = the sum of ball b of query i, fp32, in the order of the rows.
//
// Inner products are summed in W lanes, then those, in fp32. *bad receives the first row that holds NaN or infinity, or
// -1; then the results are unspecified.
// Limit: the FMA rate, 2 d operations a pair of a row and a centre that it is compared with.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct BallsArgs {
  const void* tokens;
  DType dtype;  // f32, f16, bf16
  int64_t n, d;
  const int64_t* ptr;  // (queries + 1,), rising from 0 to n
  int64_t queries;
  float threshold;
  int32_t* balls;   // (n,)
  int64_t* counts;  // (queries,)
  int64_t* bad;
};

struct BallSumsArgs {
  const void* tokens;
  DType dtype;
  int64_t n, d;
  const int64_t* ptr;
  int64_t queries;
  const int32_t* balls;
  const int64_t* out_ptr;  // (queries + 1,)
  float* out;              // (out_ptr[queries], d)
};

}  // namespace lutra

LUTRA_KERNEL(balls, ::lutra::BallsArgs)
LUTRA_KERNEL(ball_sums, ::lutra::BallSumsArgs)

// CUDA: balls takes a workspace of n int32; NaN and infinity are not looked for.
