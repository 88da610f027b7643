// Which text a position belongs to, for the consecutive positions of a block.
#pragma once
#include <cstdint>

namespace lutra {
namespace cuda {

// The last of `texts` >= 1 that begins at or before p, looked for between two that are known; the first if none does.
__device__ __forceinline__ int64_t last_before(const int64_t* starts, int64_t low, int64_t high, int64_t p) {
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= p)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The text of position p of this thread, where the block has the positions [begin, end). All threads call it.
__device__ __forceinline__ int64_t text_of(const int64_t* starts, int64_t texts, int64_t begin, int64_t end,
                                           int64_t p) {
  __shared__ int64_t ends[2];
  if (threadIdx.x < 2) ends[threadIdx.x] = last_before(starts, 0, texts, threadIdx.x ? end - 1 : begin);
  __syncthreads();
  return last_before(starts, ends[0], ends[1] + 1, p);
}

}  // namespace cuda
}  // namespace lutra
