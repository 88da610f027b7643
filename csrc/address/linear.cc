#include "address/linear.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

#if defined(LUTRA_LEVEL_v4)
constexpr int kRows = 8, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kBlock = 64;  // rows that share a pass over some columns of the matrix

// R rows from `i` on with V vectors of columns from `j` on; with `width` > 0 a part of one vector.
template <int R, int V>
void tile(const LinearArgs& g, int64_t i, int64_t j, int width) {
  vf sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = (vf){};
  const float* x = g.x + i * g.a;
  const float* column = g.matrix + j;
  for (int64_t k = 0; k < g.a; ++k) {
    vf c[V];
    for (int v = 0; v < V; ++v) c[v] = width ? load_first(column + k * g.b, width) : load(column + k * g.b + v * W);
    for (int r = 0; r < R; ++r) {
      const vf xk = splat(x[r * g.a + k]);
      for (int v = 0; v < V; ++v) sum[r][v] += xk * c[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    float* y = g.y + (i + r) * g.b + j;
    if (width) {
      float t[W];
      store(t, sum[r][0]);
      for (int l = 0; l < width; ++l) y[l] = t[l];
    } else {
      for (int v = 0; v < V; ++v) store(y + v * W, sum[r][v]);
    }
  }
}

template <int V>
void columns(const LinearArgs& g, int64_t begin, int64_t end, int64_t j, int width) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) tile<kRows, V>(g, i, j, width);
  for (; i < end; ++i) tile<1, V>(g, i, j, width);
}

}  // namespace

void linear(const LinearArgs& g) {
  // Few rows are shared by columns, many by rows; which of them changes no sum.
  const int64_t groups = (g.b + kVectors * W - 1) / (kVectors * W), blocks = (g.n + kBlock - 1) / kBlock;
  const double nanoseconds = 0.02 * g.n * g.a * g.b;
  const auto part = [&](int64_t begin, int64_t end, int64_t group) {
    int64_t j = group * kVectors * W;
    const int64_t last = j + kVectors * W < g.b ? j + kVectors * W : g.b;
    if (j + kVectors * W <= last) {
      columns<kVectors>(g, begin, end, j, 0);
      return;
    }
    for (; j + W <= last; j += W) columns<1>(g, begin, end, j, 0);
    if (j < last) columns<1>(g, begin, end, j, static_cast<int>(last - j));
  };
  if (blocks == 1) {
    parallel_for(groups, nanoseconds, [&](int64_t group) { part(0, g.n, group); });
    return;
  }
  parallel_for(blocks, nanoseconds, [&](int64_t block) {
    const int64_t begin = block * kBlock, end = begin + kBlock < g.n ? begin + kBlock : g.n;
    for (int64_t group = 0; group < groups; ++group) part(begin, end, group);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
