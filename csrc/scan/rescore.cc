// Rescoring: the candidates of a query are sorted, duplicates dropped, and their rows scored along d with the next
// rows already being fetched. Limit: random reads of rows.
#include "common/parallel.h"
#include "common/select.h"
#include "common/simd.h"
#include "scan/knn.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <Metric M>
LUTRA_INLINE float score_row(const float* q, const float* x, int64_t d) {
  vf sum = {};
  int64_t j = 0;
  for (; j + W <= d; j += W) sum = accumulate<M>(sum, load(q + j), load(x + j));
  if (j < d) {
    const int rest = static_cast<int>(d - j);
    sum = accumulate<M>(sum, load_first(q + j, rest), load_first(x + j, rest));
  }
  float s = reduce_add(sum);
  if (M == Metric::cosine) s *= inverse_norm(x, d);
  return s;
}

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

template <Metric M>
int64_t one_query(const RescoreArgs& a, int64_t i, int64_t* work, float* keys, int64_t* who, int64_t capacity) {
  int64_t bad = -1;
  int64_t *sorted = work, *scratch = work + a.c;
  float* unit = reinterpret_cast<float*>(work + 2 * a.c);
  const float* q = a.q + i * a.ldq;
  if (M == Metric::cosine) {
    const float scale = inverse_norm(q, a.d);
    for (int64_t j = 0; j < a.d; ++j) unit[j] = q[j] * scale;
    q = unit;
  }
  int64_t count = 0;
  for (int64_t j = 0; j < a.c; ++j) {
    const int64_t id = a.cand[i * a.c + j];
    if (id < -1 || id >= a.n) return (static_cast<int64_t>(2) << 40) + i * a.c + j;
    if (id >= 0) sorted[count++] = id;
  }
  sort_ids(sorted, count, scratch);
  TopK best;
  topk_start(&best, a.k, capacity, keys, who);
  constexpr int64_t kAhead = 4;
  for (int64_t j = 0; j < count; ++j) {
    if (j + kAhead < count)
      for (int64_t at = 0; at < a.d; at += 16) __builtin_prefetch(a.x + sorted[j + kAhead] * a.ldx + at);
    const int64_t id = sorted[j];
    if (j > 0 && id == sorted[j - 1]) continue;
    const float score = score_row<M>(q, a.x + id * a.ldx, a.d);
    if (score != score) {
      if (bad < 0) bad = id;
      continue;
    }
    topk_push(&best, sign_of(M) * score, id);
  }
  TopK* part = &best;
  topk_finish(&part, 1, a.k, sign_of(M), a.scores + i * a.k, a.ids + i * a.k);
  return bad;
}

template <Metric M>
void all_queries(const RescoreArgs& a) {
  const int64_t capacity = topk_capacity(a.k, a.c);
  Buffer<int64_t> bad(a.nq);
  const double cost = static_cast<double>(a.nq) * a.c * (a.d * 0.1 + 20);
  const int64_t grain = 1 + 512 / (1 + a.c);
  parallel_ranges(a.nq, grain, cost, [&](int64_t begin, int64_t end) {
    Buffer<int64_t> work(2 * a.c + a.d);
    Buffer<float> keys(capacity);
    Buffer<int64_t> who(capacity);
    for (int64_t i = begin; i < end; ++i) bad[i] = one_query<M>(a, i, work.data, keys.data, who.data, capacity);
  });
  for (int64_t i = 0; i < a.nq && *a.bad < 0; ++i) *a.bad = bad[i];
}

}  // namespace

void rescore(const RescoreArgs& a) {
  switch (a.metric) {
    case Metric::ip: return all_queries<Metric::ip>(a);
    case Metric::l2: return all_queries<Metric::l2>(a);
    case Metric::cosine: return all_queries<Metric::cosine>(a);
    default: return;
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
