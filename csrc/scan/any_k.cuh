// The k best of scores that lie in memory, for any k: radix selection by blocks of the whole machine.
#pragma once
#include "common/select.cuh"

namespace lutra {
namespace cuda {

// For launches of up to `queries` queries. Scores are ordered_bits() of what is the greater the better, 0 for rows that
// are not to be found.
struct AnyK {
  int64_t queries, n, k;
  uint32_t* scores;  // [queries][n]
  void* scratch;
};
int64_t any_k_bytes(int64_t queries, int64_t n, int64_t k);
// Lays the arrays out in a workspace of any_k_bytes().
AnyK any_k_arrays(int64_t queries, int64_t n, int64_t k, void* workspace);
// How many queries a launch should take: as many of nq as keep the scores below half a gigabyte.
int64_t any_k_queries(int64_t nq, int64_t n);
// Results of the first `count` queries: scores, ids (count, k), best first, equal ones by id, padded as by merge_lists.
void any_k(const AnyK& a, int64_t count, bool smaller_better, float* scores, int64_t* ids, const char* what,
           const Launch& l);

// A score of a kernel that writes them all: as ordered_bits() to `all` where any_k() will select, else to `out`.
__device__ __forceinline__ void write_score(void* out, DType type, uint32_t* all, int64_t at, float v) {
  if (all)
    all[at] = ordered_bits(v);
  else
    store_as(out, type, at, v);
}

}  // namespace cuda
}  // namespace lutra
