// The same as common/parallel.h on OpenMP's threads, for kernels that run inside torch models, at a SIMD level.
//
// A model calls torch's own ops before and after, whose OpenMP threads spin for a while when they are done: a thread of
// our pool would share a core with one that spins. These kernels use those very threads (one libgomp serves both).
// Searches use the pool, whose caller waits for nobody.
#pragma once
#include "common/levels.h"
#include "common/threads.h"

#include <cstdint>

namespace lutra {
namespace LUTRA_NS {

// fn(chunk) for chunk in [0, chunks) on so many threads.
template <class Fn>
static inline void team_chunks(int64_t chunks, int threads, const Fn& fn) {
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads <= 1) {
    for (int64_t i = 0; i < chunks; ++i) fn(i);
    return;
  }
#pragma omp parallel for schedule(monotonic : dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < chunks; ++i) fn(i);
}

// As parallel_for; the work is given in rough nanoseconds, a fork and join takes 13 microseconds.
template <class Fn>
static inline void team_for(int64_t chunks, double nanoseconds, const Fn& fn) {
  team_chunks(chunks, nanoseconds < 40e3 ? 1 : team_threads(), fn);
}

// As parallel_ranges.
template <class Fn>
static inline void team_ranges(int64_t n, int64_t grain, double nanoseconds, const Fn& fn) {
  if (grain < 1) grain = 1;
  team_for((n + grain - 1) / grain, nanoseconds, [&](int64_t i) {
    const int64_t begin = i * grain, end = begin + grain < n ? begin + grain : n;
    fn(begin, end);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
