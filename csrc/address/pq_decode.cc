#include "address/pq_decode.h"

#include "common/parallel.h"

#include <string.h>

namespace lutra {
namespace LUTRA_NS {
namespace {

// D: dsub where it is known at compile time (then a copy is a move or two), else 0.
template <int D>
void rows(const PqDecodeArgs& a, int64_t begin, int64_t end) {
  const int64_t dsub = D ? D : a.dsub;
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* code = a.entries + i * a.m;
    float* x = a.x + i * a.m * dsub;
    for (int64_t j = 0; j < a.m; ++j) {
      const float* from = a.books + (j * a.ksub + code[j]) * dsub;
      if (D)
        memcpy(x + j * D, from, D * sizeof(float));
      else
        memcpy(x + j * dsub, from, dsub * sizeof(float));
    }
  }
}

}  // namespace

void pq_decode(const PqDecodeArgs& a) {
  parallel_ranges(a.n, 256, 1.0 * a.n * a.m + 0.2 * a.n * a.m * a.dsub, [&](int64_t begin, int64_t end) {
    switch (a.dsub) {
      case 1: return rows<1>(a, begin, end);
      case 2: return rows<2>(a, begin, end);
      case 4: return rows<4>(a, begin, end);
      case 8: return rows<8>(a, begin, end);
      case 16: return rows<16>(a, begin, end);
      default: return rows<0>(a, begin, end);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
