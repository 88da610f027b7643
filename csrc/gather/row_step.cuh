// The rules of row_update.h on a few neighbouring columns of a row, on CUDA. See row_step.h.
#pragma once
#include "common/device.cuh"
#include "gather/row_update.h"

namespace lutra {
namespace cuda {

// x rounded to bf16 up or down at random, by 16 bits of a hash of (key, column): as on the CPU.
__device__ __forceinline__ float round_randomly(float x, uint32_t key, int64_t column) {
  const uint32_t b = column_bits(key, column) >> 16, u = __float_as_uint(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((u + b) & 0xffff0000u);
}

struct RowStep {
  Rule rule;
  float lr, shrink, a, b, eps, scale;
  bool stochastic;
  uint64_t seed;
  explicit RowStep(const RowUpdateArgs& u)
      : rule(u.rule), lr(u.lr), shrink(u.shrink), a(u.a), b(u.b), eps(u.eps), scale(u.scale),
        stochastic(u.stochastic && u.dtype == DType::bf16), seed(u.seed) {}
};

// w, s0 and s1 point at column `column` of row `row`; g is its gradient. rate: lr, of rowwise_adagrad that of the row.
template <class T, int VEC>
__device__ __forceinline__ void step_columns(const RowStep& u, T* w, float* s0, float* s1, float rate, int64_t row,
                                             int64_t column, const float (&g)[VEC]) {
  const auto old = load_pack<T, VEC>(w);
  float x[VEC], m[VEC], v[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) x[j] = old[j] * u.shrink;
  const auto load = [](const float* from, float (&to)[VEC]) {
#pragma unroll
    for (int j = 0; j < VEC; j += 4) {
      const float4 f = *reinterpret_cast<const float4*>(from + j);
      to[j] = f.x, to[j + 1] = f.y, to[j + 2] = f.z, to[j + 3] = f.w;
    }
  };
  switch (u.rule) {
    case Rule::momentum: load(s0, m);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        m[j] = fmaf(m[j], u.a, g[j]);
        x[j] = fmaf(-rate, m[j], x[j]);
      }
      store_pack<float, VEC>(s0, m);
      break;
    case Rule::adagrad: load(s0, m);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        m[j] = fmaf(g[j], g[j], m[j]);
        x[j] -= g[j] * rate / (sqrtf(m[j]) + u.eps);
      }
      store_pack<float, VEC>(s0, m);
      break;
    case Rule::adam: load(s0, m); load(s1, v);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        m[j] = fmaf(g[j] - m[j], u.a, m[j]);
        v[j] = fmaf(g[j] * g[j] - v[j], u.b, v[j]);
        x[j] -= m[j] * rate / (sqrtf(v[j]) * u.scale + u.eps);
      }
      store_pack<float, VEC>(s0, m);
      store_pack<float, VEC>(s1, v);
      break;
    default:
#pragma unroll
      for (int j = 0; j < VEC; ++j) x[j] = fmaf(-rate, g[j], x[j]);
  }
  if (u.stochastic) {
    const uint32_t key = row_key(u.seed, row);
#pragma unroll
    for (int j = 0; j < VEC; ++j) x[j] = round_randomly(x[j], key, column + j);
  }
  store_pack<T, VEC>(w, x);
}

}  // namespace cuda
}  // namespace lutra
