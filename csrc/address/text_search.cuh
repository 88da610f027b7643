// Which text a position belongs to, for the consecutive positions of a block.
#pragma once
#include "common/device.cuh"

namespace lutra {
namespace cuda {

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
