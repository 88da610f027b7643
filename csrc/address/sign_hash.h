// Sign hash of MemoryFormer (Ding et al. 2024, arXiv 2411.12992).
//
//   x (rows, tables * bits), row-major, row stride ldx. Chunk k of a row is z = x[k*bits : (k+1)*bits].
//   code_k   = sum_i [z_i >= 0] << i                        (bit 0 is the first value; -0.0 counts as >= 0)
//   p_k      = prod_i sigmoid(2 |z_i| / t)
//   weight_k = p_k                 (Score::prob,   the paper)
//            = p_k * sum_i |z_i|   (Score::scaled, the published code; there t = 1)
//
// Gradient, u_i = (sign z_i - tanh(z_i / t)) / t, sign 0 = 0 (the codes have none):
//   prob:   dz_i = gw_k p_k u_i
//   scaled: dz_i = gw_k p_k (sign z_i + S_k u_i),  S_k = sum_i |z_i|
//
// Codes are built in integers. Arithmetic is fp32 whatever the type of x (f32, f16, bf16); weights are fp32.
// NaN in x gives a zero bit and a NaN weight. 1 <= bits <= 16. Limit: reading x, for small bits the exp.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct SignHashArgs {
  const void* x;
  DType dtype;
  int64_t rows, tables, ldx;
  int bits;
  Score score;
  float temperature;
  int32_t* codes;  // (rows, tables)
  float* weights;  // (rows, tables)
};

struct SignHashBackwardArgs {
  const void* x;
  DType dtype;
  int64_t rows, tables, ldx;
  int bits;
  Score score;
  float temperature;
  const float* grad_weights;  // (rows, tables)
  void* grad_x;               // (rows, tables * bits), contiguous, the type of x
};

}  // namespace lutra

LUTRA_KERNEL(sign_hash, ::lutra::SignHashArgs)
LUTRA_KERNEL(sign_hash_backward, ::lutra::SignHashBackwardArgs)
