// W vectors as a matrix, turned.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// Lane l of vector i becomes lane i of vector l: in log W steps halves, quarters, ... change places.
LUTRA_INLINE void transpose(vf* v) {
#pragma GCC unroll 4
  for (int step = W / 2; step > 0; step /= 2) {
    vi low, high;  // lanes of a pair: W and on are those of the second
    for (int l = 0; l < W; ++l) {
      low[l] = l & step ? W + l - step : l;
      high[l] = l & step ? W + l : l + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & step) continue;
      const vf a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
