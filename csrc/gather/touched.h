// Ranges of the touched rows (or addresses) of a sorted plan.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// The first of `count` increasing values that is not below `row`; count if there is none.
static inline int64_t lower_bound(const int64_t* touched, int64_t count, int64_t row) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (touched[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace LUTRA_NS
}  // namespace lutra
