// Queries in lanes: the queries are transposed once, so that a vector holds one dimension of W queries, and a tile of
// R rows by V vectors of queries is accumulated in registers from broadcast row values: 24 FMAs for 11 loads on
// AVX-512. The tile is compared with the thresholds of its queries; for what passes, the score is summed again in the
// order of exact.h and offered.
// Limit: the FMA rate.
#include "scan/exact.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <Kind K>
float dot(const float* q, const float* x, int64_t d) {  // in the order of a score; q is padded
  vf sum = {};
  int64_t j = 0;
  for (; j + W <= d; j += W) sum = step<K>(sum, load(q + j), load(x + j));
  if (j < d) sum = step<K>(sum, load(q + j), load_first(x + j, static_cast<int>(d - j)));
  if (K != Kind::maximum) return reduce_add(sum);
  float most = sum[0];
  for (int i = 1; i < W; ++i) most = most != most || sum[i] <= most ? most : sum[i];
  return most;
}

template <Kind K>
__attribute__((noinline)) void candidate(const Queries& c, int64_t query, const Block& b, int64_t i, Finds* s) {
  const float* x = static_cast<const float*>(b.x) + i * b.ldx;
  const float sum = dot<K>(c.q + query * c.ld, x, c.d);
  offer(s, query, b, i, b.bias ? sum + b.bias[i] : sum);
}

// One tile: rows i .. i + R - 1 of the block, V vectors of queries from the panel (d, V * W), whose first is `first`.
template <Kind K, int V, int R>
LUTRA_INLINE void tile(const Queries& c, const float* panel, const Block& b, int64_t i, int64_t first, int64_t count,
                       bool stream, Finds* s) {
  vf sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = (vf){};
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = static_cast<const float*>(b.x) + (i + r) * b.ldx;
  for (int64_t j = 0; j < b.d; ++j) {
    vf q[V];
    for (int v = 0; v < V; ++v) q[v] = load(panel + (j * V + v) * W);
    for (int r = 0; r < R; ++r) {
      const vf xj = splat(x[r][j]);
      for (int v = 0; v < V; ++v) sum[r][v] = step<K>(sum[r][v], q[v], xj);
    }
    if (j % 16 == 0 && stream)  // the same place of the next tile's rows
      for (int r = 0; r < R; ++r) __builtin_prefetch(x[r] + 64 * b.ldx + j, 0, 2);
  }
  uint32_t any = 0, mask[R][V];
  for (int v = 0; v < V; ++v) {
    const vf t = load(s->pass + first + v * W);
    for (int r = 0; r < R; ++r) {
      if (b.factor) sum[r][v] *= b.factor[i + r];
      if (b.bias) sum[r][v] += b.bias[i + r];
      any |= mask[r][v] = passes<K>(sum[r][v], t);
    }
  }
  if (__builtin_expect(any == 0, 1)) return;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      for (uint32_t m = mask[r][v]; m; m &= m - 1) {
        const int64_t query = first + v * W + __builtin_ctz(m);
        if (query < count) candidate<K>(c, query, b, i + r, s);
      }
}

#if defined(LUTRA_LEVEL_v4)
constexpr int kRows[] = {0, 16, 12, 8};  // of a tile, by its vectors of queries: of 32 registers
#else
constexpr int kRows[] = {0, 8, 6, 4};  // of 16 registers
#endif

template <Kind K, int V>
void panel_rows(const Queries& c, const float* panel, const Block& b, int64_t first, int64_t count, bool stream,
                Finds* s) {
  constexpr int R = kRows[V];
  int64_t i = 0;
  for (; i + R <= b.count; i += R) tile<K, V, R>(c, panel, b, i, first, count, stream && i + 2 * R <= b.count, s);
  for (; i < b.count; ++i) tile<K, V, 1>(c, panel, b, i, first, count, false, s);
}

template <Kind K>
void all_panels(const Queries& c, int64_t count, const float* packed, const Block& b, bool stream, Finds* s) {
  const int64_t vectors = (count + W - 1) / W;
  for (int64_t v = 0; v < vectors; v += kLaneVectors) {
    const float* panel = packed + v * W * c.d;
    switch (vectors - v < kLaneVectors ? vectors - v : kLaneVectors) {
      case 1: panel_rows<K, 1>(c, panel, b, v * W, count, stream && v == 0, s); break;
      case 2: panel_rows<K, 2>(c, panel, b, v * W, count, stream && v == 0, s); break;
      default: panel_rows<K, kLaneVectors>(c, panel, b, v * W, count, stream && v == 0, s);
    }
  }
}

}  // namespace

// Panels of kLaneVectors vectors (the last of fewer), one after another, each (d, vectors * W).
void pack_queries(const Queries& c, int64_t count, float* packed) {
  const int64_t vectors = (count + W - 1) / W;
  for (int64_t i = 0; i < vectors * W; ++i) {
    const int64_t v = i / W, panel = v / kLaneVectors * kLaneVectors;
    const int64_t width = (vectors - panel < kLaneVectors ? vectors - panel : kLaneVectors) * W;
    float* out = packed + panel * W * c.d + (v - panel) * W + i % W;
    const float* q = c.q + i * c.ld;
    for (int64_t j = 0; j < c.d; ++j) out[j * width] = i < count ? q[j] : 0.0f;
  }
}

void scan_lanes(const Queries& c, int64_t count, const float* packed, const Block& b, bool stream, Finds* s) {
  switch (kind_of(c.metric)) {
    case Kind::dot: return all_panels<Kind::dot>(c, count, packed, b, stream, s);
    case Kind::square: return all_panels<Kind::square>(c, count, packed, b, stream, s);
    case Kind::absolute: return all_panels<Kind::absolute>(c, count, packed, b, stream, s);
    case Kind::maximum: return all_panels<Kind::maximum>(c, count, packed, b, stream, s);
  }
}

float norm_bound(const Block& b) {
  vf most = {};  // of each lane's share of a row's square: together not below any row's
  for (int64_t i = 0; i < b.count; ++i) {
    const float* x = static_cast<const float*>(b.x) + i * b.ldx;
    vf sum = {};
    int64_t j = 0;
    for (; j + W <= b.d; j += W) sum += load(x + j) * load(x + j);
    if (j < b.d) {
      const vf tail = load_first(x + j, static_cast<int>(b.d - j));
      sum += tail * tail;
    }
    most = sum > most ? sum : most;
  }
  // rounded down by at most a relative d 2^-24, and by 1e-38 where squares are subnormal
  return sqrtf(reduce_add(most)) * (1.001f + static_cast<float>(b.d) * 1e-7f) + static_cast<float>(b.d) * 1e-19f;
}

}  // namespace LUTRA_NS
}  // namespace lutra
