// Products of queries with all rows of a packed table (gather/packed.h), written out or selected: the logits of a head
// tied to a table of 8-, 4- or 2-bit rows.
//
//   hidden (tokens, dim) fp32;  out[t ldo + i] = bias[i] + <hidden_t, row_i>, of type `dtype` (f32, f16, bf16)
//   k > 0: nothing is written out; scores, ids (tokens, k): the k largest of each token, largest first, equal ones by
//     increasing row. A NaN sets *bad to its row; the results are then unspecified.
//   int8, int4, int2 with AVX-512 VNNI: tokens are rounded to integers of 16 bits of their largest magnitude where the
//     result is f16 or bf16, of 24 where it is f32 or selected; sums are exact, results rounded to fp32
//     (packed_digits.h).
//   Otherwise, and for tokens that hold NaN or infinity (with those that share their pass): sums are fp32, in lanes of
//     W columns; where a row is one group its scale and minimum come in at the end.
//   On CUDA codes and tokens are multiplied as f16 by tensor cores (packed_logits.cu); a NaN comes first in its token's
//     results, and a token that holds infinities may have NaN where its row holds zeros,
//     one of fp32 everywhere (it is two terms of f16, infinity less infinity).
// Limit: few tokens: reading the packed rows once. Many: in integers 1/32 (16 bits) or 3/64 (24) of an instruction a
// column, row and token, as many as vdpbf16ps of a dense table; in floats a load, a conversion or a look-up in a
// register and a multiply-add for each token: from some tokens on it is faster to decode a tile and call a matrix
// product, and callers choose.
#pragma once
#include "gather/packed.h"

namespace lutra {

struct PackedLogitsArgs {
  const float* hidden;
  int64_t tokens;
  PackedTable table;
  const float* bias;
  void* out;
  DType dtype;
  int64_t ldo, k;
  float* scores;
  int64_t *ids, *bad;
  bool half_hidden = false;  // CUDA: f16 or bf16 hold the values of hidden
};

}  // namespace lutra

LUTRA_KERNEL(packed_logits, ::lutra::PackedLogitsArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
int64_t packed_logits_workspace(const PackedLogitsArgs&, const Launch&);  // of sizes, kind and k
}  // namespace cuda
}  // namespace lutra
#endif
