// parallel_for at a SIMD level. Chunks are independent, so the number of threads never changes a result.
#pragma once
#include "common/levels.h"
#include "common/pool.h"
#include "common/threads.h"

#include <stdlib.h>

#include <cstdint>

namespace lutra {
namespace LUTRA_NS {

template <class Fn>
static inline void call_slot(void* fn, int slot, int64_t chunk) {
  (*static_cast<const Fn*>(fn))(slot, chunk);
}

// fn(slot, chunk) for chunk in [0, chunks), on at most `threads` threads, which are the slots.
template <class Fn>
static inline void parallel_slots(int64_t chunks, int threads, const Fn& fn) {
  pool_run(chunks, threads, &call_slot<Fn>, const_cast<Fn*>(&fn));
}

// fn(chunk) for chunk in [0, chunks), on at most `num_threads()` threads; on the caller's alone when the whole
// work (in rough nanoseconds) would not pay for waking another.
template <class Fn>
static inline void parallel_for(int64_t chunks, double nanoseconds, const Fn& fn) {
  int threads = nanoseconds < 40e3 ? 1 : num_threads();
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads <= 1) {
    for (int64_t i = 0; i < chunks; ++i) fn(i);
    return;
  }
  parallel_slots(chunks, threads, [&](int, int64_t i) { fn(i); });
}

// fn(begin, end) over [0, n) cut into pieces of about `grain`.
template <class Fn>
static inline void parallel_ranges(int64_t n, int64_t grain, double nanoseconds, const Fn& fn) {
  if (grain < 1) grain = 1;
  const int64_t chunks = (n + grain - 1) / grain;
  parallel_for(chunks, nanoseconds, [&](int64_t i) {
    const int64_t begin = i * grain, end = begin + grain < n ? begin + grain : n;
    fn(begin, end);
  });
}

// A scratch buffer, 64-byte aligned, freed with its scope. Not initialised.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n > 0 ? n : 1) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data) abort();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

}  // namespace LUTRA_NS
}  // namespace lutra
