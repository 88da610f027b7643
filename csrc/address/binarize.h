// Packed bits of vectors.
//
//   x (n, d) fp32, fp16 or bf16, contiguous; threshold (d) fp32.
//   out (n, ceil(d / 8)): bit j of a row (bit j % 8 of byte j / 8) is x[j] > threshold[j]; spare bits are 0.
// NaN gives 0. Limit: reading x.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct BinarizeArgs {
  const void* x;
  DType dtype;
  int64_t n, d;
  const float* threshold;
  uint8_t* out;
  float all = 0;  // CUDA only: of all dimensions, where threshold is null
};

}  // namespace lutra

LUTRA_KERNEL(binarize, ::lutra::BinarizeArgs)
