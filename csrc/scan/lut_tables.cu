// Look-up tables of queries on CUDA; the formula is in list_cuda.h.
//
// A block has 8 queries and 128 columns of one part j, a thread one column: it walks the dsub rows of a[j], whose
// values lie side by side for the block's threads, with the queries' values in shared memory, 128 of each at a time.
// A table never depends on the rest of its batch. Limit: 2 m dsub columns flops a query, or reading `a` once for 8
// queries.
#include "common/device.cuh"
#include "scan/list_cuda.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128, kQueries = 8, kChunk = 128;

template <bool DISTANCES>
__global__ void __launch_bounds__(kThreads) tables_kernel(TablesOfQueries t, int64_t column_blocks) {
  __shared__ float values[kChunk][kQueries];
  const int64_t j = blockIdx.x / column_blocks;
  const int64_t column = (blockIdx.x - j * column_blocks) * kThreads + threadIdx.x;
  const int64_t q0 = static_cast<int64_t>(blockIdx.y) * kQueries, d = t.m * t.dsub;
  const bool here = column < t.columns;
  float sum[kQueries];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) sum[i] = 0;
  for (int64_t s0 = 0; s0 < t.dsub; s0 += kChunk) {
    const int count = static_cast<int>(t.dsub - s0 < kChunk ? t.dsub - s0 : kChunk);
    __syncthreads();
    for (int e = threadIdx.x; e < kChunk * kQueries; e += kThreads) {
      const int i = e / kChunk, s = e - i * kChunk;  // neighbouring threads read neighbouring values
      values[s][i] = s < count && q0 + i < t.nq ? t.q[(q0 + i) * d + j * t.dsub + s0 + s] : 0;
    }
    __syncthreads();
    if (!here) continue;
    const float* a = t.a + (j * t.dsub + s0) * t.columns + column;
#pragma unroll 4
    for (int s = 0; s < count; ++s) {
      const float x = a[s * t.columns];
      const float4 low = *reinterpret_cast<const float4*>(&values[s][0]);
      const float4 high = *reinterpret_cast<const float4*>(&values[s][4]);
      const float q[kQueries] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const float difference = q[i] - x;
        sum[i] = DISTANCES ? fmaf(difference, difference, sum[i]) : fmaf(q[i], x, sum[i]);
      }
    }
  }
  if (!here) return;
  const float constant = t.constant ? t.constant[j * t.columns + column] : 0.0f;
#pragma unroll
  for (int i = 0; i < kQueries; ++i)
    if (q0 + i < t.nq) t.out[((q0 + i) * t.m + j) * t.columns + column] = sum[i] + constant;
}

}  // namespace

void tables_of_queries(const TablesOfQueries& t, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t column_blocks = div_up(t.columns, kThreads);
  constexpr int64_t kMost = int64_t{65535} * kQueries;
  for (int64_t first = 0; first < t.nq; first += kMost) {
    TablesOfQueries part = t;
    part.nq = t.nq - first < kMost ? t.nq - first : kMost;
    part.q += first * t.m * t.dsub;
    part.out += first * t.m * t.columns;
    const dim3 grid(grid_x(t.m * column_blocks), static_cast<unsigned>(div_up(part.nq, kQueries)));
    launch("tables", t.distances ? tables_kernel<true> : tables_kernel<false>, grid, kThreads, 0, l, part,
           column_blocks);
  }
}

}  // namespace cuda
}  // namespace lutra
