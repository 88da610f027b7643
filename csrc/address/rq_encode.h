// Codes of residual quantization by beam search, from inner products alone.
//
//   dots (n, m * ksub): <x_i, c> for all centroids c of m codebooks; norms (m * ksub): |c|^2;
//   gram (m * ksub, m * ksub): <c, c'>, of which only those with c in an earlier codebook than c' are read.
//   A partial code e_0 .. e_j has the score |x - sum_i c_(i, e_i)|^2 - |x|^2, which grows by
//     |c|^2 - 2 <x, c> + 2 sum_(i < j) <c_(i, e_i), c>
//   with the centroid c of codebook j. At each codebook the `beam` best extensions go on; equal ones by the rank of
//   what they extend, then by the entry. entries (n, m) u8: the best code in the end.
// No residual is written, and the centroids' dimension does not matter. Limit: m^2 beam ksub / 2 additions a row.
#pragma once
#include "common/levels.h"

#include <cstdint>

namespace lutra {

struct RqEncodeArgs {
  const float* dots;
  const float* norms;
  const float* gram;
  int64_t n, m, ksub, beam;
  uint8_t* entries;
};

}  // namespace lutra

LUTRA_KERNEL(rq_encode, ::lutra::RqEncodeArgs)
