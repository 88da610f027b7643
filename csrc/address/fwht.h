// Fast Walsh-Hadamard transform of rows, in natural (Sylvester) order.
//
//   x, out (rows, n), contiguous, of one type (f32, f16, bf16); n a power of two, out may not overlap x.
//   out[r, i] = scale * sum_j (-1)^popcount(i & j) x[r, j]
//
// The matrix is symmetric, so the gradient with respect to x is the transform of the gradient with the same scale; with
// scale = 1 / sqrt(n) the transform is orthogonal and its own inverse. Arithmetic is fp32, rounded once at the end.
// n log2 n additions on what is read and written once: up to n = 8192 the row stays in L1 and the limit is memory.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct FwhtArgs {
  const void* x;
  DType dtype;
  int64_t rows, n;
  float scale;
  void* out;
};

}  // namespace lutra

LUTRA_KERNEL(fwht, ::lutra::FwhtArgs)

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
constexpr int64_t kFwhtMost = 8192;  // values of a row
}
}  // namespace lutra
#endif
