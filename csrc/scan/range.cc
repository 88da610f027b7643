// range: exact_scan.cc with a growing list of hits for each thread.
#include "scan/range.h"

#include "scan/exact.h"

namespace lutra {
namespace LUTRA_NS {

void range(const RangeArgs& a) {
  constexpr int64_t kPass = 4096;  // queries at a time
  const ExactCall call{a.q, a.x, a.nq, a.n, a.d, a.ldq, a.ldx, a.metric, a.storage, a.keep};
  const int threads = scan_threads(call);
  Buffer<Finds> finds(threads);
  Buffer<Hits> hits(threads);
  const int64_t lanes = ((a.nq < kPass ? a.nq : kPass) + W - 1) / W * W;
  Buffer<float> pass(threads * lanes);
  for (int64_t first = 0; first < a.nq; first += kPass) {
    const int64_t count = a.nq - first < kPass ? a.nq - first : kPass;
    for (int t = 0; t < threads; ++t) {
      hits[t] = Hits{nullptr, 0, 0};
      finds[t].best = nullptr;
      finds[t].pass = pass.data + t * lanes;
      finds[t].hits = &hits[t];
      finds[t].radius = a.radius;
    }
    exact_pass(call, first, count, threads, finds.data);
    for (int t = 0; t < threads; ++t) {
      if (finds[t].bad >= 0 && (*a.bad < 0 || finds[t].bad < *a.bad)) *a.bad = finds[t].bad;
      if (hits[t].count && *a.bad < 0) a.take(a.context, hits[t].data, hits[t].count);
      free(hits[t].data);
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
