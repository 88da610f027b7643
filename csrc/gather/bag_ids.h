// Which entries a bag holds: bounds, checks of offsets and ids, padding.
#pragma once
#include "common/levels.h"
#include "gather/bag.h"

#include <limits.h>

namespace lutra {
namespace LUTRA_NS {

constexpr int64_t kNoBad = INT64_MAX;

struct BadFirst {  // the smallest position that any thread reports
  int64_t position = kNoBad;
  void report(int64_t p) {
    int64_t seen = __atomic_load_n(&position, __ATOMIC_RELAXED);
    while (p < seen && !__atomic_compare_exchange_n(&position, &seen, p, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  int64_t result() const { return position == kNoBad ? -1 : position; }
};

// The entries of bag b are [begin(b), end(b)) = [begin(b), begin(b + 1)).
struct BagBounds {
  const int32_t* o32;
  const int64_t* o64;
  int64_t length, given, n_ids;  // given: number of offsets

  explicit BagBounds(const BagIds& a)
      : o32(a.offsets && a.id_type == DType::i32 ? static_cast<const int32_t*>(a.offsets) : nullptr),
        o64(a.offsets && a.id_type == DType::i64 ? static_cast<const int64_t*>(a.offsets) : nullptr), length(a.length),
        given(a.bags + a.last_offset), n_ids(a.n_ids) {}

  int64_t begin(int64_t b) const {
    if (o64) return b < given ? o64[b] : n_ids;
    if (o32) return b < given ? o32[b] : n_ids;
    return b * length;
  }

  // The first offset that decreases or lies outside [0, n_ids], as -2 - position; -1 if there is none.
  int64_t check() const {
    if (!o64 && !o32) return -1;
    int64_t before = 0;
    for (int64_t i = 0; i < given; ++i) {
      const int64_t here = o64 ? o64[i] : o32[i];
      if (here < before || here > n_ids) return -2 - i;
      before = here;
    }
    return -1;
  }

  // The bag that holds entry p, for p in [begin(0), begin(bags)): the last one that begins at or before it.
  int64_t bag_at(int64_t p, int64_t bags) const {
    if (!o64 && !o32) return p / length;
    int64_t low = 0, high = bags;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (begin(middle) <= p)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace LUTRA_NS
}  // namespace lutra
