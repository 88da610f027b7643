// Product keys: of n * n keys, each the pair of two sub-keys, the k with the largest inner products with a query.
//
//   q (tokens, heads, 2, dim), keys (heads, 2, n, dim), contiguous, f32, f16 or bf16 each.
//   s1_i = <q[.., 0], keys[.., 0, i]>, s2_j likewise; the score of the key i n + j is s1_i + s2_j. All sums are fp32.
//   scores fp32, ids int64 (tokens, heads, k): the k best, best first.
// The k best of each half, equal scores by increasing number, are taken at ranks a and b = 0, 1, ...; only pairs with
// (a + 1) (b + 1) <= k can be among the k best sums, for each pair with a' <= a and b' <= b is no worse. Of these,
// equal sums come by increasing id. k <= n <= 65535. *bad: the first (token, head) that has a NaN among its n + n
// scores or its sums, or -1. No scores are written: those of a block of queries stay in the second-level cache until
// they have been selected from. Limits: 4 n dim operations a query at the FMA rate (many queries); reading the keys
// (few).
#pragma once
#include "common/levels.h"
#include "common/types.h"

#include <cstdint>

namespace lutra {

struct ProductKeysArgs {
  const void* q;
  DType q_dtype;
  const void* keys;
  DType key_dtype;
  int64_t tokens, heads, n, dim, k;
  float* scores;
  int64_t* ids;
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(product_keys, ::lutra::ProductKeysArgs)

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {

// CUDA: the selection, from the scores of all sub-keys, (heads, 2, tokens, n) fp32, which the caller's library made.
struct ProductSelectArgs {
  const float* products;
  int64_t tokens, heads, n, k;
  float* scores;
  int64_t* ids;
};

namespace cuda {
int64_t product_select_most(int device);  // the greatest k
void product_select(const ProductSelectArgs& a, const Launch& l);
}  // namespace cuda
}  // namespace lutra
#endif
