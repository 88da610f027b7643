// knn: exact_scan.cc with a TopK for each query and thread. k = 1 with many queries, where the caller asks for the
// nearest only, has a way of its own: best_one.h.
#include "scan/knn.h"

#include "scan/best_one.h"
#include "scan/exact.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {

void knn(const KnnArgs& a) {
  if (a.assign && best_one::suits(a) &&
      (a.metric == Metric::ip ? best_one::search<Metric::ip>(a) : best_one::search<Metric::l2>(a)))
    return;
  const ExactCall call{a.q, a.x, a.nq, a.n, a.d, a.ldq, a.ldx, a.metric, a.storage, a.keep, a.bias};
  const int threads = scan_threads(call);
  Buffer<Finds> finds(threads);
  const int64_t queries = pass_queries(a.k, a.n, threads, W * kLaneVectors);
  for (int64_t first = 0; first < a.nq; first += queries) {
    const int64_t count = a.nq - first < queries ? a.nq - first : queries;
    Selections selections(threads, count, a.k, a.n, a.metric);
    for (int t = 0; t < threads; ++t) {
      finds[t].best = selections.of_thread(t)->best;
      finds[t].pass = selections.of_thread(t)->threshold;
      finds[t].hits = nullptr;
    }
    exact_pass(call, first, count, threads, finds.data);
    for (int t = 0; t < threads; ++t) selections.of_thread(t)->bad = finds[t].bad;
    selections.finish(first, a.scores, a.ids, a.bad);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
