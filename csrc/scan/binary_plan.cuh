// What the kernels of packed bits on CUDA share.
#pragma once
#include "common/select.cuh"
#include "scan/binary.h"

namespace lutra {
namespace cuda {

struct BinaryScan {
  const uint8_t *q, *x, *keep;
  int64_t nq, n;
  int b, chunks;  // bytes of a row; of 16 bytes
  ListPlan lists;
  Key* keys;
};

// The score of a row, the greater the better: minus the distance. `ones`: set bits of the row and of the query.
template <bool JACCARD>
__device__ __forceinline__ float binary_score(int common, int row_ones, int query_ones) {
  if (!JACCARD) return -static_cast<float>(row_ones + query_ones - 2 * common);
  const int together = row_ones + query_ones - common;
  return together == 0 ? -0.0f : __fdiv_rn(static_cast<float>(common), static_cast<float>(together)) - 1.0f;
}

// Batches by binary tensor cores (binary_mma.cu): shared memory 0 where rows are too long for it.
struct BinaryMmaPlan {
  size_t shared = 0;
  ListPlan lists{};
};
BinaryMmaPlan binary_mma_plan(int64_t nq, int64_t n, int64_t b, int64_t k, int64_t list_bytes, int device);
void binary_mma(const BinaryScan& s, const BinaryMmaPlan& p, int vec, bool jaccard, const Launch& l);

}  // namespace cuda
}  // namespace lutra
