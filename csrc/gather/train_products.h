// Small products of a tensor train's cores, at a SIMD level. Rows along r2 are padded with zeros to `s` floats, whole
// vectors.
#pragma once
#include "common/parallel.h"
#include "common/simd.h"
#include "gather/tensor_train.h"

namespace lutra {
namespace LUTRA_NS {

// The cores, with core2 and core3 copied to padded rows where r2 is no multiple of a vector.
struct Train {
  const TrainCores& t;
  int64_t s, m, wide, dim;  // floats of a padded row; d1 d2; d2 s, a padded row of core2; d1 d2 d3
  bool padded;
  Buffer<float> copy2, copy3;

  explicit Train(const TrainCores& c)
      : t(c), s((c.r2 + W - 1) / W * W), m(c.d1 * c.d2), wide(c.d2 * s), dim(c.d1 * c.d2 * c.d3), padded(s != c.r2),
        copy2(padded ? c.i2 * c.r1 * wide : 0), copy3(padded ? c.i3 * c.d3 * s : 0) {
    if (!padded) return;
    pad(c.core2, c.i2 * c.r1 * c.d2, copy2.data);
    pad(c.core3, c.i3 * c.d3, copy3.data);
  }
  void pad(const float* from, int64_t n, float* to) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < t.r2; ++j) to[i * s + j] = from[i * t.r2 + j];
      for (int64_t j = t.r2; j < s; ++j) to[i * s + j] = 0;
    }
  }
  const float* a(int64_t i) const { return t.core1 + i * t.d1 * t.r1; }
  const float* b(int64_t i) const { return (padded ? copy2.data : t.core2) + i * t.r1 * wide; }
  const float* c(int64_t i) const { return (padded ? copy3.data : t.core3) + i * t.d3 * s; }
};

// NR rows of p (d1, wide) = a (d1, r1) . b (r1, wide), NV vectors of columns.
template <int NR, int NV>
LUTRA_INLINE void product_block(const float* a, int64_t r1, const float* b, int64_t wide, float* p) {
  vf sum[NR][NV];
  for (int i = 0; i < NR; ++i)
    for (int v = 0; v < NV; ++v) sum[i][v] = (vf){};
  for (int64_t k = 0; k < r1; ++k) {
    vf x[NV];
    for (int v = 0; v < NV; ++v) x[v] = load(b + k * wide + v * W);
    for (int i = 0; i < NR; ++i)
      for (int v = 0; v < NV; ++v) sum[i][v] += x[v] * a[i * r1 + k];
  }
  for (int i = 0; i < NR; ++i)
    for (int v = 0; v < NV; ++v) store(p + i * wide + v * W, sum[i][v]);
}

template <int NR>
LUTRA_INLINE void product_rows(const float* a, int64_t r1, const float* b, int64_t wide, float* p) {
  int64_t c = 0;
  for (; c + 4 * W <= wide; c += 4 * W) product_block<NR, 4>(a, r1, b + c, wide, p + c);
  for (; c < wide; c += W) product_block<NR, 1>(a, r1, b + c, wide, p + c);
}

// p (d1, wide) = a (d1, r1) . b (r1, wide); as rows of s floats it is (d1 d2, s).
static void prefix_product(const Train& t, const float* a, const float* b, float* p) {
  const int64_t r1 = t.t.r1;
  int64_t i = 0;
  for (; i + 4 <= t.t.d1; i += 4) product_rows<4>(a + i * r1, r1, b, t.wide, p + i * t.wide);
  for (; i + 2 <= t.t.d1; i += 2) product_rows<2>(a + i * r1, r1, b, t.wide, p + i * t.wide);
  for (; i < t.t.d1; ++i) product_rows<1>(a + i * r1, r1, b, t.wide, p + i * t.wide);
}

// The sum of the lanes of W vectors at p, in their order: neighbours are added, log2(W) times.
LUTRA_INLINE vf add_neighbours(vf a, vf b) {
#if defined(LUTRA_LEVEL_v4)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(LUTRA_LEVEL_v3)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}
template <int N>
struct LaneSums {
  LUTRA_INLINE vf of(const float* p) {
    return add_neighbours(LaneSums<N / 2>::of(p), LaneSums<N / 2>::of(p + N / 2 * W));
  }
};
template <>
struct LaneSums<1> {
  LUTRA_INLINE vf of(const float* p) { return load(p); }
};

// out[i] = the sum of the lanes of vector i at p, times factor, for i in [0, n).
LUTRA_INLINE void lane_sums(const float* p, int64_t n, float factor, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, LaneSums<W>::of(p + i * W) * factor);
  for (; i < n; ++i) {
    float rest[W * W];
    memset(rest, 0, sizeof(rest));
    memcpy(rest, p + i * W, W * sizeof(float));
    out[i] = LaneSums<W>::of(rest)[0] * factor;
  }
}

// sum (d1 d2, d3) vectors += over NE entries the lane-wise products of p[e] (d1 d2, s) and c[e] (d3, s), NL of the d3
// at a time.
template <int NE, int NL>
LUTRA_INLINE void add_products(const float* const* p, const float* const* c, int64_t m, int64_t d3, int64_t s,
                               float* sum) {
  for (int64_t v = 0; v < s; v += W) {
    for (int64_t l = 0; l + NL <= d3; l += NL) {
      vf x[NE][NL];
      for (int e = 0; e < NE; ++e)
        for (int k = 0; k < NL; ++k) x[e][k] = load(c[e] + (l + k) * s + v);
      for (int64_t i = 0; i < m; ++i) {
        vf y[NE], acc[NL];
        for (int e = 0; e < NE; ++e) y[e] = load(p[e] + i * s + v);
        for (int k = 0; k < NL; ++k) acc[k] = load(sum + (i * d3 + l + k) * W);
        for (int e = 0; e < NE; ++e)
          for (int k = 0; k < NL; ++k) acc[k] += y[e] * x[e][k];
        for (int k = 0; k < NL; ++k) store(sum + (i * d3 + l + k) * W, acc[k]);
      }
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
