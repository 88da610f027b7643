// What the scans of panels (blocks.cc, blocks_pq.cc) share, at a SIMD level: the filter, the offer.
#pragma once
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {

LUTRA_INLINE bool kept(const uint8_t* keep, int64_t row) { return !keep || (keep[row >> 3] >> (row & 7) & 1); }

// Whether any of the rows [first, first + rows) may be found; first is a multiple of 8.
static inline bool any_kept(const uint8_t* keep, int64_t first, int64_t rows) {
  if (!keep) return true;
  for (int64_t i = first >> 3; i < (first + rows + 7) >> 3; ++i)
    if (keep[i]) return true;
  return false;
}

// Scores of the rows [first, first + rows), best-first metric: those that pass the query's threshold and the filter
// are offered. `scores` has room for whole vectors.
static inline void offer_lanes(Selection* s, int64_t query, const float* scores, int64_t first, int64_t rows,
                               const uint8_t* keep) {
  for (int64_t i = 0; i < rows; i += W) {
    uint32_t m = passes<Metric::ip>(load(scores + i), splat(s->threshold[query]));
    for (; m; m &= m - 1) {
      const int64_t at = i + __builtin_ctz(m);
      if (at < rows && kept(keep, first + at)) offer(s, query, scores[at], first + at, Metric::ip);
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
