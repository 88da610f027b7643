#include "scan/list_rows.h"

#include "scan/lists.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

#if defined(LUTRA_LEVEL_v4)
constexpr int kQueries = 6, kTile = 4;  // 24 accumulators, 4 vectors of rows, of 32 registers
constexpr int kTileAlone = 8;           // for one query: enough chains of additions to hide their latency
#else
constexpr int kQueries = 4, kTile = 2;
constexpr int kTileAlone = 4;
#endif

// Scores of Q queries with V vectors of rows from row `row` of the arena on, which begins a vector.
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

template <Metric M, class T, int Q, int V>
void rows_of_item(const ListRowsArgs& a, const float* const* q, const int64_t* query, int64_t begin, int64_t end,
                  bool ahead, Selection* s) {
  const auto* x = static_cast<const typename T::type*>(a.x);
  alignas(64) float scores[Q][kTileAlone * W];
  for (int64_t row = begin; row < end;) {
    const int64_t left = end - row;
    int64_t rows = V * W;
    if (left >= rows) {
      tile<M, T, Q, V>(q, x, a.d, row, ahead, scores);
    } else {  // the last rows, one vector at a time
      rows = W;
      tile<M, T, Q, 1>(q, x, a.d, row, false, scores);
    }
    for (int i = 0; i < Q; ++i) offer_scores<M>(a.lists, s, query[i], scores[i], row, left < rows ? left : rows);
    row += rows;
  }
}

template <Metric M, class T>
void item(const ListRowsArgs& a, const Plan& plan, const ListItem& w, int64_t q0, Selection* s) {
  constexpr int64_t kGroup = kTile * W;  // rows that stay in the L1 for all queries of the item
  const float* q[kQueries];
  int64_t query[kQueries];
  const int64_t queries = w.last - w.first;
  if (queries == 1) {
    query[0] = plan.place(w.first) / a.lists.nprobe;
    q[0] = a.q + (q0 + query[0]) * a.ldq;
    return rows_of_item<M, T, 1, kTileAlone>(a, q, query, w.begin, w.end, true, s);
  }
  for (int64_t begin = w.begin; begin < w.end; begin += kGroup) {
    const int64_t end = begin + kGroup < w.end ? begin + kGroup : w.end;
    for (int64_t p = w.first; p < w.last; p += kQueries) {
      const int64_t count = w.last - p < kQueries ? w.last - p : kQueries;
      for (int64_t i = 0; i < count; ++i) {
        query[i] = plan.place(p + i) / a.lists.nprobe;
        q[i] = a.q + (q0 + query[i]) * a.ldq;
      }
      const bool ahead = p == w.first;
      switch (count) {
        case 1: rows_of_item<M, T, 1, kTile>(a, q, query, begin, end, ahead, s); break;
        case 2: rows_of_item<M, T, 2, kTile>(a, q, query, begin, end, ahead, s); break;
        case 3: rows_of_item<M, T, 3, kTile>(a, q, query, begin, end, ahead, s); break;
#if defined(LUTRA_LEVEL_v4)
        case 4: rows_of_item<M, T, 4, kTile>(a, q, query, begin, end, ahead, s); break;
        case 5: rows_of_item<M, T, 5, kTile>(a, q, query, begin, end, ahead, s); break;
#endif
        default: rows_of_item<M, T, kQueries, kTile>(a, q, query, begin, end, ahead, s);
      }
    }
  }
}

template <Metric M, class T>
void search(const ListRowsArgs& a) {
  const ListsArgs& l = a.lists;
  const int all = num_threads();
  const int64_t queries = pass_queries(l.k, l.npositions, all, 1);
  for (int64_t q0 = 0; q0 < l.nq; q0 += queries) {
    const int64_t count = l.nq - q0 < queries ? l.nq - q0 : queries;
    Plan plan(l, q0, count);
    const double nanoseconds = static_cast<double>(plan.rows) * (a.d * 0.04 + 1);
    const int threads = nanoseconds < 40e3 ? 1 : all;
    Selections selections(threads, count, l.k, 2 * l.npositions, M);
    scan_blocks(plan.item_count, 1, threads, [&](int t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) item<M, T>(a, plan, plan.items[i], q0, selections.of_thread(t));
    });
    selections.finish(q0, l.scores, l.ids, l.bad);
  }
}

template <Metric M>
void of_type(const ListRowsArgs& a) {
  switch (a.dtype) {
    case DType::f16: return search<M, F16>(a);
    case DType::bf16: return search<M, BF16>(a);
    case DType::i8: return search<M, I8>(a);
    default: return search<M, F32>(a);
  }
}

}  // namespace

void list_rows(const ListRowsArgs& a) {
  if (a.lists.metric == Metric::l2)
    of_type<Metric::l2>(a);
  else
    of_type<Metric::ip>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
