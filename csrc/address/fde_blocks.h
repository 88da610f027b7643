// What a document and repetition of an encoding are made of: sums of tokens, products of rows with a matrix, and which
// partition is nearest to which. See fde.h.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// out[0, d) = the sum of rows[which[0]], rows[which[1]], ..., count > 0, of d values, a multiple of W, ld apart.
template <int V>
LUTRA_INLINE void sum_columns(const float* rows, int64_t ld, const int32_t* which, int64_t count, float* out) {
  vf sum[V];
  const float* first = rows + which[0] * ld;
  for (int v = 0; v < V; ++v) sum[v] = load(first + v * W);
  for (int64_t i = 1; i < count; ++i) {
    const float* row = rows + which[i] * ld;
    for (int v = 0; v < V; ++v) sum[v] += load(row + v * W);
  }
  for (int v = 0; v < V; ++v) store(out + v * W, sum[v]);
}
static inline void sum_rows(const float* rows, int64_t ld, int64_t d, const int32_t* which, int64_t count, float* out) {
  int64_t j = 0;
  for (; j + 8 * W <= d; j += 8 * W) sum_columns<8>(rows + j, ld, which, count, out + j);
  for (; j + 2 * W <= d; j += 2 * W) sum_columns<2>(rows + j, ld, which, count, out + j);
  for (; j < d; j += W) sum_columns<1>(rows + j, ld, which, count, out + j);
}

// out row i (ld_psi apart) = factor[i] * rows[i] psi, psi (d, ld_psi).
template <int N>
LUTRA_INLINE void project_some(const float* const* rows, const float* factor, int64_t d, const float* psi,
                               int64_t ld_psi, int64_t count, float* out) {
  const float* x[N];
  for (int i = 0; i < N; ++i) x[i] = rows[i < count ? i : count - 1];
  for (int64_t v = 0; v < ld_psi; v += W) {
    vf sum[N];
    for (int i = 0; i < N; ++i) sum[i] = (vf){};
    const float* s = psi + v;
    for (int64_t j = 0; j < d; ++j, s += ld_psi) {
      const vf column = load(s);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sum[i] += splat(x[i][j]) * column;
    }
    for (int i = 0; i < N && i < count; ++i) store(out + i * ld_psi + v, sum[i] * factor[i]);
  }
}
static inline void project_rows(const float* const* rows, const float* factor, int64_t count, int64_t d,
                                const float* psi, int64_t ld_psi, float* out) {
  int64_t i = 0;
  for (; i + 4 < count; i += 8) project_some<8>(rows + i, factor + i, d, psi, ld_psi, count - i, out + i * ld_psi);
  if (i < count) project_some<4>(rows + i, factor + i, d, psi, ld_psi, count - i, out + i * ld_psi);
}

// Distances between the corners of a cube: key[b] (by the bits of a sketch) = distance << kDistance | rank, the least
// over all corners that were given distance 0. One pass a bit: the distance is the sum of those along the axes.
constexpr int kDistance = 20;
constexpr int32_t kFar = 1 << 30;
static inline void nearest_corners(int32_t* key, int k) {  // key: 2^k values, room for W
  constexpr int32_t step = 1 << kDistance;
  const int64_t corners = int64_t{1} << k;
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  auto* at = reinterpret_cast<vi_unaligned*>(key);
  const int64_t vectors = corners < W ? 1 : corners / W;
  for (int64_t v = 0; v < vectors; ++v) {
    vi x = at[v];
    for (int s = 1; s < W && s < corners; s *= 2) {
      const vi other = __builtin_shuffle(x, lane ^ s) + step;
      x = other < x ? other : x;
    }
    at[v] = x;
  }
  for (int64_t s = 1; s < vectors; s *= 2)
    for (int64_t base = 0; base < vectors; base += 2 * s)
      for (int64_t v = base; v < base + s; ++v) {
        const vi a = at[v], b = at[v + s];
        at[v] = b + step < a ? b + step : a;
        at[v + s] = a + step < b ? a + step : b;
      }
}

}  // namespace LUTRA_NS
}  // namespace lutra
