// SimHash partitions numbered by a Gray code, as MUVERA has them (Dhulipala et al. 2024, arXiv 2405.19504).
//
//   x (n, d), row-major; planes (d, repetitions * k), column r * k + i is plane i of repetition r
//   bit_i  = [<x, plane_i> > 0]
//   number = g after g <- 2 g + (bit_i xor (g & 1)) for i = 0 .. k - 1, so g ^ (g >> 1) are the bits, bit_0 the highest
//
// Products are summed in fp32 in the order of the dimensions, each by a fused multiply-add (where the level has one):
// what a row gets depends on nothing else. 0 <= k <= 31.
// *bad receives the first row that holds NaN or infinity, or -1; then out is unspecified.
// Limit: the FMA rate, 2 d k repetitions operations a row. A tile of rows is transposed once, so that a vector holds
// one dimension of W rows, and products are compared and packed in registers; planes are broadcast.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct SimhashArgs {
  const void* x;
  DType dtype;  // f32, f16, bf16
  int64_t n, d;
  const float* planes;
  int64_t repetitions;
  int k;
  int32_t* out;  // (n, repetitions)
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(simhash, ::lutra::SimhashArgs)
