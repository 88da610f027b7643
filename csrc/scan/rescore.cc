// Rescoring: the candidates of a query are sorted, duplicates dropped, and their rows scored along d with the next
// rows already being fetched. Limit: random reads of rows.
#include "scan/exact.h"
#include "scan/knn.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// Sort by merging runs of doubling length (c is small; the order of equal ids does not matter).
void sort_ids(int64_t* ids, int64_t c, int64_t* scratch) {
  int64_t *from = ids, *to = scratch;
  for (int64_t width = 1; width < c; width *= 2) {
    for (int64_t begin = 0; begin < c; begin += 2 * width) {
      const int64_t middle = begin + width < c ? begin + width : c;
      const int64_t end = begin + 2 * width < c ? begin + 2 * width : c;
      int64_t a = begin, b = middle;
      for (int64_t o = begin; o < end; ++o)
        to[o] = a < middle && (b >= end || from[a] <= from[b]) ? from[a++] : from[b++];
    }
    int64_t* swap = from;
    from = to;
    to = swap;
  }
  if (from != ids) memcpy(ids, from, sizeof(int64_t) * c);
}

// The candidates of query i as increasing ids without repetitions: their count, or an error for *bad.
int64_t unique_ids(const RescoreArgs& a, int64_t i, int64_t* sorted, int64_t* scratch, int64_t* error) {
  int64_t count = 0;
  for (int64_t j = 0; j < a.c; ++j) {
    const int64_t id = a.cand[i * a.c + j];
    if (id < -1 || id >= a.n) {
      *error = (static_cast<int64_t>(2) << 40) + i * a.c + j;
      return 0;
    }
    if (id >= 0) sorted[count++] = id;
  }
  sort_ids(sorted, count, scratch);
  int64_t unique = 0;
  for (int64_t j = 0; j < count; ++j)
    if (j == 0 || sorted[j] != sorted[j - 1]) sorted[unique++] = sorted[j];
  return unique;
}

void some_queries(const RescoreArgs& a, int64_t begin, int64_t end, int64_t* bad) {
  const int64_t capacity = topk_capacity(a.k, a.c);
  Buffer<int64_t> work(2 * a.c), who(capacity);
  Buffer<float> keys(capacity), factor(a.c + W);
  Buffer<double> wide(a.metric == Metric::poincare ? a.c : 0);
  alignas(64) float pass[W];
  const ExactCall call{a.q, a.x, a.nq, a.n, a.d, a.ldq, a.ldx, a.metric, a.storage, nullptr};
  for (int64_t i = begin; i < end; ++i) {
    bad[i] = -1;
    const int64_t count = unique_ids(a, i, work.data, work.data + a.c, bad + i);
    if (bad[i] >= 0) continue;
    const Prepared prepared(call, i, 1);
    TopK best;
    topk_start(&best, a.k, capacity, keys.data, who.data);
    Finds finds{};
    finds.queries = &prepared.queries;
    finds.best = &best;
    finds.pass = pass;
    finds.bad = -1;
    pass[0] = __builtin_nanf("");
    Block b{a.x, a.ldx, a.d, work.data, work.data, 0, count, nullptr, nullptr};
    if (a.metric == Metric::cosine || a.metric == Metric::poincare) {
      row_factors(a.metric, b, a.storage, factor.data, wide.data);
      b.factor = factor.data;
      b.wide = wide.data;
    }
    scan_rows(prepared.queries, 0, 1, b, a.storage, &finds);
    bad[i] = finds.bad;
    TopK* part = &best;
    topk_finish(&part, 1, a.k, sign_of(a.metric), a.scores + i * a.k, a.ids + i * a.k);
  }
}

}  // namespace

void rescore(const RescoreArgs& a) {
  Buffer<int64_t> bad(a.nq);
  const double cost = static_cast<double>(a.nq) * a.c * (a.d * 0.1 + 20);
  const int64_t grain = 1 + 512 / (1 + a.c);
  parallel_ranges(a.nq, grain, cost, [&](int64_t begin, int64_t end) { some_queries(a, begin, end, bad.data); });
  for (int64_t i = 0; i < a.nq && *a.bad < 0; ++i) *a.bad = bad[i];
}

}  // namespace LUTRA_NS
}  // namespace lutra
