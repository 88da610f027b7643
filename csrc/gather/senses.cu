// Senses on CUDA: a warp reads the senses of a token, two rows at a time, and copies the one with the largest score;
// see senses.h. A token that is out of range or has no sense gives NaN, with row -1. Limit: reading the senses.
#include "gather/senses.h"

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads)
    senses_kernel(const T* table, int64_t total, int64_t dim, int64_t tokens, const int64_t* offsets, int64_t each,
                  Ids ids, int64_t n, const T* context, T* out, int64_t* best, float* scores) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (i >= n) return;
  const int64_t x = ids[i];
  int64_t r0 = 0, r1 = 0;
  if (x >= 0 && x < tokens) {
    r0 = offsets ? offsets[x] : x * each;
    r1 = offsets ? offsets[x + 1] : r0 + each;
    if (r0 < 0 || r1 > total || r1 < r0) r0 = r1 = 0;
  }
  const T* given = context + i * dim;
  int64_t row = -1;
  float score = quiet_nan();
  for (int64_t r = r0; r < r1; r += 2) {
    const bool two = r + 1 < r1;
    const T* p = table + r * dim;
    float s0 = 0, s1 = 0;
    for (int64_t j = static_cast<int64_t>(lane) * VEC; j < dim; j += 32 * VEC) {
      const auto c = load_pack<T, VEC>(given + j), a = load_pack<T, VEC>(p + j);
      const auto b = load_pack<T, VEC>(p + (two ? dim : 0) + j);
#pragma unroll
      for (int u = 0; u < VEC; ++u) {
        s0 = fmaf(a[u], c[u], s0);
        s1 = fmaf(b[u], c[u], s1);
      }
    }
    s0 = warp_sum(s0);
    s1 = warp_sum(s1);
    // The first among equals; a NaN wins against numbers, the first NaN against the others.
    if (row < 0 || s0 > score || (isnan(s0) && !isnan(score))) row = r, score = s0;
    if (two && (s1 > score || (isnan(s1) && !isnan(score)))) row = r + 1, score = s1;
  }
  for (int64_t j = lane; j < dim; j += 32)
    out[i * dim + j] = row < 0 ? from_float<T>(quiet_nan()) : table[row * dim + j];
  if (lane == 0) best[i] = row, scores[i] = score;
}

template <class T, int WIDE>
void run(const SensesArgs& a, const Launch& l) {
  const bool wide = a.dim % WIDE == 0 && aligned(a.table, 16) && aligned(a.context, 16);
  launch("senses", wide ? senses_kernel<T, WIDE> : senses_kernel<T, 1>, grid_x(div_up(a.n, kWarps)), kThreads, 0, l,
         static_cast<const T*>(a.table), a.total, a.dim, a.tokens, a.offsets, a.each,
         Ids{a.ids, a.id_type == DType::i64}, a.n, static_cast<const T*>(a.context), static_cast<T*>(a.out), a.best,
         a.scores);
}

}  // namespace

void senses(const SensesArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return run<__half, 8>(a, l);
    case DType::bf16: return run<__nv_bfloat16, 8>(a, l);
    default: return run<float, 4>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
