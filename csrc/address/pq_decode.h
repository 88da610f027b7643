// Vectors of product-quantized codes: x[i][j dsub + k] = books[j][entries[i][j]][k].
//
//   entries (n, m) u8, each < ksub (the caller's duty); books (m, ksub, dsub) fp32; x (n, m * dsub) fp32.
// Limit: writing x.
#pragma once
#include "common/levels.h"

#include <cstdint>

namespace lutra {

struct PqDecodeArgs {
  const uint8_t* entries;
  const float* books;
  int64_t n, m, ksub, dsub;
  float* x;
};

}  // namespace lutra

LUTRA_KERNEL(pq_decode, ::lutra::PqDecodeArgs)
