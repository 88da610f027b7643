// Hash features of ids (Deep Hash Embedding): k values in [-1, 1] for each id.
//
//   out[i, j] = 2 r / (buckets - 1) - 1 with r = ((a_j x_i + b_j) mod p_j) mod buckets, the integers exact; the last
//   step is (2 r - (buckets - 1)) * (1 / (buckets - 1)) in double, rounded to f32: the same bits everywhere. 0 <= x <
//   2^32, a_j and b_j below p_j, p_j below 2^31, 2 <= buckets < 2^31.
//
// With AVX2 and up integers live in doubles: a x as the sum of a rounded product and its error (one fused
// multiply-add), of which a multiple of p is taken away, again without error. A division takes ten times as long.
// *bad receives the position of the first id outside [0, 2^32), or -1.
// Limit: some 20 instructions for 8 (4) values.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct HashFeaturesArgs {
  const void* ids;
  DType id_type;  // i32 or i64
  int64_t n, k;
  const double* a;  // (k,) integers all
  const double* b;
  const double* p;
  double buckets;
  float* out;  // (n, k)
  int64_t* bad;
  const int64_t* coefficients = nullptr;  // CUDA only, in place of a, b, p: these and floor((2^64 - 1) / p), (4, k)
};

}  // namespace lutra

LUTRA_KERNEL(hash_features, ::lutra::HashFeaturesArgs)
