// Partitions on CUDA; the formula is in simhash.h.
//
// A block takes a tile of 128 rows through shared memory, 32 dimensions at a time, transposed; a warp takes one
// repetition, a thread four rows. So a plane's value is one read for a warp, and serves 128 products. Products are
// summed in the order of the dimensions by fused multiply-adds: the bits of the CPU's levels with AVX2 and AVX-512. NaN
// in a row gives zero bits (nothing can be reported from here).
#include "address/simhash.h"

#include "address/simhash.cuh"
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kEach = 4, kRows = 32 * kEach, kDims = 32;
static_assert(kDims == 8 * kWarps, "a warp loads 8 dimensions");

template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    simhash_kernel(const T* x, int64_t n, int64_t d, const float* planes, int64_t repetitions, int k, int32_t* out,
                   int64_t row_step, int64_t repetition_step) {
  __shared__ __align__(16) float tile[kDims][kRows + 4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, columns = repetitions * k;
  for (int64_t base = static_cast<int64_t>(blockIdx.y) * kWarps; base < repetitions;
       base += static_cast<int64_t>(gridDim.y) * kWarps) {
    const int64_t r = base + warp;
    float sum[kEach][K] = {};
    for (int64_t j0 = 0; j0 < d; j0 += kDims) {
      __syncthreads();
      // A warp takes 8 dimensions of four rows at a time: 32 banks.
      const int j = warp * (kDims / kWarps) + lane % 8;
#pragma unroll 8
      for (int row0 = 0; row0 < kRows; row0 += 4) {
        const int row = row0 + lane / 8;
        const bool here = first + row < n && j0 + j < d;
        tile[j][row] = here ? to_float(x[(first + row) * d + j0 + j]) : 0.0f;
      }
      __syncthreads();
      if (r >= repetitions) continue;
      const int count = d - j0 < kDims ? static_cast<int>(d - j0) : kDims;
      const float* p = planes + j0 * columns + r * k;
      for (int j = 0; j < count; ++j, p += columns) {
        const float4 x4 = *reinterpret_cast<const float4*>(&tile[j][lane * kEach]);
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (i >= k) break;
          const float plane = __ldg(p + i);
          sum[0][i] = fmaf(x4.x, plane, sum[0][i]);
          sum[1][i] = fmaf(x4.y, plane, sum[1][i]);
          sum[2][i] = fmaf(x4.z, plane, sum[2][i]);
          sum[3][i] = fmaf(x4.w, plane, sum[3][i]);
        }
      }
    }
    if (r >= repetitions) continue;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t row = first + lane * kEach + e;
      uint32_t g = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (i >= k) break;
        g = (g << 1) + ((sum[e][i] > 0 ? 1u : 0u) ^ (g & 1u));
      }
      if (row < n) out[row * row_step + r * repetition_step] = static_cast<int32_t>(g);
    }
  }
}

template <class T>
void numbers(const SimhashArgs& a, int64_t row_step, int64_t repetition_step, const Launch& l) {
  const int64_t groups = div_up(a.repetitions, kWarps);
  const dim3 grid(grid_x(div_up(a.n, kRows)), static_cast<unsigned>(groups < 65535 ? groups : 65535));
  const auto kernel = a.k <= 4    ? simhash_kernel<T, 4>
                      : a.k <= 8  ? simhash_kernel<T, 8>
                      : a.k <= 16 ? simhash_kernel<T, 16>
                                  : simhash_kernel<T, 32>;
  launch("simhash", kernel, grid, kThreads, 0, l, static_cast<const T*>(a.x), a.n, a.d, a.planes, a.repetitions, a.k,
         a.out, row_step, repetition_step);
}

}  // namespace

void simhash_numbers(const SimhashArgs& a, int64_t row_step, int64_t repetition_step, const Launch& l) {
  switch (a.dtype) {
    case DType::f16: return numbers<__half>(a, row_step, repetition_step, l);
    case DType::bf16: return numbers<__nv_bfloat16>(a, row_step, repetition_step, l);
    default: return numbers<float>(a, row_step, repetition_step, l);
  }
}

void simhash(const SimhashArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  simhash_numbers(a, a.repetitions, 1, l);
}

}  // namespace cuda
}  // namespace lutra
