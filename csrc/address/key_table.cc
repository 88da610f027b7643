#include "address/key_table.h"

#include "common/parallel.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kBlock = 64;  // lines on their way at once

// f(i, home) for i in [begin, end), the home's line prefetched.
template <class Home, class Fn>
LUTRA_INLINE void in_blocks(int64_t begin, int64_t end, const int64_t* lines, const Home& home, const Fn& f) {
  int64_t at[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = end - b < kBlock ? end - b : kBlock;
    for (int64_t i = 0; i < n; ++i) {
      at[i] = home(b + i);
      __builtin_prefetch(lines + at[i]);
    }
    for (int64_t i = 0; i < n; ++i) f(b + i, at[i]);
  }
}

}  // namespace

void key_insert(const KeyInsertArgs& a) {
  *a.twice = -1;
  const auto home = [&](int64_t i) { return home_of(a.keys[i], a.n_buckets); };
  in_blocks(0, a.n, a.buckets, home, [&](int64_t i, int64_t at) {
    for (;;) {
      int64_t* bucket = a.buckets + at;
      if (place_in(bucket, a.keys[i]) >= 0) {
        if (*a.twice < 0) *a.twice = i;
        return;
      }
      const int place = bucket[7] >> 32 ? -1 : place_in(bucket, kNoKey);
      if (place >= 0) {
        bucket[place] = a.keys[i];
        reinterpret_cast<int32_t*>(bucket + 5)[place] = a.values[i];
        return;
      }
      reinterpret_cast<int32_t*>(bucket + 5)[5] = 1;
      at = at + 8 == a.n_buckets * 8 ? 0 : at + 8;
    }
  });
}

void key_lookup(const KeyLookupArgs& a) {
  parallel_ranges(a.n, 1 << 14, static_cast<double>(a.n) * 8, [&](int64_t begin, int64_t end) {
    const auto home = [&](int64_t i) { return home_of(a.keys[i], a.n_buckets); };
    in_blocks(begin, end, a.buckets, home, [&](int64_t i, int64_t at) {
      a.values[i] = a.keys[i] == kNoKey ? -1 : value_of(a.buckets, a.n_buckets, at, a.keys[i]);
    });
  });
}

void key_count(const KeyCountArgs& a) {
  const uint64_t mask = static_cast<uint64_t>(a.capacity) - 1;
  const auto home = [&](int64_t i) { return static_cast<int64_t>((mixed(a.keys[i]) & mask) * 2); };
  int64_t used = *a.used;
  in_blocks(0, a.n, a.slots, home, [&](int64_t i, int64_t at) {
    const int64_t key = a.keys[i];
    if (key == kNoKey) return;
    while (a.slots[at] != key) {
      if (a.slots[at] == kNoKey) {
        a.slots[at] = key;
        a.slots[at + 1] = 0;
        ++used;
        break;
      }
      at = at + 2 == a.capacity * 2 ? 0 : at + 2;
    }
    a.slots[at + 1] += a.weights ? a.weights[i] : 1;
  });
  *a.used = used;
}

}  // namespace LUTRA_NS
}  // namespace lutra
