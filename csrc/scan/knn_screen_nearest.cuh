// The screen's selection where only the nearest row is asked for (address.nearest).
#pragma once
#include "scan/knn_screen.cuh"

namespace lutra {
namespace cuda {

// ---- the nearest alone (address.nearest): a thread keeps the two best rows of each of its queries and the third's
// score
template <int MT>
struct Best {
  float v[2 * MT][3];
  int id[2 * MT][2];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      v[i][0] = v[i][1] = v[i][2] = -__int_as_float(0x7f800000);
      id[i][0] = id[i][1] = -1;
    }
  }
  __device__ __forceinline__ void add(int i, float s, int row) {
    if (s > v[i][0]) {
      v[i][2] = v[i][1];
      v[i][1] = v[i][0], id[i][1] = id[i][0];
      v[i][0] = s, id[i][0] = row;
    } else if (s > v[i][1]) {
      v[i][2] = v[i][1];
      v[i][1] = s, id[i][1] = row;
    } else {
      v[i][2] = fmaxf(v[i][2], s);
    }
  }
};

// The lowest 5 bits of a score become its column's number within the thread's (kPacked allows for it), so that the
// three largest come out of minima and maxima. Rows that are not there have the lowest scores.
template <int MT, int BN>
__device__ __forceinline__ void best_of_tile(const float (&acc)[MT][BN / 2], const float* r0, const float* r1, int row0,
                                             const Lane<MT>& own, Best<MT>& best) {
  const int t = threadIdx.x & 3;
  float most[2 * MT][3];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) most[i][0] = most[i][1] = most[i][2] = -__int_as_float(0x7f800000);
#pragma unroll
  for (int j = 0; j < BN / 8; ++j) {
    const float2 w = *reinterpret_cast<const float2*>(r0 + 8 * j + 2 * t);
    const float2 v = *reinterpret_cast<const float2*>(r1 + 8 * j + 2 * t);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s = fmaf(own.reach[i], e ? w.y : w.x, acc[i >> 1][4 * j + 2 * (i & 1) + e] + (e ? v.y : v.x));
        const float f = __uint_as_float((__float_as_uint(s) & ~31u) | (2 * j + e));
        const float second = fminf(most[i][0], f);
        most[i][0] = fmaxf(most[i][0], f);
        const float third = fminf(most[i][1], second);
        most[i][1] = fmaxf(most[i][1], second);
        most[i][2] = fmaxf(most[i][2], third);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int at = static_cast<int>(__float_as_uint(most[i][p]) & 31);
      if (most[i][p] > best.v[i][2]) best.add(i, most[i][p], row0 + 4 * (at & ~1) + 2 * t + (at & 1));
    }
    best.v[i][2] = fmaxf(best.v[i][2], most[i][2]);
  }
}

// The 4 threads of a query put theirs together; the first writes.
template <int MT>
__device__ __forceinline__ void write_best(const ScreenArgs& a, Best<MT>& best, int64_t query) {
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
    for (int s = 1; s < 4; s <<= 1) {
      const float v0 = __shfl_xor_sync(kFullWarp, best.v[i][0], s), v1 = __shfl_xor_sync(kFullWarp, best.v[i][1], s);
      const float v2 = __shfl_xor_sync(kFullWarp, best.v[i][2], s);
      const int id0 = __shfl_xor_sync(kFullWarp, best.id[i][0], s), id1 = __shfl_xor_sync(kFullWarp, best.id[i][1], s);
      best.add(i, v0, id0);
      best.add(i, v1, id1);
      best.v[i][2] = fmaxf(best.v[i][2], v2);
    }
    const int64_t q = query + query_offset<MT>(i);
    if ((threadIdx.x & 3) == 0 && q < a.nearest.queries) {
      a.nearest.candidates[2 * q] = best.id[i][0];
      a.nearest.candidates[2 * q + 1] = best.id[i][1];
      a.nearest.bounds[q] = best.v[i][2];
    }
  }
}

}  // namespace cuda
}  // namespace lutra
