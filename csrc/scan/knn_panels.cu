// Queries as bf16 panels for the screen (knn_screen.cuh): a warp writes one query, terms, squares and reach.
#include "common/mma.cuh"
#include "scan/knn_screen.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) panels_kernel(PanelArgs a) {
  const int64_t query = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  const int lane = threadIdx.x & 31;
  if (query >= a.padded) return;
  const float* q = a.q + query * a.ldq;
  const int64_t tile = query >> 6;
  const int row = static_cast<int>(query & 63);
  double squares = 0;
  float lost = 0;
  for (int slab = 0; slab < a.slabs; ++slab) {
    const int column = slab * 64 + 2 * lane;
    __nv_bfloat162 high, low;
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) v[e] = query < a.nq && column + e < a.d ? q[column + e] : 0.0f;
    high = __floats2bfloat162_rn(v[0], v[1]);
    const float r0 = v[0] - __low2float(high), r1 = v[1] - __high2float(high);
    low = __floats2bfloat162_rn(r0, r1);
    const float l0 = a.terms == 2 ? r0 - __low2float(low) : r0, l1 = a.terms == 2 ? r1 - __high2float(low) : r1;
    lost = fmaf(l1, l1, fmaf(l0, l0, lost));
    squares += static_cast<double>(v[0]) * v[0] + static_cast<double>(v[1]) * v[1];
    unsigned char* to =
        a.panels + ((tile * a.terms * a.slabs + slab) * 64) * 128 + swizzled(row, lane >> 2) + (lane & 3) * 4;
    *reinterpret_cast<__nv_bfloat162*>(to) = high;
    if (a.terms == 2) *reinterpret_cast<__nv_bfloat162*>(to + static_cast<int64_t>(a.slabs) * 64 * 128) = low;
  }
  lost = warp_sum(lost);
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) squares += __shfl_xor_sync(kFullWarp, squares, s);
  if (lane) return;
  const bool real = query < a.nq;
  // 1e-18: the squares of what was lost may themselves have been lost; in fp32 from 2e19 on it is infinite or NaN, and
  // the query is left to the exact pass.
  const float norm = static_cast<float>(sqrt(squares));
  a.reach[query] = real ? fmaf(norm, a.slope, sqrtf(lost) * 1.001f) * 1.0001f + 1e-18f : 0.0f;
  a.squares[query] = squares;
  a.bars[query] = real ? kLowestBar : 0xff800000u;  // or ordered_bits of infinity
}

// A warp a query. 256 places keep the largest of the samples that fall to them: the rank-th largest of these is at most
// the rank-th largest of all, and seldom less.
__global__ void __launch_bounds__(kThreads) seed_kernel(SeedArgs a) {
  const int64_t query = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  const int lane = threadIdx.x & 31;
  if (query >= a.nq) return;
  const float* sample = a.sample + query * a.count;
  unsigned most[8];
#pragma unroll
  for (int p = 0; p < 8; ++p) most[p] = 0;
  for (int64_t i0 = 0; i0 < a.count; i0 += 256) {
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      const int64_t i = i0 + p * 32 + lane;
      const unsigned v = i < a.count ? ordered_bits(sample[i]) : 0;
      most[p] = v > most[p] ? v : most[p];
    }
  }
  unsigned bar = 0;  // bit by bit the largest value that `rank` places reach
  for (int bit = 31; bit >= 0; --bit) {
    const unsigned trial = bar | 1u << bit;
    int reached = 0;
#pragma unroll
    for (int p = 0; p < 8; ++p) reached += __popc(__ballot_sync(kFullWarp, most[p] >= trial));
    if (reached >= a.rank) bar = trial;
  }
  if (lane == 0 && bar > 0x00800000u) a.bars[query] = bar - 1;  // the place itself must pass
}

}  // namespace

void seed_bars(const SeedArgs& a, const Launch& l) {
  launch("knn", seed_kernel, grid_x(div_up(a.nq * 32, kThreads)), kThreads, 0, l, a);
}

void make_panels(const PanelArgs& a, const Launch& l) {
  launch("knn", panels_kernel, grid_x(div_up(a.padded * 32, kThreads)), kThreads, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
