// What gradients of pieces share: the entries of a block of bags, where each bag ends among them, and their factors.
#pragma once
#include "common/parallel.h"
#include "common/team.h"
#include "gather/entries.h"

namespace lutra {
namespace LUTRA_NS {

constexpr int64_t kPlanned = 1 << 20;  // addresses that are written out at a time

struct EntryPlan {
  Buffer<int64_t> ends;   // (bags,)
  Buffer<float> factors;  // (n,) the weights, or unused
  EntryPlan(int64_t n, int64_t bags, bool weighted) : ends(bags), factors(weighted ? n : 0) {}
};

// Whole bags from b on, as many as have about `most` entries: where they stop.
static inline int64_t block_of_bags(const BagBounds& bounds, int64_t b, int64_t bags, int64_t most) {
  int64_t stop = b + 1;  // a bag that is longer than a block is a block of its own
  while (stop < bags && bounds.begin(stop + 1) - bounds.begin(b) <= most && stop - b < most) ++stop;
  return stop;
}

// The bags [b0, b1), padding left out: ranges of them at a time, fill(index, n, at) for n rows whose place in the block
// begins at `at`; false where a row is bad. m: addresses of a row.
template <class Id, class Fill>
static void plan_entries(const BagIds& bag, int64_t rows, int64_t m, const float* weights, const BagBounds& bounds,
                         const Id* ids, int64_t b0, int64_t b1, BadFirst* bad, EntryPlan* plan, const Fill& fill) {
  const int64_t e0 = bounds.begin(b0), bags = b1 - b0, most = bounds.begin(b1) - e0;
  const auto range = [&](int64_t i, int64_t k, int64_t at) {
    const Entries entries(bag, rows, weights, bounds, ids, i, k, bad);
    if (entries.failed) return at;
    if (!fill(entries.index, entries.n, at)) bad->report(bounds.begin(i));
    const int64_t first = bounds.begin(i);
    for (int64_t b = i; b < k; ++b)
      plan->ends[b - b0] = at + (entries.compacted ? entries.ends[b - i] : bounds.begin(b + 1) - first);
    if (entries.weights)
      memcpy(plan->factors.data + at, entries.weights, static_cast<size_t>(entries.n) * sizeof(float));
    return at + entries.n;
  };
  if (bag.padding_idx < 0) {
    const int64_t grain = most * m < (1 << 14) || bags < 2 ? bags : bags / (most * m >> 13) + 1;
    team_ranges(bags, grain, static_cast<double>(most) * (8 + 0.5 * static_cast<double>(m)),
                [&](int64_t i, int64_t k) { range(b0 + i, b0 + k, bounds.begin(b0 + i) - e0); });
  } else {  // places follow from what was left out before
    int64_t at = 0;
    for (int64_t b = b0; b < b1; ++b) at = range(b, b + 1, at);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
