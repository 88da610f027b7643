// Two ways, chosen by the number of queries; neither copies the collection.
//
// Few queries ("rows"): each row is multiplied with each query along d, as the memory delivers it. A group of rows
//   is scored, then compared with the threshold at once.
// More queries ("lanes"): the queries are transposed once, so that a vector holds one dimension of W queries, and
//   a tile of kRows rows by V vectors of queries is accumulated in registers from broadcast row values: 24 FMAs for
//   11 loads on AVX-512. The tile is compared with the thresholds of its queries; what passes is offered to their
//   TopK. Row blocks that fit the L2 are used for all queries before the next is read.
//
// k = 1 with many queries has a way of its own: best_one.h.
//
// A score is always summed in the same order, in the middle of a tile as at its edges, so that equal rows have
// equal scores and ties can go to the lower id.
#include "scan/knn.h"

#include "scan/best_one.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

#if defined(LUTRA_LEVEL_v4)
constexpr int kVectors = 3, kRows = 8;  // 24 accumulators, 3 query vectors, of 32 registers
#else
constexpr int kVectors = 2, kRows = 6;  // 12 accumulators, 2 query vectors, 1 broadcast, of 16 registers
#endif
constexpr int64_t kBlockBytes = 192 << 10;  // of rows: with the query panel, inside an L2 of 512 KB or more

// ------------------------------------------------------------------------------------------ queries in lanes
// One tile: R rows from x, V vectors of queries from the panel (d, V * W). `first` is the first query's number.
template <Metric M, int V, int R>
void tile(const float* panel, const float* x, int64_t ldx, int64_t d, const float* inverse, int64_t row, int64_t first,
          int64_t queries, const float* ahead, Selection* s) {
  vf sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = (vf){};
  const float* xr[R];
  for (int r = 0; r < R; ++r) xr[r] = x + r * ldx;
  for (int64_t j = 0; j < d; ++j) {
    vf q[V];
    for (int v = 0; v < V; ++v) q[v] = load(panel + (j * V + v) * W);
    for (int r = 0; r < R; ++r) {
      const vf xj = splat(xr[r][j]);
      for (int v = 0; v < V; ++v) sum[r][v] = accumulate<M>(sum[r][v], q[v], xj);
    }
    if (j % 16 == 0 && ahead)  // the same place of the next tile's rows
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * ldx + j);
  }
  uint32_t any = 0, mask[R][V];
  for (int v = 0; v < V; ++v) {
    const vf t = load(s->threshold + first + v * W);
    for (int r = 0; r < R; ++r) {
      if (M == Metric::cosine) sum[r][v] *= inverse[r];
      any |= mask[r][v] = passes<M>(sum[r][v], t);
    }
  }
  if (!any) return;
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      if (!mask[r][v]) continue;
      float score[W];
      store(score, sum[r][v]);
      for (uint32_t m = mask[r][v]; m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        const int64_t query = first + v * W + lane;
        if (query < queries) offer(s, query, score[lane], row + r, M);
      }
    }
}

template <Metric M, int V>
void panel_rows(const KnnArgs& a, const float* panel, int64_t begin, int64_t end, const float* inverse, int64_t first,
                int64_t queries, bool prefetch, Selection* s) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) {
    const bool more = prefetch && i + 2 * kRows <= a.n;
    tile<M, V, kRows>(panel, a.x + i * a.ldx, a.ldx, a.d, inverse + (i - begin), i, first, queries,
                      more ? a.x + (i + kRows) * a.ldx : nullptr, s);
  }
  for (; i < end; ++i)
    tile<M, V, 1>(panel, a.x + i * a.ldx, a.ldx, a.d, inverse + (i - begin), i, first, queries, nullptr, s);
}

int64_t lane_vectors(int64_t queries) { return (queries + W - 1) / W; }

// All rows of [begin, end) against all queries. `packed`: panels of kVectors vectors (the last of fewer), one
// after another, each (d, vectors * W).
template <Metric M>
void lanes_block(const KnnArgs& a, const float* packed, int64_t queries, int64_t begin, int64_t end, float* inverse,
                 Selection* s) {
  if (M == Metric::cosine)
    for (int64_t i = begin; i < end; ++i) inverse[i - begin] = inverse_norm(a.x + i * a.ldx, a.d);
  const int64_t vectors = lane_vectors(queries);
  for (int64_t v = 0; v < vectors; v += kVectors) {
    const float* panel = packed + v * W * a.d;
    const bool prefetch = v == 0;
    switch (vectors - v < kVectors ? vectors - v : kVectors) {
      case 1: panel_rows<M, 1>(a, panel, begin, end, inverse, v * W, queries, prefetch, s); break;
      case 2: panel_rows<M, 2>(a, panel, begin, end, inverse, v * W, queries, prefetch, s); break;
      default: panel_rows<M, kVectors>(a, panel, begin, end, inverse, v * W, queries, prefetch, s);
    }
  }
}

void pack_queries(const KnnArgs& a, int64_t first, int64_t queries, float* packed) {
  const int64_t vectors = lane_vectors(queries);
  for (int64_t i = 0; i < vectors * W; ++i) {
    const int64_t v = i / W, panel = v / kVectors * kVectors;
    const int64_t width = (vectors - panel < kVectors ? vectors - panel : kVectors) * W;
    float* out = packed + panel * W * a.d + (v - panel) * W + i % W;
    const float* q = a.q + (first + i) * a.ldq;
    const bool real = i < queries;
    const float scale = real && a.metric == Metric::cosine ? inverse_norm(q, a.d) : 1.0f;
    for (int64_t j = 0; j < a.d; ++j) out[j * width] = real ? q[j] * scale : 0.0f;
  }
}

// ------------------------------------------------------------------------------------------ rows along d
constexpr int kGroup = 16;  // rows that are compared at once; a multiple of every W

// Scores of R rows with Q queries (Q + 1 sums for cosine: the row with itself).
template <Metric M, int Q, int R>
LUTRA_INLINE void dot_rows(const float* const* q, const float* x, int64_t ldx, int64_t d, float out[][kGroup]) {
  vf sum[R][Q];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < Q; ++i) sum[r][i] = (vf){};
  int64_t j = 0;
  for (; j + W <= d; j += W)
    for (int r = 0; r < R; ++r) {
      const vf xj = load(x + r * ldx + j);
      for (int i = 0; i < Q; ++i) sum[r][i] = accumulate<M>(sum[r][i], load(q[i] + j), xj);
    }
  if (j < d) {
    const int rest = static_cast<int>(d - j);
    for (int r = 0; r < R; ++r) {
      const vf xj = load_first(x + r * ldx + j, rest);
      for (int i = 0; i < Q; ++i) sum[r][i] = accumulate<M>(sum[r][i], load_first(q[i] + j, rest), xj);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < Q; ++i) out[i][r] = reduce_add(sum[r][i]);
}

template <Metric M, int Q>
void rows_block(const KnnArgs& a, const float* const* q, int64_t begin, int64_t end, Selection* s) {
  constexpr int R = Q == 1 ? 4 : 2;
  alignas(64) float score[Q][kGroup];
  for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
    const int rows = static_cast<int>(end - i0 < kGroup ? end - i0 : kGroup);
    const float* x = a.x + i0 * a.ldx;
    int r = 0;
    for (; r + R <= rows; r += R) {
      // The hardware follows the stream; this only reaches over the ends of pages.
      for (int64_t j = 0; j < a.d * R; j += 16) __builtin_prefetch(x + (r + 4 * R) * a.ldx + j);
      float part[Q][kGroup];
      dot_rows<M, Q, R>(q, x + r * a.ldx, a.ldx, a.d, part);
      for (int i = 0; i < Q; ++i)
        for (int k = 0; k < R; ++k) score[i][r + k] = part[i][k];
    }
    for (; r < rows; ++r) {
      float part[Q][kGroup];
      dot_rows<M, Q, 1>(q, x + r * a.ldx, a.ldx, a.d, part);
      for (int i = 0; i < Q; ++i) score[i][r] = part[i][0];
    }
    if (M == Metric::cosine)
      for (r = 0; r < rows; ++r) {
        const float inverse = inverse_norm(x + r * a.ldx, a.d);
        for (int i = 0; i < Q; ++i) score[i][r] *= inverse;
      }
    for (int i = 0; i < Q; ++i) {
      for (r = rows; r < kGroup; ++r) score[i][r] = score[i][0];  // never offered: see the bound below
      const vf t = splat(s->threshold[i]);
      for (int g = 0; g < kGroup; g += W)
        for (uint32_t m = passes<M>(load(score[i] + g), t); m; m &= m - 1) {
          const int k = g + __builtin_ctz(m);
          if (k < rows) offer(s, i, score[i][k], i0 + k, M);
        }
    }
  }
}

template <Metric M>
void rows_queries(const KnnArgs& a, const float* const* q, int64_t queries, int64_t begin, int64_t end, Selection* s) {
  switch (queries) {
    case 1: return rows_block<M, 1>(a, q, begin, end, s);
    case 2: return rows_block<M, 2>(a, q, begin, end, s);
    case 3: return rows_block<M, 3>(a, q, begin, end, s);
    default: return rows_block<M, 4>(a, q, begin, end, s);
  }
}

// ------------------------------------------------------------------------------------------ a pass over x
template <Metric M>
void pass(const KnnArgs& a, int64_t first, int64_t queries, int threads) {
  const int64_t lanes = lane_vectors(queries) * W;
  const bool by_rows = queries <= 4;
  Buffer<float> packed((by_rows ? queries : lanes) * (a.d + W));
  const float* q[4] = {};
  if (by_rows) {
    for (int64_t i = 0; i < queries; ++i) {
      const float* from = a.q + (first + i) * a.ldq;
      const float scale = M == Metric::cosine ? inverse_norm(from, a.d) : 1.0f;
      float* to = packed.data + i * (a.d + W);
      for (int64_t j = 0; j < a.d; ++j) to[j] = from[j] * scale;
      q[i] = to;
    }
  } else {
    pack_queries(a, first, queries, packed.data);
  }

  Selections selections(threads, queries, a.k, a.n, M);
  int64_t block = kBlockBytes / (4 * (a.d > 0 ? a.d : 1)) / 48 * 48;
  if (block < 48) block = 48;
  if (by_rows) block *= 4;  // nothing is reused: only the balance between threads matters
  Buffer<float> inverse(threads * block);
  scan_blocks(a.n, block, threads, [&](int t, int64_t begin, int64_t end) {
    Selection* s = selections.of_thread(t);
    if (by_rows)
      rows_queries<M>(a, q, queries, begin, end, s);
    else
      lanes_block<M>(a, packed.data, queries, begin, end, inverse.data + t * block, s);
  });
  selections.finish(first, a.scores, a.ids, a.bad);
}

template <Metric M>
void search(const KnnArgs& a) {
  const double nanoseconds = static_cast<double>(a.nq) * a.n * (a.d * 0.02 + 1);
  const int threads = nanoseconds < 60e3 ? 1 : num_threads();
  const int64_t queries = pass_queries(a.k, a.n, threads, W * kVectors);
  for (int64_t first = 0; first < a.nq; first += queries)
    pass<M>(a, first, a.nq - first < queries ? a.nq - first : queries, threads);
}

}  // namespace

void knn(const KnnArgs& a) {
  if (best_one::suits(a) &&
      (a.metric == Metric::ip ? best_one::search<Metric::ip>(a) : best_one::search<Metric::l2>(a)))
    return;
  switch (a.metric) {
    case Metric::ip: return search<Metric::ip>(a);
    case Metric::l2: return search<Metric::l2>(a);
    case Metric::cosine: return search<Metric::cosine>(a);
    default: return;
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
