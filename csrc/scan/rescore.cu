// The best of given candidates: their exact scores (exact_pass.cu), sorted, equal ones once.
#include "scan/exact_pass.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int64_t kListBytes = int64_t{256} << 20;  // of the workspace, about

int64_t rescore_queries(int64_t nq, int64_t c, int64_t d) {  // per launch
  const int64_t fit = kListBytes / (static_cast<int64_t>(sizeof(Key)) * (c > 0 ? c : 1) + d * 4);
  return fit < 1 ? 1 : fit < nq ? fit : nq;
}

struct Arrays {
  Key* keys;
  float* normalized;
  double* rooms;
  void* scratch;
  int64_t bytes;
};
Arrays arrays(int64_t queries, int64_t c, int64_t d, int64_t k, Metric metric, void* workspace) {
  Carve carve(workspace);
  Arrays w{};
  w.keys = carve.take<Key>(queries * c);
  if (metric == Metric::cosine) w.normalized = carve.take<float>(queries * d);
  if (metric == Metric::poincare) w.rooms = carve.take<double>(queries);
  if (is_long(k, c)) w.scratch = carve.take<unsigned char>(long_lists_bytes(queries, c));
  w.bytes = carve.used();
  return w;
}
}  // namespace

int64_t rescore_workspace(int64_t nq, int64_t c, int64_t d, int64_t k, Metric metric, const Launch& l) {
  const DeviceGuard guard(l.device);
  return arrays(rescore_queries(nq, c, d), c, d, k, metric, nullptr).bytes;
}

void rescore(const RescoreArgs& a, const Launch& l) {
  if (a.n > kMaxRows || a.d > 0x7ffffff0)
    throw std::length_error("lutra: rescore on CUDA takes fewer than 2^32 - 1 rows of fewer than 2^31 - 16 values");
  if (a.c > 0x7fffffff) throw std::length_error("lutra: rescore on CUDA takes fewer than 2^31 candidates a query");
  const DeviceGuard guard(l.device);
  const bool cosine = a.metric == Metric::cosine, smaller = a.metric != Metric::ip && !cosine;
  const int64_t chunk = rescore_queries(a.nq, a.c, a.d);
  const Arrays w = arrays(chunk, a.c, a.d, a.k, a.metric, l.workspace);
  for (int64_t first = 0; first < a.nq; first += chunk) {
    const int64_t count = a.nq - first < chunk ? a.nq - first : chunk;
    const float* q = a.q + first * a.ldq;
    int64_t ldq = a.ldq;
    if (cosine) {
      normalize_queries(q, count, ldq, a.d, w.normalized, l);
      q = w.normalized, ldq = a.d;
    }
    if (w.rooms) query_rooms(q, count, ldq, a.d, w.rooms, l);
    score_candidates(CandidateArgs{q, a.x, count, a.n, ldq, a.ldx, static_cast<int>(a.d), a.storage, a.metric, nullptr,
                                   a.cand + first * a.c, a.c, w.keys, w.rooms},
                     l);
    const int c = static_cast<int>(a.c), best = static_cast<int>(a.k < a.c ? a.k : a.c);
    Merge m{w.keys,
            count,
            1,
            c,
            c,
            true,
            best,
            static_cast<int>(a.k),
            smaller,
            a.scores + first * a.k,
            a.ids + first * a.k};
    m.scratch = w.scratch;
    merge_lists(m, "rescore", l);
  }
}

}  // namespace cuda
}  // namespace lutra
