// Tiles of exact scores: queries times rows of blocks of 16, a value of W rows in a vector, at a SIMD level.
//
// Scores are sums along d in increasing order, whatever the shape of the tile, so that a batch changes no bit.
#pragma once
#include "scan/lists.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {

#if defined(LUTRA_LEVEL_v4)
constexpr int kQueries = 6, kTile = 4;  // 24 accumulators, 4 vectors of rows, of 32 registers
constexpr int kTileAlone = 8;           // for one query: enough chains of additions to hide their latency
#else
constexpr int kQueries = 4, kTile = 2;
constexpr int kTileAlone = 4;
#endif

// Scores of Q queries with V vectors of rows from row `row` on, which begins a vector.
template <Metric M, class T, int Q, int V>
LUTRA_INLINE void tile(const float* const* q, const typename T::type* x, int64_t d, int64_t row, bool ahead,
                       float scores[][kTileAlone * W]) {
  const typename T::type* at[V];
  for (int v = 0; v < V; ++v) {
    const int64_t r = row + v * W;
    at[v] = x + (r / kListBlock) * d * kListBlock + r % kListBlock;
  }
  const int64_t next = V * W * d;
  vf sum[Q][V];
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) sum[i][v] = (vf){};
  for (int64_t j = 0; j < d; ++j) {
    vf xj[V];
    for (int v = 0; v < V; ++v) {
      xj[v] = T::load(at[v] + j * kListBlock);
      if (ahead) __builtin_prefetch(at[v] + j * kListBlock + next);
    }
    for (int i = 0; i < Q; ++i) {
      const vf qj = splat(q[i][j]);
      for (int v = 0; v < V; ++v) sum[i][v] = accumulate<M>(sum[i][v], qj, xj[v]);
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) store(scores[i] + v * W, sum[i][v]);
}

// Offer the scores of Q queries with rows [begin, end) of the arena; x are its rows from `first` on.
template <Metric M, class T, int Q, int V>
void offer_tiles(const ListsArgs& a, const float* const* q, const int64_t* query, const typename T::type* x, int64_t d,
                 int64_t first, int64_t begin, int64_t end, bool ahead, Selection* s) {
  alignas(64) float scores[Q][kTileAlone * W];
  for (int64_t row = begin; row < end;) {
    const int64_t left = end - row;
    int64_t rows = V * W;
    if (left >= rows) {
      tile<M, T, Q, V>(q, x, d, row - first, ahead, scores);
    } else {  // the last rows, one vector at a time
      rows = W;
      tile<M, T, Q, 1>(q, x, d, row - first, false, scores);
    }
    for (int i = 0; i < Q; ++i) offer_scores<M>(a, s, query[i], scores[i], row, left < rows ? left : rows);
    row += rows;
  }
}

// The same for all queries of an item: its rows [begin, end), which should stay in the L1. `queries`: those of the
// pass.
template <Metric M, class T>
void offer_group(const ListsArgs& a, const Plan& plan, const ListItem& w, const float* queries, int64_t ldq,
                 const typename T::type* x, int64_t d, int64_t first, int64_t begin, int64_t end, bool fetch,
                 Selection* s) {
  const float* q[kQueries];
  int64_t query[kQueries];
  for (int64_t p = w.first; p < w.last; p += kQueries) {
    const int64_t count = w.last - p < kQueries ? w.last - p : kQueries;
    for (int64_t i = 0; i < count; ++i) {
      query[i] = plan.place(p + i) / a.nprobe;
      q[i] = queries + query[i] * ldq;
    }
    const bool ahead = fetch && p == w.first;
    switch (count) {
      case 1: offer_tiles<M, T, 1, kTile>(a, q, query, x, d, first, begin, end, ahead, s); break;
      case 2: offer_tiles<M, T, 2, kTile>(a, q, query, x, d, first, begin, end, ahead, s); break;
      case 3: offer_tiles<M, T, 3, kTile>(a, q, query, x, d, first, begin, end, ahead, s); break;
#if defined(LUTRA_LEVEL_v4)
      case 4: offer_tiles<M, T, 4, kTile>(a, q, query, x, d, first, begin, end, ahead, s); break;
      case 5: offer_tiles<M, T, 5, kTile>(a, q, query, x, d, first, begin, end, ahead, s); break;
#endif
      default: offer_tiles<M, T, kQueries, kTile>(a, q, query, x, d, first, begin, end, ahead, s);
    }
  }
}

// All items of all passes: item(plan, item of it, first query of the pass, thread, selection).
template <Metric M, class Item>
void search_items(const ListsArgs& l, int64_t d, const Item& item) {
  const int all = num_threads();
  const int64_t queries = pass_queries(l.k, l.npositions, all, 1);
  for (int64_t q0 = 0; q0 < l.nq; q0 += queries) {
    const int64_t count = l.nq - q0 < queries ? l.nq - q0 : queries;
    Plan plan(l, q0, count);
    const double nanoseconds = static_cast<double>(plan.rows) * (d * 0.04 + 1);
    const int threads = nanoseconds < 40e3 ? 1 : all;
    Selections selections(threads, count, l.k, 2 * l.npositions, M);
    scan_blocks(plan.item_count, 1, threads, [&](int t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) item(plan, plan.items[i], q0, t, selections.of_thread(t));
    });
    selections.finish(q0, l.scores, l.ids, l.bad);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
