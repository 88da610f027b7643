// Codes of residual quantization by beam search, from inner products alone.
//
//   m codebooks of ksub centroids; norms (m * ksub): |c|^2; gram (m * ksub, m * ksub): <c, c'>, of which only those
//   with c in an earlier codebook than c' are read.
//   A partial code e_0 .. e_j has the score |x - sum_i c_(i, e_i)|^2 - |x|^2, which grows by
//     |c|^2 - 2 <x, c> + 2 sum_(i < j) <c_(i, e_i), c>
//   with the centroid c of codebook j. At each codebook the `beam` best extensions go on; equal ones by the rank of
//   what they extend, then by the entry.
//   Codebooks begin .. end - 1 are searched (training adds one at a time), from `width` partial codes of each row:
//   start (n, width, begin) and their scores reached (n, width), best first; with begin = 0 there is one, the empty.
//   dots (n, (end - begin) * ksub): <x_i, c> for the centroids of these codebooks.
//   entries (n, keep, end) u8: the best codes in the end; scores (n, keep), null: not wanted. keep is at most beam and
//   at most width * ksub^(end - begin).
// No residual is written, and the centroids' dimension does not matter. Limit: m^2 beam ksub / 2 additions a row.
#pragma once
#include "common/levels.h"

#include <cstdint>

namespace lutra {

struct RqEncodeArgs {
  const float* dots;
  const float* norms;
  const float* gram;
  int64_t n, m, ksub, beam, begin, end, width, keep;
  const uint8_t* start;
  const float* reached;
  uint8_t* entries;
  float* scores;
};

}  // namespace lutra

LUTRA_KERNEL(rq_encode, ::lutra::RqEncodeArgs)

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
bool rq_encode_fits(int64_t m, int64_t ksub, int64_t beam, int64_t width, int device);  // in shared memory
}
}  // namespace lutra
#endif
